"""Threads of our own, on which functions are called and files are read.

All are daemons; `storage/interpreter_exit.py` says why, and for which of them the interpreter's exit waits.
"""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.lowlevel

from hermes_async.storage.interpreter_exit import (
    given_up_thread_returned,
    native_code,
    no_native_code,
    thread_given_up,
    when_interpreter_exits,
)
from hermes_async.storage.kernel_threads import end_kernel_threads

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_SECONDS_IDLE = 10.0
"""A worker thread that had no call for so long ends."""

SECONDS_UNTIL_GIVEN_UP = 0.25
"""So long a cancelled call waits for its thread. A thread that waits for a disk that hangs may not return for minutes,
and an engine must be left within a second, although several calls may have to be given up one after another."""


# --- calls on a thread ---


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Call:
    """A call on a worker thread, and then its result or error.

    Attributes:
        left_at_exit: The interpreter's exit does not wait for it.
        limiter: The call has one of its places until it ends.
        cancelled: The task that waits for it was cancelled, or the interpreter exits.
        lock: Guards `has_run` and `then`, what the thread does when a call that was given up has run.
    """

    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    left_at_exit: bool
    limiter: anyio.CapacityLimiter | None
    cancelled: bool = False
    result: Any = None
    error: BaseException | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    has_run: bool = False
    then: Callable[[], None] | None = None

    def run(self) -> None:
        """Sets `result` or `error`; called by the worker thread."""
        with nullcontext() if self.left_at_exit else native_code():
            _thread.call = self
            try:
                self.result = self.function()
            except BaseException as error:  # raised again where the call is awaited
                self.error = error
            finally:
                _thread.call = None
            end_kernel_threads()
            with self.lock:
                self.has_run = True
            if self.then is not None:
                self.then()
                if not self.left_at_exit:
                    given_up_thread_returned()

    def give_up(self, then: Callable[[], None]) -> None:
        """Has the thread call `then` when the call has run; does nothing if it has run already."""
        with self.lock:
            if not self.has_run:
                self.then = then
                if not self.left_at_exit:
                    thread_given_up()

    def end(self) -> None:
        """Called on the event loop when the call has run, or no thread could be started for it."""
        if self.limiter is not None:
            self.limiter.release_on_behalf_of(self)
        self.done.set()

    def interpreter_exits(self) -> None:
        """Keeps the memory that the thread may still write to: the interpreter frees it at exit otherwise."""
        self.cancelled = True
        if not self.has_run:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))


class _Worker(threading.Thread):
    """Runs one call after another; ends when there was none for a while."""

    def __init__(self) -> None:
        super().__init__(name="worker of hermes_async", daemon=True)
        self.calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()

    def run(self) -> None:
        while (call := self._next_call()) is not None:
            call.run()
            _idle.append(self)
            with suppress(RuntimeError):  # the loop was closed: nobody waits
                call.loop.call_soon_threadsafe(call.end)
            del call

    def _next_call(self) -> _Call | None:
        with suppress(queue.Empty):
            return self.calls.get(timeout=_SECONDS_IDLE)
        with suppress(ValueError):
            _idle.remove(self)
            return None
        return self.calls.get()  # it was taken in between


_idle: deque[_Worker] = deque()
_thread = threading.local()


