"""The exit of the interpreter: it waits for threads in native code, and for no others.

The interpreter waits at exit for a thread that is no daemon, even if that thread waits for a disk that hangs, or for an
event loop that does not run any more. A daemon thread is ended when it next wants the interpreter's lock; where C++ or
Rust code wants the lock (torch, tokenizers), that aborts the process. So all threads of this package are daemons, and
the exit waits for those that may be in such code, until they are done or wait themselves. It does not wait long for
those that were given up: they are likely to wait for a disk that hangs.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_FOR_GIVEN_UP = 1.0


class ToldOfExit(Protocol):
    """Has something to do before the interpreter exits, such as to wake a thread of its own."""

    def interpreter_exits(self) -> None: ...


class _Exit:
    """Counts the threads that the exit waits for."""

    def __init__(self) -> None:
        # All mutable state, guarded by `_changed`: how many threads may be in native code, how many of them were given
        # up, and whether the exit has begun. `told` has those that the exit tells.
        self._changed = threading.Condition()
        self._num_inside = 0
        self._num_given_up = 0
        self._has_begun = False
        self.told: weakref.WeakSet[ToldOfExit] = weakref.WeakSet()

    def enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._has_begun)
            self._num_inside += 1

    def leave(self) -> None:
        with self._changed:
            self._num_inside -= 1
            self._changed.notify_all()

    def give_up(self, num_more: int) -> None:
        with self._changed:
            self._num_given_up += num_more
            self._changed.notify_all()

    def begin(self) -> None:
        """Called at exit: returns when no thread is in native code, and none will be, but for those given up."""
        self._has_begun = True
        for each in list(self.told):
            each.interpreter_exits()
        with self._changed:
            self._changed.wait_for(lambda: self._num_inside <= self._num_given_up)
            self._changed.wait_for(lambda: not self._num_inside, _SECONDS_FOR_GIVEN_UP)

    def forget(self) -> None:
        """In a forked process, which has none of these threads."""
        self.__init__()  # type: ignore[misc]


_exit = _Exit()
atexit.register(_exit.begin)
os.register_at_fork(after_in_child=_exit.forget)


def when_interpreter_exits(each: ToldOfExit) -> None:
    """`each.interpreter_exits()` is called at exit, if `each` still exists."""
    _exit.told.add(each)


def thread_given_up() -> None:
    """Nobody waits any more for a thread that is in a `native_code` block: the exit does not wait long for it."""
    _exit.give_up(1)


def given_up_thread_returned() -> None:
    """Called by such a thread before it leaves the block."""
    _exit.give_up(-1)


@contextmanager
def native_code() -> Iterator[None]:
    """The exit waits for the block. Once the exit has begun, entering the block never returns."""
    _exit.enter()
    try:
        yield
    finally:
        _exit.leave()


@contextmanager
def no_native_code() -> Iterator[None]:
    """Part of a `native_code` block that the exit does not wait for; it only waits, and calls no native code."""
    _exit.leave()
    try:
        yield
    finally:
        _exit.enter()
