"""A disk between the reader and the files, whose opens, reads and closes a test can hold, fail and count."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hermes_async.storage.shard import Shard


@dataclass(frozen=True)
class Read:
    """One read that is about to be done; calling it does it, of `most` bytes where that is given.

    Attributes:
        direct: Past the page cache.
    """

    direct: bool
    call: Callable[[int | None], int]

    def __call__(self, most: int | None = None) -> int:
        return self.call(most)


class Disk:
    """Whatever is called here may wait or raise.

    Attributes:
        on_open: Called by the reader's thread with the path, before a shard is opened.
        on_read: Called by the reader's thread with the path, the offset and the read; it returns the count.
        on_close: Called by the reader's thread with the path, before a shard is closed.
        opened_directly: Of each shard that was opened, whether past the page cache.
        paths: Of the shards that are open, by file descriptor.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on_open: Callable[[Path], None] = lambda path: None
        self.on_read: Callable[[Path, int, Read], int] = lambda path, offset, read: read()
        self.on_close: Callable[[Path], None] = lambda path: None
        self.opened_directly: list[bool] = []
        self.paths: dict[int, Path] = {}
        self._real_open, self._real_close, self._real_read = Shard.open, Shard.close, os.preadv
        patch.setattr(Shard, "open", self._open)
        patch.setattr(Shard, "close", lambda shard: self._close(shard))
        patch.setattr("hermes_async.storage.shard.os.preadv", self._read)

    @property
    def num_open(self) -> int:
        return len(self.paths)

    def _open(self, path: Path, *, direct: bool) -> Shard:
        self.on_open(path)
        shard = self._real_open(path, direct=direct)
        self.opened_directly.append(self._is_direct(shard.fd))
        self.paths[shard.fd] = path
        return shard

    def _close(self, shard: Shard) -> None:
        self.on_close(self.paths[shard.fd])
        del self.paths[shard.fd]
        self._real_close(shard)

    def _is_direct(self, fd: int) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))

    def _read(self, fd: int, views: list[memoryview], offset: int) -> int:
        if fd not in self.paths:  # not a shard
            return self._real_read(fd, views, offset)
        read = Read(self._is_direct(fd), lambda most: self._real_read(fd, first_bytes(views, most), offset))
        return self.on_read(self.paths[fd], offset, read)


def first_bytes(views: list[memoryview], most: int | None) -> list[memoryview]:
    """`views` without what is behind so many bytes."""
    if most is None:
        return views
    first = []
    for view in views:
        first.append(view[:most])
        most = max(0, most - len(view))
    return first
