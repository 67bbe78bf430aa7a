"""Keeps what goes wrong with one request from the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hermes_async.errors import HermesError, RequestError


@contextmanager
def one_request(what: str) -> Iterator[None]:
    """Makes a `RequestError` of whatever a library raises in the body; errors of ours pass as they are.

    A panic of a tokenizer's Rust code is a `BaseException` of no public class: it is known by its module. Every other
    `BaseException` is no error but an end from outside, and passes.

    Args:
        what: What the body does, as the subject of the message.

    Raises:
        RequestError: Its `__cause__` is what was raised.

    Cancellation: passes unchanged.
    """
    try:
        yield
    except HermesError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise RequestError(f"{what} failed: {type(error).__name__}: {reason}") from error
