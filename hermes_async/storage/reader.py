"""Reads byte ranges of shards into buffers, with aiofiles and direct I/O, on threads of their own.

All weights are read here, and no other module imports aiofiles. It turns an `OSError` of a read into a `ReadError`.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import aiofiles.os
import anyio

from hermes_async.errors import ReadError, ShortReadError
from hermes_async.storage.direct_io import O_DIRECT
from hermes_async.storage.file_state import FileState
from hermes_async.storage.read_watch import ReadWatch
from hermes_async.storage.shard import ReadRange, Shard
from hermes_async.storage.threads import SECONDS_UNTIL_GIVEN_UP, finished_or_given_up

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

    A disk that hangs: leaving does not wait for threads that were given up. Their shards are closed when they return.

    Args:
        executor: If it is a `DaemonExecutor`, another thread takes the place of one that was given up.
        watch: Of the reads; by default, one without a timeout.
        states: The files as they were when their headers were read. A file that has changed when it is opened, or after
            a read, is an error: its bytes may not be those that the header describes.

    Raises:
        ReadError: On entering: a shard cannot be opened, has changed, or its opening is overdue.
    """

    def __init__(
        self,
        files: Collection[Path],
        executor: Executor,
        statistics: ReadStatistics,
        *,
        direct: bool = True,
        states: Mapping[Path, FileState] | None = None,
        watch: ReadWatch | None = None,
    ) -> None:
        self.watch = watch or ReadWatch()
        self._files = files
        self._states = states or {}
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_open = len(files) if allowed == resource.RLIM_INFINITY else max(1, allowed // 4)
        self._executor = executor
        self._statistics = statistics
        self._direct = direct and bool(O_DIRECT)
        # All mutable state: the open shards, least recently used first, which the event loop changes. A thread looks up
        # only shards that are held for it. `_users` guards their `num_users` and `is_left`.
        self._shards: dict[Path, Shard] = {}
        self._users = threading.Lock()
        self._opening = anyio.Lock()
        self._open_in_thread, self._close_in_thread = aiofiles.os.wrap(self._opened), aiofiles.os.wrap(self._close_all)

    async def __aenter__(self) -> Self:
        try:
            for file in list(self._files)[: self._max_open]:
                await self.watch.in_time(self._open(file))
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

        Cancellation: waits for the thread, which cannot be stopped, but no longer than a fraction of a second. After a
        cancelled call, a thread that hangs may still write to `view`: it must not be used again. The watch has the read
        until the thread has returned.
        """
        held = await self._hold({item.file for item in ranges})
        spent: list[float] = []
        try:
            work = self._executor.submit(lambda: self._read(held, ranges, view, spent, on_read))
        except BaseException:
            self._let_go(held)
            raise
        # By the thread: nobody else may be there when it returns. Before the event loop is told that it has returned.
        work.add_done_callback(lambda _: self._let_go(held))
        self.watch.warn_later()
        try:
            await finished_or_given_up(asyncio.wrap_future(work))
        finally:
            self._statistics.seconds += sum(spent)
        self._statistics.bytes_by_kind[kind] += sum(item.nbytes for item in ranges)
        self._statistics.num_reads += len(ranges)

    async def read_many(
        self, ranges: Sequence[ReadRange], view: memoryview, at_once: int, *, kind: ReadKind = "streamed weights"
    ) -> None:
        """As `read`, with `at_once` calls at the same time: for many small ranges, where the disk's latency counts."""
        errors: list[ReadError] = []

        async def read(part: Sequence[ReadRange]) -> None:
            try:
                await self.read(part, view, kind=kind)
            except ReadError as error:  # raised when no thread reads any more
                errors.append(error)

        async with anyio.create_task_group() as group:
            for start in range(min(at_once, len(ranges))):
                group.start_soon(read, ranges[start::at_once])
        if errors:
            raise errors[0]

    def _read(
        self,
        shards: Mapping[Path, Shard],
        ranges: Sequence[ReadRange],
        view: memoryview,
        spent: list[float],
        on_read: Callable[[float, float], None] | None,
    ) -> None:
        """Runs on a thread of the executor. One call for all ranges: each switch of threads interrupts computation."""
        started = time.perf_counter()
        try:
            with self.watch.reading(view) as under_way:
                for item in ranges:
                    try:
                        shards[item.file].read(item, view, under_way)
                    except OSError as error:
                        raise _read_error(f"reading {item.nbytes} bytes", item.file, item.offset, error) from error
                for path, shard in shards.items():
                    with under_way.at(path, 0, "a look at its size and time"):
                        self._check_unchanged(path, shard)
        finally:
            ended = time.perf_counter()
            spent.append(ended - started)
            if on_read is not None:
                on_read(started, ended)

    async def _hold(self, paths: Iterable[Path]) -> Mapping[Path, Shard]:
        """Keeps shards open until `_let_go`. A thread looks at these alone: the loop changes the order of all.

        Cancellation: none is held.
        """
        held: dict[Path, Shard] = {}
        try:
            for path in paths:
                if path not in self._shards:
                    async with self._opening:
                        if path not in self._shards:
                            await self._close_unused(self._max_open - 1)
                            await self._open(path)
                shard = self._shards[path] = self._shards.pop(path)
                with self._users:
                    shard.num_users += 1
                held[path] = shard
        except BaseException:
            self._let_go(held)
            raise
        return held

    def _let_go(self, held: Mapping[Path, Shard]) -> None:
        """Runs on any thread."""
        for path, shard in held.items():
            with self._users:
                shard.num_users -= 1
                is_last = shard.is_left and not shard.num_users
            if is_last:
                self._close_all({path: shard})

    async def _close_unused(self, num_left: int) -> None:
        """Closes shards that nobody reads, least recently used first, until `num_left` are open."""
        while len(self._shards) > num_left:
            path = next((path for path, shard in self._shards.items() if not shard.num_users), None)
            if path is None:
                return
            self.watch.warn_later()
            await self._close_shards({path: self._shards.pop(path)})

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

    async def _open_as_allowed(self, path: Path) -> Shard:
        try:
            return await self._open_shard(path, direct=self._direct)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            return await self._open_shard(path, direct=False)

    def _check_unchanged(self, path: Path, shard: Shard) -> None:
        """Runs on any thread. Comes after a read, because the file may be written to during the read."""
        before = self._states.get(path)
        if before is None:
            return
        now = shard.state
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

    def _opened(self, path: Path, *, direct: bool) -> Shard:
        """Runs on a thread of the executor."""
        with self.watch.reading() as under_way, under_way.at(path, 0):
            shard = Shard.open(path, direct=direct)
            try:
                self._check_unchanged(path, shard)
            except BaseException:
                shard.close()
                raise
            return shard

    async def _open_shard(self, path: Path, *, direct: bool) -> Shard:
        self.watch.warn_later()
        opening = self._open_in_thread(path, direct=direct, executor=self._executor)
        return await finished_or_given_up(asyncio.ensure_future(opening))

    def _close_all(self, shards: Mapping[Path, Shard]) -> None:
        """Runs on any thread. A network file system may keep a close waiting as it does a read."""
        with self.watch.reading() as under_way:
            for path, shard in shards.items():
                with under_way.at(path, 0, "closing the file"), suppress(OSError):  # nothing was written to it
                    shard.close()

    async def _close_shards(self, shards: Mapping[Path, Shard]) -> None:
        closing = self._close_in_thread(shards, executor=self._executor)
        await finished_or_given_up(asyncio.ensure_future(closing))

    async def _close(self) -> None:
        self.watch.close()
        unused: dict[Path, Shard] = {}
        while self._shards:
            path, shard = self._shards.popitem()
            with self._users:
                shard.is_left = shard.num_users > 0  # then the last thread that reads it closes it
            if not shard.is_left:
                unused[path] = shard
        if unused:
            with anyio.move_on_after(SECONDS_UNTIL_GIVEN_UP, shield=True):
                await self._close_shards(unused)


def _read_error(doing: str, path: Path, offset: int, error: OSError) -> ReadError:
    return ReadError(
        f"{doing} at offset {offset} of {path} failed: {error.strerror or error}",
        path=path,
        offset=offset,
        errno=error.errno,
    )