async def run_in_thread(
    function: Callable[[Unpack[Ts]], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    left_at_exit: bool = False,
    limiter: anyio.CapacityLimiter | None = None,
    when_given_up: Callable[[], None] | None = None,
) -> T:
    """Calls `function` on a thread of our own, so that other calls of the application cannot occupy all threads.

    Args:
        abandon_on_cancel: A cancelled call ends at once. Its thread goes on, and the result is dropped.
        left_at_exit: The interpreter's exit does not wait for the call. For calls that wait for files and use no native
            code that takes the interpreter's lock by itself, and for calls that may take minutes, such as tokenizing.
        limiter: Bounds how many calls are under way; abandoned ones count until their threads are done.
        when_given_up: A cancelled call that does not end soon is given up, because its thread may wait for a disk that
            hangs. The thread calls this when it comes back, to close what the call has made.

    Raises:
        RuntimeError: No thread can be started; or what `function` raises.

    Cancellation: waits for the call to end, and drops its result. The call may use `check_cancelled` to end early. With
    `when_given_up`, it waits no longer than a fraction of a second.
    """
    await anyio.lowlevel.checkpoint()
    call = _Call(partial(function, *args), asyncio.get_running_loop(), left_at_exit, limiter)
    if limiter is not None:
        await limiter.acquire_on_behalf_of(call)
    when_interpreter_exits(call)
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        try:
            worker.start()
        except RuntimeError:
            call.end()
            raise
    worker.calls.put(call)
    try:
        await call.done.wait()
    except anyio.get_cancelled_exc_class():
        call.cancelled = True
        if when_given_up is not None:
            try:
                with anyio.move_on_after(SECONDS_UNTIL_GIVEN_UP, shield=True):
                    await call.done.wait()
            finally:
                call.give_up(when_given_up)
        elif not abandon_on_cancel:
            with anyio.CancelScope(shield=True):
                await call.done.wait()
        raise
    try:
        if call.error is not None:
            raise call.error
        result: T = call.result
        return result
    finally:
        del call  # else a cycle: the call has the error, and the error has this frame


class CallCancelled(BaseException):
    """Unwinds a thread from a call that nobody waits for any more. It never leaves `run_in_thread`."""


def check_cancelled() -> None:
    """Raises `CallCancelled` if this thread runs a call of `run_in_thread` that was cancelled, or at exit."""
    call: _Call | None = getattr(_thread, "call", None)
    if call is not None and call.cancelled:
        raise CallCancelled


def tells_cancelled() -> Callable[[], bool]:
    """Says, on any thread, whether the call of `run_in_thread` that this thread runs was cancelled."""
    call: _Call | None = getattr(_thread, "call", None)
    return lambda: call is not None and call.cancelled


@contextmanager
def only_waiting() -> Iterator[None]:
    """A block that waits and calls no native code: the interpreter's exit does not wait for this thread there.

    It may be within another such block.
    """
    call: _Call | None = getattr(_thread, "call", None)
    if call is None or call.left_at_exit or getattr(_thread, "only_waits", False):
        yield
        return
    _thread.only_waits = True
    try:
        with no_native_code():
            yield
    finally:
        _thread.only_waits = False


class LoopEvent:
    """An event that any thread may set. Tasks of the event loop that it was made on wait for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = anyio.Event()

    def set(self) -> None:
        """Sets the event soon, on its loop. Does not wait; does nothing if the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Waits until the event is set. Cancellation: leaves the event as it is."""
        await self._event.wait()


# --- reads ---


async def finished_or_given_up(future: asyncio.Future[T]) -> T:
    """Waits for a call on a thread of an executor, and returns its result.

    Args:
        future: Of an `Executor`'s call, or a task that only waits for one. It belongs to this call.

    Raises:
        Exception: What the call raised.

    Cancellation: waits for the thread for a fraction of a second, and then gives it up: it goes on with the call, but
    nobody waits for it, and another thread takes its place (see `DaemonExecutor`).
    """
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([future], timeout=SECONDS_UNTIL_GIVEN_UP)
                if future.cancel():
                    await asyncio.wait([future])  # a task ends a moment later
        finally:
            if not future.cancel() and not future.cancelled():
                _close_result(future)
        raise
    return future.result()


class DaemonExecutor(Executor):
    """Threads for calls that only wait for files; the interpreter's exit waits for none of them.

    If a future is cancelled while its call is under way, the call goes on, its thread is given up, and another thread
    takes its place. If the call then returns something that can be closed, it is closed. An executor is used by one
    thread.

    Args:
        max_workers: The most calls under way, without those of threads that were given up.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers = max_workers
        self._name = name
        # All mutable state: the calls that no thread has taken; the threads that are not given up; how many there were.
        self._works: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads: list[_Reading] = []
        self._num_made = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        work = _Work(partial(fn, *args, **kwargs), self)
        self._works.put(work)
        if len(self._threads) < self._max_workers:
            self._start_thread()
        return work

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends all threads; those that were given up end with their calls. No other call may be under way."""
        threads, self._threads, self._max_workers = self._threads, [], 0
        for _ in threads:
            self._works.put(None)
        for thread in threads:
            thread.join()

    def give_up(self, work: _Work) -> None:
        """Replaces the thread that runs `work`, which nobody waits for any more."""
        for thread in self._threads:
            if thread.work is work:
                thread.given_up = True
                self._threads.remove(thread)
                self._start_thread()
                return

    def _start_thread(self) -> None:
        thread = _Reading(f"{self._name}_{self._num_made}", self._works)
        self._num_made += 1
        self._threads.append(thread)
        thread.start()


class _Work(Future[Any]):
    """One call of an executor."""

    def __init__(self, function: Callable[[], Any], executor: DaemonExecutor) -> None:
        super().__init__()
        self._function = function
        self._executor = executor

    def run(self) -> None:
        if not self.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:  # raised again where the call is awaited
            self.set_exception(error)
        else:
            self.set_result(result)

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if not cancelled:
            if self.running():
                self._executor.give_up(self)
            self.add_done_callback(_close_result)
        return cancelled


def _close_result(call: Future[Any] | asyncio.Future[Any]) -> None:
    """Closes what a call has made that nobody waits for any more, such as an open file."""
    if call.exception() is None and hasattr(call.result(), "close"):
        call.result().close()


class _Reading(threading.Thread):
    """A thread of an executor, which runs `work`."""

    def __init__(self, name: str, works: queue.SimpleQueue[_Work | None]) -> None:
        super().__init__(name=name, daemon=True)
        self._works = works
        self.work: _Work | None = None
        self.given_up = False
        when_interpreter_exits(self)

    def interpreter_exits(self) -> None:
        """Keeps the memory that this thread may still write to: the interpreter frees it at exit otherwise."""
        if self.work is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.work))

    def run(self) -> None:
        while not self.given_up and (work := self._works.get()) is not None:
            self.work = work
            work.run()
            self.work = None
            del work  # it refers to the memory that it has read into
