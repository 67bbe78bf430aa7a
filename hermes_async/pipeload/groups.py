"""Errors of task groups, one at a time: no bare group reaches a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
