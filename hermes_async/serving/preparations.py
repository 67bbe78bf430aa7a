"""Calls whose inputs are being tokenized and checked, each on a thread of its own that nobody has to wait for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio

from hermes_async.errors import DeadlineExceededError, HermesError, RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.storage.threads import run_in_thread

T = TypeVar("T")

_MAX_THREADS = 64


class PreparationAbortedError(Exception):
    """The request was aborted before it was prepared."""


@dataclass(eq=False)
class _Preparation:
    """A call that is prepared just now.

    Attributes:
        request_id: None where it is no request to generate.
        ready: Set when it is over.
        error: Why it was ended from outside.
    """

    request_id: str | None
    scope: anyio.CancelScope
    ready: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | PreparationAbortedError | None = None

    def end(self, error: HermesError | PreparationAbortedError) -> None:
        self.error = self.error or error
        self.scope.cancel()


class Preparations:
    """What is prepared just now. Event-loop side only.

    A text can take minutes, and no tokenizer can be interrupted. So whoever leaves a preparation (at its deadline, by
    `abort` or cancellation, or with the engine) leaves at once, and its thread goes on alone until the tokenizer
    returns. Such a thread keeps its place among `_MAX_THREADS`, and does not keep the interpreter from exiting.
    """

    def __init__(self) -> None:
        # All mutable state.
        self._under_way: set[_Preparation] = set()
        self._threads = anyio.CapacityLimiter(_MAX_THREADS)

    @property
    def num_requests(self) -> int:
        """Requests to generate that are prepared just now."""
        return sum(preparation.request_id is not None for preparation in self._under_way)

    def is_under_way(self, request_id: str) -> bool:
        return any(preparation.request_id == request_id for preparation in self._under_way)

    def abort(self, request_id: str) -> bool:
        """Ends the preparation of a request with `PreparationAbortedError`; False if there is none."""
        for preparation in tuple(self._under_way):
            if preparation.request_id == request_id:
                self._under_way.remove(preparation)
                preparation.end(PreparationAbortedError())
                return True
        return False

    def end(self, error: HermesError) -> None:
        """Ends all that is prepared."""
        for preparation in self._under_way:
            preparation.end(error)

    async def wait(self) -> None:
        """Waits for all that is prepared now, and for nothing that comes later."""
        for preparation in tuple(self._under_way):
            await preparation.ready.wait()

    async def run(self, check: Callable[[], T], request_id: str | None = None, deadline: float | None = None) -> T:
        """Calls `check` on a thread, as soon as there is one.

        Raises:
            PreparationAbortedError: `abort` was called.
            DeadlineExceededError: The deadline passed.
            RequestError: `check` raised what is no error of ours.
            HermesError: That of `end`.

        Cancellation: at once; the thread goes on until `check` ends, and its result is dropped.
        """
        scope = anyio.CancelScope(deadline=math.inf if deadline is None else deadline)
        preparation = _Preparation(request_id, scope)
        self._under_way.add(preparation)
        result: list[T] = []
        try:
            with scope:
                result.append(await self._on_a_thread(check))
        finally:
            self._under_way.discard(preparation)
            preparation.ready.set()
        if preparation.error is not None:
            raise preparation.error
        if not result:
            raise DeadlineExceededError("the prompt was not tokenized before the request's deadline")
        return result[0]

    async def _on_a_thread(self, check: Callable[[], T]) -> T:
        """Calls `check` on a thread that nobody has to wait for, nor the interpreter's exit."""
        try:
            return await run_in_thread(
                _checked, check, abandon_on_cancel=True, left_at_exit=True, limiter=self._threads
            )
        except RuntimeError as error:  # never of `check`
            raise RequestError(f"no thread can be started to prepare the request: {error}") from error


def _checked(check: Callable[[], T]) -> T:
    with one_request("the preparation of the request"):
        return check()
