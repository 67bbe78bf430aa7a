"""Calls whose inputs are being tokenized and checked, each on a thread of its own that nobody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio

from hermes_async.engine.isolation import one_request
from hermes_async.errors import DeadlineExceededError, HermesError, RequestError

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

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

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
                result.append(await _on_a_thread(check, self._threads))
        finally:
            self._under_way.discard(preparation)
            preparation.ready.set()
        if preparation.error is not None:
            raise preparation.error
        if not result:
            raise DeadlineExceededError("the prompt was not tokenized before the request's deadline")
        return result[0]


async def _on_a_thread(check: Callable[[], T], threads: anyio.CapacityLimiter) -> T:
    """Calls `check` on a daemon thread, which gives its place in `threads` back when `check` has ended.

    anyio's own worker threads would give it back when the caller leaves, and keep the interpreter from exiting.
    """
    place = object()
    await threads.acquire_on_behalf_of(place)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    results: list[T] = []
    errors: list[BaseException] = []

    def report() -> None:
        threads.release_on_behalf_of(place)
        if not done.done():  # its caller is still there
            done.set_result(None)

    def run() -> None:
        try:
            with one_request("the preparation of the request"):
                results.append(check())
        except BaseException as error:
            errors.append(error)
        with contextlib.suppress(RuntimeError):  # the event loop was closed: nobody waits
            loop.call_soon_threadsafe(report)

    try:
        threading.Thread(target=run, name="preparation of a request", daemon=True).start()
    except RuntimeError as error:
        threads.release_on_behalf_of(place)
        raise RequestError(f"no thread can be started to prepare the request: {error}") from error
    await done
    if errors:
        raise errors.pop()
    return results.pop()
