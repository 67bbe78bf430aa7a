"""Reads byte ranges of shards into buffers: aiofiles, direct I/O, a thread pool of its own.

The only place that reads weights, imports aiofiles, and turns an `OSError` of a read into one of our errors.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiofiles
import anyio
import anyio.lowlevel
import anyio.to_thread

from hermes_async.errors import ReadError, ShortReadError
from hermes_async.storage.buffers import align_down, align_up

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class ReadRange:
    """`nbytes` bytes of `file` from `offset`, to be found at `position` of a buffer after the read.

    `offset` and `position` are equal modulo 4096 (`ALIGNMENT`), so a direct read can start at the block before.
    """

    file: Path
    offset: int
    nbytes: int
    position: int


@dataclass(slots=True)
class ReadStatistics:
    """What the readers have read so far.

    Attributes:
        seconds: The readers' own times added up, which overlap.
    """

    bytes_read: int = 0
    num_reads: int = 0
    seconds: float = 0.0


class _Handle:
    """One open shard of one reader; seek and readinto share its position, so no two reads use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None
        self.direct = False
        self.position = 0


class Reader:
    """Reads ranges one after another, through one handle for each shard; use one reader for each parallel stream.

    Owned with `async with`: leaving closes its files. Reads bypass the page cache where the file system allows it;
    elsewhere they are buffered and the cache is dropped behind them.
    """

    def __init__(self, executor: ThreadPoolExecutor, statistics: ReadStatistics, *, direct: bool = True) -> None:
        self._executor = executor
        self._statistics = statistics
        self._direct = direct and bool(_O_DIRECT)
        self._handles: dict[Path, _Handle] = {}
        self._advice_limiter = anyio.CapacityLimiter(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            while self._handles:
                await self._handles.popitem()[1].file.close()

    async def open(self, files: Sequence[Path]) -> None:
        """Opens every shard now, so that one that is renamed or removed later can still be read.

        Raises:
            ReadError: A shard cannot be opened.
        """
        for file in files:
            with anyio.CancelScope(shield=True):
                try:
                    await self._open(file)
                except OSError as error:
                    raise _read_error("opening", file, 0, error) from error

    async def read(self, ranges: Sequence[ReadRange], view: memoryview) -> None:
        """Reads every range into `view`, which is written from the block before each `position` to the block after.

        Args:
            view: Page-aligned, with room for whole blocks around each range.

        Raises:
            ShortReadError: A shard ended before its header says.
            ReadError: The operating system refused or broke off a read.

        Cancellation: each read is shielded, because its thread goes on writing; after a cancelled call no thread
        writes to `view` any more.
        """
        for item in ranges:
            with anyio.CancelScope(shield=True):
                started = time.perf_counter()
                try:
                    await self._read_range(item, view)
                except OSError as error:
                    raise _read_error(f"reading {item.nbytes} bytes", item.file, item.offset, error) from error
                finally:
                    self._statistics.seconds += time.perf_counter() - started
            await anyio.lowlevel.checkpoint_if_cancelled()

    async def _read_range(self, item: ReadRange, view: memoryview) -> None:
        handle = await self._open(item.file)
        base = align_down(item.offset)
        before = item.offset - base
        start = item.position - before
        wanted = before + item.nbytes
        done = 0
        while True:
            target = view[start + done : start + align_up(wanted)]
            done_now = done + await self._read_once(handle, base + done, target)
            if done_now >= wanted:
                break
            if align_down(done_now) == done:
                actual = max(0, done_now - before)
                raise ShortReadError(
                    f"{item.file} ended early: {item.nbytes} bytes were expected at offset {item.offset}, {actual} "
                    "came; the file was cut short after it was opened",
                    path=item.file,
                    offset=item.offset,
                    expected=item.nbytes,
                    actual=actual,
                )
            done = align_down(done_now)
        self._statistics.bytes_read += item.nbytes
        self._statistics.num_reads += 1

    async def _read_once(self, handle: _Handle, offset: int, target: memoryview) -> int:
        """One `readinto` at `offset`; where the file system refuses it as direct I/O, once more without."""
        try:
            if handle.position != offset:
                await handle.file.seek(offset)
            handle.position = -1
            count: int = await handle.file.readinto(target)
        except OSError as error:
            if not handle.direct or error.errno != errno.EINVAL:
                raise
            refused = handle.file
            await self._open_file(handle, direct=False)  # may fail: the file may have been removed
            await refused.close()
            return await self._read_once(handle, offset, target)
        handle.position = offset + count
        if not handle.direct and hasattr(os, "posix_fadvise"):
            await anyio.to_thread.run_sync(_drop_cache, handle.file.fileno, offset, count, limiter=self._advice_limiter)
        return count

    async def _open(self, path: Path) -> _Handle:
        handle = self._handles.get(path)
        if handle is None:
            handle = _Handle(path)
            try:
                await self._open_file(handle, direct=self._direct)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                await self._open_file(handle, direct=False)
            self._handles[path] = handle
        return handle

    async def _open_file(self, handle: _Handle, *, direct: bool) -> None:
        flags = _O_DIRECT if direct else 0
        handle.file = await aiofiles.open(
            handle.path,
            "rb",
            buffering=0,
            opener=lambda path, mode: os.open(path, mode | flags),
            executor=self._executor,
        )
        handle.direct = direct
        handle.position = 0


def _drop_cache(fileno: Callable[[], int], offset: int, count: int) -> None:
    os.posix_fadvise(fileno(), offset, count, os.POSIX_FADV_DONTNEED)


def _read_error(doing: str, path: Path, offset: int, error: OSError) -> ReadError:
    return ReadError(
        f"{doing} at offset {offset} of {path} failed: {error.strerror or error}",
        path=path,
        offset=offset,
        errno=error.errno,
    )
