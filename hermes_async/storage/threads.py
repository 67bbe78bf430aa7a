"""Threads of our own: none keeps the interpreter from its exit, and none is in native code when it exits.

A thread that is no daemon is waited for at exit, also where it waits for a disk that hangs, or for an event loop that
does not run any more. A daemon is ended when it wants the interpreter's lock again, and where C++ or Rust code wants
it (torch, tokenizers), that aborts the process. So all threads here are daemons, and the exit waits for those that may
be in such code, until they are done or wait themselves.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.lowlevel

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_SECONDS_IDLE = 10.0  # after which a thread that nothing was asked of ends


class _InterpreterExit:
    """Counts what the exit waits for, and ends it."""

    def __init__(self) -> None:
        # All mutable state: how many threads may be in native code; the exit has begun; what wakes threads that wait;
        # who reads.
        self._changed = threading.Condition()
        self._num_inside = 0
        self._begun = False
        self.on_exit: weakref.WeakSet[Any] = weakref.WeakSet()

    def enter(self) -> None:
        """Called before native code; never returns once the exit has begun."""
        with self._changed:
            self._changed.wait_for(lambda: not self._begun)
            self._num_inside += 1

    def leave(self) -> None:
        with self._changed:
            self._num_inside -= 1
            self._changed.notify_all()

    def begin(self) -> None:
        """Called at exit: returns when no thread is in native code, and none will be."""
        self._begun = True
        for each in list(self.on_exit):
            each.interpreter_exits()
        with self._changed:
            self._changed.wait_for(lambda: not self._num_inside)

    def forget(self) -> None:
        """In a forked process, which has none of these threads."""
        self.__init__()  # type: ignore[misc]


_exit = _InterpreterExit()
atexit.register(_exit.begin)
os.register_at_fork(after_in_child=_exit.forget)


def when_interpreter_exits(each: Any) -> None:
    """`each.interpreter_exits()` is called at exit, if it still exists; it wakes threads that wait for something."""
    _exit.on_exit.add(each)


# --- calls on a thread ---


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Call:
    """A call on a worker thread, and then what came of it.

    Attributes:
        left_at_exit: The interpreter's exit does not wait for it.
        limiter: Of which it has a place.
        cancelled: Whoever waits for it was cancelled.
    """

    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    left_at_exit: bool
    limiter: anyio.CapacityLimiter | None
    cancelled: bool = False
    result: Any = None
    error: BaseException | None = None
    done: anyio.Event = field(default_factory=anyio.Event)

    def run(self) -> None:
        if not self.left_at_exit:
            _exit.enter()
        _thread.call = self
        try:
            self.result = self.function()
        except BaseException as error:  # raised again where the call is awaited
            self.error = error
        finally:
            _thread.call = None
            if not self.left_at_exit:
                _exit.leave()

    def end(self) -> None:
        """Called on the event loop when it has run, or cannot."""
        if self.limiter is not None:
            self.limiter.release_on_behalf_of(self)
        self.done.set()

    def interpreter_exits(self) -> None:
        self.cancelled = True


class _Worker(threading.Thread):
    """Runs one call after another, and ends when there was none for a while."""

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
) -> T:
    """Calls `function` on a thread of our own, which the application's own calls cannot take from us.

    Args:
        abandon_on_cancel: A cancelled call ends at once; the thread goes on, and what it returns is dropped.
        left_at_exit: The interpreter's exit does not wait for the call: it waits for files and the like, and calls no
            native code that takes the interpreter's lock by itself; or it may take minutes, as tokenizing does.
        limiter: Bounds how many calls are under way, those that were abandoned too.

    Raises:
        RuntimeError: No thread can be started; or what `function` raises.

    Cancellation: waits for the call to end, which may use `check_cancelled`; what it returns is dropped.
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
        if not abandon_on_cancel:
            with anyio.CancelScope(shield=True):
                await call.done.wait()
        raise
    try:
        if call.error is not None:
            raise call.error
        result: T = call.result
        return result
    finally:
        del call  # it has the error, which has this frame


class CallCancelled(BaseException):
    """Unwinds a thread from a call that nobody waits for any more; never leaves `run_in_thread`."""


def check_cancelled() -> None:
    """Raises `CallCancelled` where this thread's call was cancelled, or the interpreter exits; others go on."""
    call: _Call | None = getattr(_thread, "call", None)
    if call is not None and call.cancelled:
        raise CallCancelled


@contextmanager
def only_waiting() -> Iterator[None]:
    """Within the block, which calls no native code, the interpreter's exit does not wait for this thread."""
    call: _Call | None = getattr(_thread, "call", None)
    if call is None or call.left_at_exit:
        yield
        return
    _exit.leave()
    try:
        yield
    finally:
        _exit.enter()


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


class DaemonExecutor(Executor):
    """Threads for calls that only wait for files; the interpreter's exit waits for none of them.

    A call whose future is cancelled while it is under way goes on, and its thread is given up: another takes its place.
    Used by one thread.

    Args:
        max_workers: Most calls under way, those of threads that were given up not counted.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers = max_workers
        self._name = name
        # All mutable state: what is to be called; the threads that are not given up.
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
        """Ends all threads but those that were given up, which end with their calls. No other call is under way."""
        threads, self._threads, self._max_workers = self._threads, [], 0
        for _ in threads:
            self._works.put(None)
        for thread in threads:
            thread.join()

    def give_up(self, work: _Work) -> None:
        """Nobody waits for `work`, which is under way, any more."""
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
    """One call, for an executor."""

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
        if not cancelled and self.running():
            self._executor.give_up(self)
        return cancelled


class _Reading(threading.Thread):
    """A thread of an executor; `work` is under way."""

    def __init__(self, name: str, works: queue.SimpleQueue[_Work | None]) -> None:
        super().__init__(name=name, daemon=True)
        self._works = works
        self.work: _Work | None = None
        self.given_up = False
        when_interpreter_exits(self)

    def interpreter_exits(self) -> None:
        """The interpreter then frees what this thread refers to, while the thread may still write there."""
        if self.work is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.work))

    def run(self) -> None:
        while not self.given_up and (work := self._works.get()) is not None:
            self.work = work
            work.run()
            self.work = None
            del work  # and with it the memory that it has read into
