"""Reads and writes of a soak's files that fail, are cut short or are late, now and then."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MADE_TO_FAIL = "made to fail by the soak"
"""In the text of every error that comes of such a fault."""

_FAULTS = {"read": ("fails", "is short", "is late"), "write": ("fails", "is short", "is late")}
_LONGEST_DELAY_S = 0.5


class FaultyFiles:
    """System calls for files below some folders, the next of which goes wrong when that was asked for.

    Attributes:
        done: How often each kind of fault happened.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(str(folder) for folder in folders)
        # All mutable state; threads take what the event loop asks for, under `_lock`.
        self._lock = threading.Lock()
        self._asked: dict[str, str] = {}
        self.done: Counter[str] = Counter()

    def ask(self, chosen: random.Random) -> None:
        """The next read or write goes wrong, in a random way."""
        kind = chosen.choice(list(_FAULTS))
        with self._lock:
            self._asked[kind] = chosen.choice(_FAULTS[kind])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A block in which calls of this process go wrong if that was asked for."""
        preadv, pwritev = os.preadv, os.pwritev

        def read(fd: int, views: Sequence[Any], offset: int, *flags: int) -> int:
            return self._transfer("read", fd, views, lambda some: preadv(fd, some, offset, *flags))

        def write(fd: int, views: Sequence[Any], offset: int, *flags: int) -> int:
            return self._transfer("write", fd, views, lambda some: pwritev(fd, some, offset, *flags))

        os.preadv, os.pwritev = read, write
        try:
            yield
        finally:
            os.preadv, os.pwritev = preadv, pwritev

    def _transfer(self, kind: str, fd: int, views: Sequence[Any], call: Callable[[Sequence[Any]], int]) -> int:
        how = self._taken(kind, fd)
        if how == "fails":
            raise OSError(errno.EIO if kind == "read" else errno.ENOSPC, MADE_TO_FAIL)
        if how == "is late":
            time.sleep(random.uniform(0, _LONGEST_DELAY_S))
        return call(_half(views) if how == "is short" else views)

    def _taken(self, kind: str, fd: int) -> str | None:
        if kind not in self._asked or not str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(self._folders):
            return None
        with self._lock:
            how = self._asked.pop(kind, None)
            if how is not None:
                self.done[f"{kind} {how}"] += 1
        return how


def _half(views: Sequence[Any]) -> list[memoryview]:
    """About the first half of the bytes, in whole pages, as a disk cuts reads and writes."""
    most = sum(len(view) for view in views) // 2 // mmap.PAGESIZE * mmap.PAGESIZE or mmap.PAGESIZE
    first = []
    for view in views:
        first.append(memoryview(view).cast("B")[:most])
        most -= len(first[-1])
    return [view for view in first if len(view)]
