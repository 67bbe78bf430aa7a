"""Threads that compute the rows of one matrix together, with functions that release the interpreter's lock.

They are no OpenMP threads. Functions of torch share each operator among OpenMP's threads, and a small operator gains
little by that. These threads share a whole product instead.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeAlias

Part: TypeAlias = Callable[[int, int], None]
"""Computes some rows. Takes the first row, and the row behind the last."""

_FEWEST_ROWS = 48
"""Fewer are not worth the time in which a thread wakes."""


class RowThreads:
    """Some threads, of which the caller's is one. It is used by one thread at a time.

    The others are started when they are needed. They wait between two products, and use no processor then.

    Args:
        count: How many, with that of the caller.
    """

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        # All mutable state: the threads that run, with a queue of parts for each, and what has come of the parts.
        self._parts: list[queue.SimpleQueue[Callable[[], None] | None]] = []
        self._threads: list[threading.Thread] = []
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def divide(self, num_rows: int, part: Part) -> None:
        """Calls `part` for all rows, on several threads at once; returns when all are done.

        Each thread takes some of the rows, and then the next ones. So one whose processor is slower computes fewer.

        Args:
            part: Must release the interpreter's lock while it computes, and use nothing of torch.

        Raises:
            Exception: What `part` raised.
        """
        count = max(1, min(self.count, num_rows // _FEWEST_ROWS))
        shares = iter(_shares(num_rows, count))  # taking the next one is one operation of the interpreter

        def take() -> None:
            for first, last in shares:
                part(first, last)

        self._start(count - 1)
        for parts in self._parts[: count - 1]:
            parts.put(take)
        try:
            take()
        finally:  # the memory that the parts use is the caller's
            errors = [self._ended.get() for _ in range(1, count)]
        for error in errors:
            if error is not None:
                raise error

    def _start(self, count: int) -> None:
        while len(self._threads) < count:
            parts: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
            name = f"hermes rows {len(self._threads)}"
            thread = threading.Thread(target=self._run, args=(parts,), name=name, daemon=True)
            thread.start()
            self._parts.append(parts)
            self._threads.append(thread)

    def _run(self, parts: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (part := parts.get()) is not None:
            error = None
            try:
                part()
            except BaseException as raised:  # raised again by `divide`
                error = raised
            del part
            self._ended.put(error)

    def close(self) -> None:
        """Ends the threads."""
        for parts in self._parts:
            parts.put(None)
        for thread in self._threads:
            thread.join()
        self._parts, self._threads = [], []


def _shares(num_rows: int, count: int) -> list[tuple[int, int]]:
    """The rows that threads take: first and last (exclusive).

    A thread takes its part of half of the rows that are left. So threads take rows a few times, and end at almost the
    same time.
    """
    shares, first = [], 0
    while first < num_rows:
        left = num_rows - first
        rows = left if count == 1 else min(left, max(_FEWEST_ROWS, left // (2 * count)))
        shares.append((first, first + rows))
        first += rows
    return shares


ONE_THREAD = RowThreads(1)
"""The caller's alone."""
