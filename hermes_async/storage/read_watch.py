"""Which reads threads are at, and which of them hang: a warning after ten seconds, and an error after a timeout."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio

from hermes_async.errors import ReadTimeoutError
from hermes_async.foreign_errors import ungrouped

T = TypeVar("T")

_log = logging.getLogger("hermes_async")

SECONDS_UNTIL_WARNING = 10.0
_SHORTEST_WAIT = 0.01


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """Where a thread reads or writes, and since when, on the clock of `time.monotonic`."""

    path: Path
    offset: int
    since: float
    doing: str


@dataclass(eq=False, slots=True)
class ReadUnderWay:
    """A call that reads or writes on a thread.

    Attributes:
        views: The memory that the thread uses; empty while it opens a file.
        place: Set by the thread; None between two reads.
        warned_of: The place that was logged last.
    """

    views: Sequence[memoryview]
    place: _Place | None = None
    warned_of: _Place | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _has_returned: bool = False
    _then: Callable[[], None] | None = None

    @contextmanager
    def at(self, path: Path, offset: int, doing: str = "a read") -> Iterator[None]:
        """A block in which the thread makes one system call, which reads or writes from `offset` on."""
        self.place = _Place(path, offset, time.monotonic(), doing)
        try:
            yield
        finally:
            self.place = None

    def when_returned(self, then: Callable[[], None]) -> None:
        """Has `then` called when the thread has returned: by that thread, or now."""
        with self._lock:
            if not self._has_returned:
                self._then = then
                return
        then()

    def end(self) -> None:
        """The thread has returned; called by it."""
        with self._lock:
            self._has_returned = True
        if self._then is not None:
            self._then()


class ReadWatch:
    """Watches the reads of one reader.

    Reads are entered by their threads. So a read counts until its thread has returned, even if nobody waits for it.

    Args:
        timeout: Seconds after which a read is overdue; None if it never is.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        # All mutable state: the reads under way, which `_lock` guards, and the timer of the next look at them.
        self._lock = threading.Lock()
        self._under_way: set[ReadUnderWay] = set()
        self._timer: asyncio.TimerHandle | None = None

    # --- on the threads that read ---

    @contextmanager
    def reading(self, *views: memoryview) -> Iterator[ReadUnderWay]:
        """A block in which a thread reads into these views, writes them to a file, or opens one."""
        read = ReadUnderWay(views)
        with self._lock:
            self._under_way.add(read)
        try:
            yield read
        finally:
            with self._lock:
                self._under_way.discard(read)
            read.end()

    # --- on any thread ---

    @property
    def under_way(self) -> list[ReadUnderWay]:
        """The reads whose threads have not returned."""
        with self._lock:
            return list(self._under_way)

    def overdue(self) -> ReadTimeoutError | None:
        """The error of the read that hangs for the longest time; None if none is overdue."""
        place = min(self._places(), key=lambda place: place.since, default=None)
        seconds = 0.0 if place is None else time.monotonic() - place.since
        if place is None or self.timeout is None or seconds < self.timeout:
            return None
        return ReadTimeoutError(
            f"{place.doing} at offset {place.offset} of {place.path} has not come back for {seconds:.1f} s, and "
            f"read_timeout is {self.timeout:g} s; the disk hangs, or is slower than that",
            path=place.path,
            offset=place.offset,
            seconds=seconds,
        )

    def seconds_left(self) -> float | None:
        """Until a read may be overdue; None if none ever is."""
        if self.timeout is None:
            return None
        now = time.monotonic()
        since = min((place.since for place in self._places()), default=now)
        return max(_SHORTEST_WAIT, since + self.timeout - now)

    def _places(self) -> list[_Place]:
        return [place for read in self.under_way if (place := read.place) is not None]

    # --- on the event loop ---

    async def in_time(self, call: Awaitable[T]) -> T:
        """Waits for a call that reads on a thread.

        Raises:
            ReadTimeoutError: It has taken `timeout` seconds, and a read is overdue. The call was cancelled.
            Exception: What the call raised.

        Cancellation: cancels the call.
        """
        return await while_watched(call, partial(self.wait, anyio.Event()))

    async def wait(self, event: anyio.Event) -> None:
        """Waits for an event that a read sets.

        Raises:
            ReadTimeoutError: It was not set for `timeout` seconds, and a read is overdue.
        """
        seconds = self.timeout
        while not event.is_set():
            with anyio.move_on_after(seconds):
                await event.wait()
                return
            error = self.overdue()
            if error is not None:
                raise error
            seconds = self.seconds_left()

    def warn_later(self) -> None:
        """Has a warning logged of each read that takes ten seconds. Called when a read begins."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SECONDS_UNTIL_WARNING, self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        waits: list[float] = []
        for read in self.under_way:
            place = read.place
            if place is None or place is read.warned_of:
                waits.append(SECONDS_UNTIL_WARNING)
            elif now - place.since >= SECONDS_UNTIL_WARNING:
                read.warned_of = place
                waits.append(SECONDS_UNTIL_WARNING)
                _log.warning(
                    "the disk does not answer: %s at offset %d of %s has not come back for %.0f s",
                    place.doing,
                    place.offset,
                    place.path,
                    now - place.since,
                )
            else:
                waits.append(place.since + SECONDS_UNTIL_WARNING - now)
        if waits:
            seconds = max(_SHORTEST_WAIT, min(waits))
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def close(self) -> None:
        """Ends the warnings."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def while_watched(call: Awaitable[T], watch: Callable[[], Coroutine[Any, Any, None]]) -> T:
    """Waits for a call. `watch` runs meanwhile: if it raises, the call is cancelled.

    Raises:
        Exception: What the call or `watch` raised.

    Cancellation: cancels the call.
    """
    watching = watch()
    try:
        with ungrouped():
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: watching)
                result = await call
                group.cancel_scope.cancel()
    finally:
        # asyncio.run cancels every task when the program fails, even one that has not begun. anyio 4.16 forgets the
        # coroutine of such a task, and Python would warn that nobody awaited it.
        if inspect.getcoroutinestate(watching) == inspect.CORO_CREATED:
            watching.close()
    return result
