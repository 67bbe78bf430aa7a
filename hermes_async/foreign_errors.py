"""Turns errors of other libraries into ours, so that an error in one request does not reach the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hermes_async.errors import CheckpointError, HermesError, RequestError


def is_foreign(error: BaseException) -> bool:
    """Whether another library raised `error`. Errors of ours and cancellation are not foreign.

    A panic in a library's Rust code is a `BaseException` without a public class, so its module identifies it. Every
    other `BaseException` that is no `Exception` ends the caller from outside, as a cancellation does.
    """
    return not isinstance(error, HermesError) and (
        isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason_of(error: BaseException) -> str:
    """The class of an error and the first line of its text."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def one_request(what: str) -> AbstractContextManager[None]:
    """Turns a foreign error in the body into a `RequestError`; other errors pass unchanged.

    Args:
        what: What the body does, as the subject of the message.

    Raises:
        RequestError: Its `__cause__` is the foreign error.

    Cancellation: passes unchanged.
    """
    return _foreign_errors_as(RequestError, f"{what} failed")


def one_checkpoint(source: Any) -> AbstractContextManager[None]:
    """As `one_request`, while a checkpoint is opened.

    Raises:
        CheckpointError: Its `__cause__` is the foreign error.

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
    """Raises the first error of a group alone, so that no group reaches a user."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_error(group)
        raise error from error.__cause__


def first_error(error: BaseException) -> BaseException:
    """The first error of a group; an error that is no group as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def all_errors(error: BaseException) -> list[BaseException]:
    """All errors of a group and of the groups in it; an error that is no group alone."""
    if isinstance(error, BaseExceptionGroup):
        return [each for part in error.exceptions for each in all_errors(part)]
    return [error]
