"""Makes errors of ours of what libraries raise, and keeps what goes wrong with one request from the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hermes_async.errors import CheckpointError, HermesError, RequestError


def is_foreign(error: BaseException) -> bool:
    """Whether a library raised it, and it is neither an error of ours nor an end from outside, such as a cancellation.

    A panic of a library's Rust code is a `BaseException` of no public class: it is known by its module. Every other
    `BaseException` that is no `Exception` is an end from outside.
    """
    return not isinstance(error, HermesError) and (
        isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
    )


def reason_of(error: BaseException) -> str:
    """One line that says what was raised."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"{type(error).__name__}: {reason}"


def one_request(what: str) -> AbstractContextManager[None]:
    """Makes a `RequestError` of whatever a library raises in the body; all else passes as it is.

    Args:
        what: What the body does, as the subject of the message.

    Raises:
        RequestError: Its `__cause__` is what was raised.

    Cancellation: passes unchanged.
    """
    return _foreign_errors_as(RequestError, f"{what} failed")


def one_checkpoint(source: Any) -> AbstractContextManager[None]:
    """As `one_request`, for a checkpoint that is opened.

    Raises:
        CheckpointError: Its `__cause__` is what was raised.

    Cancellation: passes unchanged.
    """
    return _foreign_errors_as(CheckpointError, f"{source} cannot be opened")


@contextmanager
def _foreign_errors_as(kind: type[RequestError | CheckpointError], message: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        raise kind(f"{message}: {reason_of(error)}") from error


# --- errors of task groups ---


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raises the first error of a group by itself: no bare group reaches a user."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_error(group)
        raise error from error.__cause__


def first_error(error: BaseException) -> BaseException:
    """The first error of a group; any other error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def all_errors(error: BaseException) -> list[BaseException]:
    """Every error of a group, however deep; any other error alone."""
    if isinstance(error, BaseExceptionGroup):
        return [each for part in error.exceptions for each in all_errors(part)]
    return [error]
