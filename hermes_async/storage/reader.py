"""Reads byte ranges of shards into buffers, with aiofiles and direct I/O, on threads of their own.

This is the only module that reads weights, and the only one that imports aiofiles. It turns an `OSError` of a read into
a `ReadError`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiofiles
import aiofiles.os
import anyio
import anyio.lowlevel

from hermes_async.errors import ReadError, ShortReadError
from hermes_async.storage.buffers import ALIGNMENT, align_down, align_up
from hermes_async.storage.direct_io import O_DIRECT, drop_cache, set_direct
from hermes_async.storage.file_state import FileState


@dataclass(frozen=True, slots=True)
class ReadRange:
    """A read of `nbytes` bytes of `file` from `offset` on, to `position` in a buffer.

    Attributes:
        scratch: None if the read may also write the rest of the blocks around the range. `offset` and `position` must
            then be equal modulo 4096 (`ALIGNMENT`), so that a direct read can begin at the block's beginning.
            Otherwise, the start and end of two or more whole blocks of the buffer; beside the range, the read writes
            only there. If `offset` and `position` are not equal modulo 4096, all bytes pass through the scratch
            blocks, in many small reads if there are few of them.
    """

    file: Path
    offset: int
    nbytes: int
    position: int
    scratch: tuple[int, int] | None = None


ReadKind = Literal["resident weights", "streamed weights", "experts", "embedding rows"]
"""What is read, for statistics."""


@dataclass(slots=True)
class ReadStatistics:
    """What the readers have read so far.

    Attributes:
        seconds: The sum of the times of all calls, which overlap.
    """

    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    num_reads: int = 0
    seconds: float = 0.0

    @property
    def bytes_read(self) -> int:
        """Of all kinds."""
        return self.bytes_by_kind.total()


class Reader:
    """Reads ranges of shards. As many calls run at once as the executor has threads.

    Owned with `async with`: entering opens all shards, so that they can be read even if they are renamed or removed
    later. Leaving closes them. At most a quarter of the files that the process may open are open at once. If there are
    more shards, the least recently used ones are closed for others. Reads bypass the page cache where the file system
    allows it. Elsewhere they are buffered, and the cache is dropped after them.

    Args:
        states: The files as they were when their headers were read. A file that has changed when it is opened, or after
            a read, is an error: its bytes may not be those that the header describes.

    Raises:
        ReadError: On entering: a shard cannot be opened, or has changed.
    """

    def __init__(
        self,
        files: Collection[Path],
        executor: Executor,
        statistics: ReadStatistics,
        *,
        direct: bool = True,
        states: Mapping[Path, FileState] | None = None,
    ) -> None:
        self._files = files
        self._states = states or {}
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_open = len(files) if allowed == resource.RLIM_INFINITY else max(1, allowed // 4)
        self._executor = executor
        self._statistics = statistics
        self._direct = direct and bool(O_DIRECT)
        # All mutable state, changed on the event loop: the open shards, least recently used first. A thread only looks
        # up shards that are held for it.
        self._shards: dict[Path, _Shard] = {}
        self._opening = anyio.Lock()
        self._read_in_thread = aiofiles.os.wrap(self._read)

    async def __aenter__(self) -> Self:
        try:
            for file in list(self._files)[: self._max_open]:
                with anyio.CancelScope(shield=True):
                    await self._open(file)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def read(
        self,
        ranges: Sequence[ReadRange],
        view: memoryview,
        on_read: Callable[[float, float], None] | None = None,
        *,
        kind: ReadKind = "streamed weights",
    ) -> None:
        """Reads every range into `view`.

        Args:
            kind: The statistics count the bytes of each kind.
            view: Page-aligned, with room for whole blocks around each range. The read writes those too, unless the
                range has `scratch`.
            on_read: Called on the executor's thread with the beginning and the end of the reads, on the clock of
                `time.perf_counter`. Waiting for a thread comes before the beginning.

        Raises:
            ShortReadError: A shard is shorter than its header says.
            ReadError: A read failed, or a shard has changed.

        Cancellation: shielded, because a thread cannot be stopped. After a cancelled call, no thread writes to `view`.
        """
        with anyio.CancelScope(shield=True):
            spent: list[float] = []
            try:
                async with self._held({item.file for item in ranges}) as shards:
                    await self._read_in_thread(shards, ranges, view, spent, on_read, executor=self._executor)
            finally:
                self._statistics.seconds += sum(spent)
        self._statistics.bytes_by_kind[kind] += sum(item.nbytes for item in ranges)
        self._statistics.num_reads += len(ranges)
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def read_many(
        self, ranges: Sequence[ReadRange], view: memoryview, at_once: int, *, kind: ReadKind = "streamed weights"
    ) -> None:
        """As `read`, with `at_once` calls at the same time: for many small ranges, where the disk's latency counts."""
        reads = [self.read(ranges[start::at_once], view, kind=kind) for start in range(min(at_once, len(ranges)))]
        with anyio.CancelScope(shield=True):
            outcomes = await asyncio.gather(*reads, return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        await anyio.lowlevel.checkpoint_if_cancelled()

    def _read(
        self,
        shards: Mapping[Path, _Shard],
        ranges: Sequence[ReadRange],
        view: memoryview,
        spent: list[float],
        on_read: Callable[[float, float], None] | None,
    ) -> None:
        """Runs on a thread of the executor. One call for all ranges: each switch of threads interrupts computation."""
        started = time.perf_counter()
        try:
            for item in ranges:
                try:
                    shards[item.file].read(item, view)
                except OSError as error:
                    raise _read_error(f"reading {item.nbytes} bytes", item.file, item.offset, error) from error
            for path, shard in shards.items():
                self._check_unchanged(path, shard)
        finally:
            ended = time.perf_counter()
            spent.append(ended - started)
            if on_read is not None:
                on_read(started, ended)

    @asynccontextmanager
    async def _held(self, paths: Iterable[Path]) -> AsyncIterator[Mapping[Path, _Shard]]:
        """Keeps shards open within the block. A thread looks at these alone: the loop changes the order of all."""
        held: dict[Path, _Shard] = {}
        try:
            for path in paths:
                if path not in self._shards:
                    async with self._opening:
                        if path not in self._shards:
                            await self._close_unused(self._max_open - 1)
                            await self._open(path)
                shard = self._shards[path] = self._shards.pop(path)
                shard.num_users += 1
                held[path] = shard
            yield held
        finally:
            for shard in held.values():
                shard.num_users -= 1

    async def _close_unused(self, num_left: int) -> None:
        """Closes shards that nobody reads, least recently used first, until `num_left` are open."""
        while len(self._shards) > num_left:
            path = next((path for path, shard in self._shards.items() if not shard.num_users), None)
            if path is None:
                return
            await self._shards.pop(path).file.close()

    async def _open(self, path: Path) -> None:
        while True:
            try:
                shard = await self._open_as_allowed(path)
                break
            except OSError as error:
                num_open = len(self._shards)
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise _read_error("opening", path, 0, error) from error
                # The process has more files open than expected. Leave half of ours to the others.
                await self._close_unused(num_open // 2)
                if len(self._shards) == num_open:
                    raise _read_error("opening", path, 0, error) from error
                self._max_open = max(1, len(self._shards))
        self._shards[path] = shard
        self._check_unchanged(path, shard)

    async def _open_as_allowed(self, path: Path) -> _Shard:
        try:
            return await self._open_shard(path, direct=self._direct)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            return await self._open_shard(path, direct=False)

    def _check_unchanged(self, path: Path, shard: _Shard) -> None:
        """Runs on any thread. Comes after a read, because the file may be written to during the read."""
        before = self._states.get(path)
        if before is None:
            return
        now = FileState.of(os.fstat(shard.file.fileno()))
        if now == before:
            return
        if (now.device, now.inode) != (before.device, before.inode):
            what = "another file is there now"
        elif now.nbytes != before.nbytes:
            what = f"it had {before.nbytes} bytes and has {now.nbytes}"
        else:
            what = "it was written to"
        message = f"{path} was changed after its header was read: {what}; open the engine again once it is whole"
        if now.nbytes < before.nbytes:
            raise ShortReadError(message, path=path, offset=0, expected=before.nbytes, actual=now.nbytes)
        raise ReadError(message, path=path, offset=0)

    async def _open_shard(self, path: Path, *, direct: bool) -> _Shard:
        flags = O_DIRECT if direct else 0
        file = await aiofiles.open(
            path,
            "rb",
            buffering=0,
            opener=lambda path, mode: os.open(path, mode | flags),
            executor=self._executor,
        )
        return _Shard(file, direct=direct)

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            while self._shards:
                await self._shards.popitem()[1].file.close()


class _Shard:
    """An open file, which several threads read at once."""

    def __init__(self, file: Any, *, direct: bool) -> None:
        self.file = file
        self.num_users = 0
        self._direct = direct

    def read(self, item: ReadRange, view: memoryview) -> None:
        before = item.offset % ALIGNMENT
        if item.scratch is None:
            start = item.position - before
            self._fill(item, item.offset, item.nbytes, [view[start : start + align_up(before + item.nbytes)]])
            return
        scratch = view[slice(*item.scratch)]
        first, last = align_up(item.position), align_down(item.position + item.nbytes)
        if item.position % ALIGNMENT == before and first < last:
            self._read_blocks(item, view, first, last, scratch)
        else:
            self._read_through(item, view, scratch)

    def _read_blocks(self, item: ReadRange, view: memoryview, first: int, last: int, scratch: memoryview) -> None:
        """Reads the whole blocks `first` to `last` to their place, and the parts around them through `scratch`."""
        head, tail = scratch[:ALIGNMENT], scratch[ALIGNMENT : 2 * ALIGNMENT]
        num_before, num_after = first - item.position, item.position + item.nbytes - last
        before, after = [head] if num_before else [], [tail] if num_after else []
        self._fill(item, item.offset, item.nbytes, [*before, view[first:last], *after])
        view[item.position : first] = head[ALIGNMENT - num_before :]
        view[last : last + num_after] = tail[:num_after]

    def _read_through(self, item: ReadRange, view: memoryview, scratch: memoryview) -> None:
        """Reads all bytes through `scratch`, as many at once as it holds."""
        done = 0
        while done < item.nbytes:
            offset = item.offset + done
            before = offset % ALIGNMENT
            count = min(item.nbytes - done, len(scratch) - before)
            self._fill(item, offset, count, [scratch[: align_up(before + count)]])
            view[item.position + done : item.position + done + count] = scratch[before : before + count]
            done += count

    def _fill(self, item: ReadRange, offset: int, nbytes: int, targets: Sequence[memoryview]) -> None:
        """Reads the blocks with `nbytes` bytes from `offset` on into `targets`, one after another.

        Raises:
            ShortReadError: The file ends before that; the error names the whole of `item`.
        """
        base = align_down(offset)
        wanted = offset - base + nbytes
        done = 0
        while True:
            done_now = done + self._read_once(base + done, _rest(targets, done))
            if done_now >= wanted:
                return
            if align_down(done_now) == done:
                actual = max(0, base + done_now - item.offset)
                raise ShortReadError(
                    f"{item.file} ended early: {item.nbytes} bytes were expected at offset {item.offset}, {actual} "
                    "came; the file was truncated after it was opened",
                    path=item.file,
                    offset=item.offset,
                    expected=item.nbytes,
                    actual=actual,
                )
            done = align_down(done_now)

    def _read_once(self, offset: int, targets: Sequence[memoryview]) -> int:
        """Makes one system call at `offset`. If the file system refuses direct I/O, all further reads are buffered."""
        fd = self.file.fileno()
        direct = self._direct
        try:
            count = os.preadv(fd, targets, offset)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            set_direct(fd, False)
            self._direct = False
            return self._read_once(offset, targets)
        if not direct:
            drop_cache(fd, offset, count)
        return count


def _rest(targets: Sequence[memoryview], done: int) -> list[memoryview]:
    """`targets` without their first `done` bytes."""
    left = []
    for target in targets:
        if done < len(target):
            left.append(target[done:])
        done = max(0, done - len(target))
    return left


def _read_error(doing: str, path: Path, offset: int, error: OSError) -> ReadError:
    return ReadError(
        f"{doing} at offset {offset} of {path} failed: {error.strerror or error}",
        path=path,
        offset=offset,
        errno=error.errno,
    )
