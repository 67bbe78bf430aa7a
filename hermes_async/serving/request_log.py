"""Log lines about requests: their ids, counts and times, and never their texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from hermes_async.errors import HermesError, RequestError
from hermes_async.serving.request import Request

LOGGER_NAME = "hermes_async.requests"
_MAX_ID_CHARS = 128

logger = logging.getLogger(LOGGER_NAME)


def printable_id(request_id: str) -> str:
    """A user's id in one line and of bounded length. Line breaks and other control characters become "?"."""
    cut = request_id[:_MAX_ID_CHARS]
    shown = "".join(char if char.isprintable() else "?" for char in cut)
    return shown if len(cut) == len(request_id) else f"{shown}..."


def log_finished(request: Request) -> None:
    """Logs the end of a request: a line at INFO, or at WARNING if it ended with an error."""
    error = request.error
    level = logging.INFO if error is None else logging.WARNING
    if not logger.isEnabledFor(level):
        return
    usage, timings = request.usage(), request.timings()
    logger.log(
        level,
        "request %(id)s: %(prompt)d prompt tokens (%(cached)d cached), %(output)d output tokens, %(reason)s; "
        "queue %(queue).3f s, %(first)s, total %(total).3f s",
        {
            "id": printable_id(request.request_id),
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "output": usage.completion_tokens,
            "reason": request.finish_reason if error is None else _reason(error),
            "queue": timings.queued_s,
            "first": "no token" if request.first_token_at == 0 else f"first token {timings.first_token_s:.3f} s",
            "total": timings.total_s,
        },
    )


def log_aborted_early(request_id: str, total_s: float) -> None:
    """Logs a request that was aborted while its prompt was prepared."""
    logger.info("request %s: abort while its prompt was prepared; total %.3f s", printable_id(request_id), total_s)


@contextmanager
def refusals_logged(request_id: str) -> Iterator[None]:
    """Logs an error of the body at WARNING: the request was refused before it could wait for its turn."""
    try:
        yield
    except HermesError as error:
        logger.warning("request %s: refused, %s", printable_id(request_id), _reason(error))
        raise


def _reason(error: HermesError) -> str:
    """The class of an error, and its message. Messages about a request may repeat parts of it, so they are left out."""
    name = type(error).__name__
    return name if isinstance(error, RequestError) else f"{name}: {' '.join(str(error).split())}"
