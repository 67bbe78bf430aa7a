"""Notices that the disk hangs under the thread that opens a checkpoint.

That thread reads files itself and through libraries, and computes in between. So no single read of it can be watched.
Instead, its processor time is: while a thread waits for a disk, it uses none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import anyio

from hermes_async.errors import ReadTimeoutError
from hermes_async.storage.read_watch import SECONDS_UNTIL_WARNING, while_watched

T = TypeVar("T")

_log = logging.getLogger("hermes_async")

_LOOKS_PER_TIMEOUT = 4
_thread = threading.local()


class OpeningWatch:
    """Watches one thread. After ten seconds without processor time it warns, and after `timeout` it ends the waiting.

    It looks several times within this time. So a process that was stopped, or an event loop that was held up, does not
    make a thread look as if it hung. Where the system does not tell a thread's time (macOS), nothing is noticed.

    Args:
        source: What is opened.
        timeout: Seconds; None never ends the waiting.
    """

    def __init__(self, source: Path, timeout: float | None) -> None:
        self._source = source
        self._timeout = timeout
        # All mutable state. The thread sets it: the clock of its processor time, the file that it reads now, and
        # whether it waits for something else than the disk.
        self._clock: int | None = None
        self._file: Path | None = None
        self._waits_for_others = False

    def run(self, function: Callable[[], T]) -> T:
        """Calls `function` on this thread, which is watched meanwhile."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        _thread.watch = self
        try:
            return function()
        finally:
            self._clock = _thread.watch = None

    async def in_time(self, call: Awaitable[T]) -> T:
        """Waits for a call on the thread.

        Raises:
            ReadTimeoutError: The disk has not answered for `timeout` seconds. The call was cancelled.
            Exception: What the call raised.

        Cancellation: cancels the call.
        """
        return await while_watched(call, self._look)

    async def _look(self) -> None:
        step = min(SECONDS_UNTIL_WARNING, self._timeout or SECONDS_UNTIL_WARNING) / _LOOKS_PER_TIMEOUT
        spent, seconds, warned = self._spent(), 0.0, False
        while True:
            await anyio.sleep(step)
            before, spent = spent, self._spent()
            if spent is None or spent != before or self._waits_for_others:
                seconds, warned = 0.0, False
                continue
            seconds += step
            path = self._file or self._source
            if seconds >= SECONDS_UNTIL_WARNING and not warned:
                warned = True
                _log.warning(
                    "the disk does not answer: opening %s has waited for a read of %s for %.0f s",
                    self._source,
                    path,
                    seconds,
                )
            if self._timeout is not None and seconds >= self._timeout:
                raise ReadTimeoutError(
                    f"opening {self._source} has waited for a read of {path} for {seconds:.1f} s, and read_timeout is "
                    f"{self._timeout:g} s; the disk hangs, or is slower than that",
                    path=path,
                    offset=0,
                    seconds=seconds,
                )

    def _spent(self) -> float | None:
        """The thread's processor time in seconds; None while it does not work."""
        clock = self._clock
        if clock is None:
            return None
        try:
            return time.clock_gettime(clock)
        except OSError:  # it has just ended
            return None


@contextmanager
def reads_file(path: Path) -> Iterator[None]:
    """A block in which this thread reads a file, which its watch then names. It is not within another such block."""
    watch: OpeningWatch | None = getattr(_thread, "watch", None)
    if watch is None:
        yield
        return
    watch._file = path
    try:
        yield
    finally:
        watch._file = None


@contextmanager
def waits_for_others() -> Iterator[None]:
    """A block in which this thread waits for a network or another thread, for as long as that takes."""
    watch: OpeningWatch | None = getattr(_thread, "watch", None)
    if watch is None:
        yield
        return
    watch._waits_for_others = True
    try:
        yield
    finally:
        watch._waits_for_others = False
