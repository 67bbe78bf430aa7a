"""Calls whose inputs are being tokenized and checked, each on a thread that its caller can abandon."""

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

MAX_SECONDS = 900.0
"""What a preparation may take, with the time that it waits for a thread. A checkpoint's expression may never end."""


class PreparationAbortedError(Exception):
    """The request was aborted before it was prepared."""


@dataclass(eq=False)
class _Preparation:
    """A call that is being prepared.

    Attributes:
        request_id: None if the call does not generate.
        ready: Set when the preparation has ended.
        error: Why it was ended early.
    """

    request_id: str | None
    scope: anyio.CancelScope
    ready: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | PreparationAbortedError | None = None

    def end(self, error: HermesError | PreparationAbortedError) -> None:
        self.error = self.error or error
        self.scope.cancel()


class Preparations:
    """All calls that are being prepared. Event-loop side only.

    A text can take minutes, and no tokenizer can be interrupted. So a call that ends early (at its deadline, by `abort`
    or cancellation, after `MAX_SECONDS`, or with the engine) ends at once, and its thread runs on until the tokenizer
    returns. Such a thread still counts towards `_MAX_THREADS`. It does not delay the interpreter's exit.
    """

    def __init__(self) -> None:
        # All mutable state: the calls, those of them that generate, by the request's id, and the threads.
        self._under_way: set[_Preparation] = set()
        self._of_requests: dict[str, _Preparation] = {}
        self._threads = anyio.CapacityLimiter(_MAX_THREADS)

    @property
    def num_requests(self) -> int:
        """Requests that are being prepared; other calls do not count."""
        return len(self._of_requests)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the requests that are being prepared, in the order in which they came."""
        return tuple(self._of_requests)

    def is_under_way(self, request_id: str) -> bool:
        return request_id in self._of_requests

    def abort(self, request_id: str) -> bool:
        """Ends the preparation of a request with `PreparationAbortedError`; False if there is none."""
        preparation = self._of_requests.get(request_id)
        if preparation is None:
            return False
        self._remove(preparation)
        preparation.end(PreparationAbortedError())
        return True

    def end(self, error: HermesError) -> None:
        """Ends all preparations."""
        for preparation in self._under_way:
            preparation.end(error)

    async def wait(self) -> None:
        """Waits for the preparations that are under way now, and not for later ones."""
        for preparation in tuple(self._under_way):
            await preparation.ready.wait()

    async def run(self, check: Callable[[], T], request_id: str | None = None, deadline: float | None = None) -> T:
        """Calls `check` on a thread, once one is free.

        Args:
            request_id: Of no other request that is being prepared; None if the call does not generate.

        Raises:
            PreparationAbortedError: `abort` was called.
            DeadlineExceededError: The deadline passed.
            RequestError: `check` raised another library's error, or took more than `MAX_SECONDS`.
            HermesError: The error given to `end`.

        Cancellation: at once; the thread runs on until `check` returns, and the result is dropped.
        """
        ends_at = anyio.current_time() + MAX_SECONDS
        scope = anyio.CancelScope(deadline=min(ends_at, math.inf if deadline is None else deadline))
        preparation = _Preparation(request_id, scope)
        self._under_way.add(preparation)
        if request_id is not None:
            self._of_requests[request_id] = preparation
        result: list[T] = []
        try:
            with scope:
                result.append(await self._on_a_thread(check))
        finally:
            self._remove(preparation)
            preparation.ready.set()
        if preparation.error is not None:
            raise preparation.error
        if not result and (deadline is None or deadline > ends_at):
            raise RequestError(
                f"the prompt was not tokenized in {MAX_SECONDS:g} seconds; a regular expression of the checkpoint's "
                "tokenizer may take for ever with it"
            )
        if not result:
            raise DeadlineExceededError("the prompt was not tokenized before the request's deadline")
        return result[0]

    def _remove(self, preparation: _Preparation) -> None:
        """Its id may be that of another request by now."""
        self._under_way.discard(preparation)
        if preparation.request_id is not None and self._of_requests.get(preparation.request_id) is preparation:
            del self._of_requests[preparation.request_id]

    async def _on_a_thread(self, check: Callable[[], T]) -> T:
        """Calls `check` on a thread that neither cancellation nor the interpreter's exit waits for."""
        try:
            return await run_in_thread(
                _checked, check, abandon_on_cancel=True, left_at_exit=True, limiter=self._threads
            )
        except RuntimeError as error:  # of the thread's start: `_checked` raises no RuntimeError
            raise RequestError(f"no thread can be started to prepare the request: {error}") from error


def _checked(check: Callable[[], T]) -> T:
    with one_request("the preparation of the request"):
        return check()
