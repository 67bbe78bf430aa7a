"""A private file on disk for the KV of idle sessions: blocks are written to it and read back bit for bit.

This is the only module that writes KV to disk. It turns an `OSError` of the file into a `ParkingError`.
"""

from __future__ import annotations

import errno
import heapq
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio

from hermes_async.errors import ParkingError
from hermes_async.storage.buffers import ALIGNMENT, align_down
from hermes_async.storage.direct_io import O_DIRECT, drop_cache, set_direct
from hermes_async.storage.file_kinds import is_dir
from hermes_async.storage.read_watch import ReadUnderWay, ReadWatch
from hermes_async.storage.threads import SECONDS_UNTIL_GIVEN_UP, check_cancelled, run_in_thread

_O_TMPFILE: int = getattr(os, "O_TMPFILE", 0)

_DEFAULT_FOLDER = Path("/var/tmp")  # noqa: S108 - on disk; the file has no name and only this user can read it

# Limits of one system call: views that every POSIX system takes, and few enough bytes that a cancelled call ends soon.
_MAX_VIEWS_PER_CALL = 1024
_MAX_BYTES_PER_CALL = 32 * 2**20

_PREFIX = "hermes-async-parked-"

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOENT: "there is no such folder",
    errno.ENOTDIR: "that is no folder",
    errno.EACCES: "the folder may not be written to",
    errno.EROFS: "the folder may not be written to",
}


class ParkingFile:
    """Slots of `slot_bytes` bytes in a temporary file without a name, so that nothing is left even after a crash.

    Owned with `async with`, or closed with `aclose`. The first write makes the file, which only this user can read. I/O
    bypasses the page cache where the file system allows it; elsewhere, the cache is dropped after each operation. One
    operation runs at a time, on a worker thread. Event-loop side only. A cancelled operation waits for its thread for a
    moment, and then gives it up, because the disk may hang: the views and the file must not be used afterwards, and
    `aclose` leaves it to the thread to close the file.

    The lowest free slots are used first. When all slots are free, the next write first gives the file's space back to
    the disk. Until then, or until `aclose`, the file keeps it.

    Args:
        folder: The folder for the file. None takes /var/tmp, because /tmp is often in memory, or the system's temporary
            folder if /var/tmp cannot be written to.
        slot_bytes: A multiple of 4096 (`ALIGNMENT`).
        direct: Whether to try direct I/O.
        watch: Of the reads and writes; by default, one without a timeout.

    Raises:
        ValueError: `slot_bytes` is no multiple of 4096.
    """

    def __init__(
        self, folder: Path | None, slot_bytes: int, *, direct: bool = True, watch: ReadWatch | None = None
    ) -> None:
        if slot_bytes <= 0 or slot_bytes % ALIGNMENT:
            raise ValueError(f"slot_bytes must be a multiple of {ALIGNMENT}, not {slot_bytes}")
        self.watch = watch or ReadWatch()
        self._slot_bytes = slot_bytes
        self._limiter = anyio.CapacityLimiter(1)
        # All mutable state. Event loop: each slot is in `_used` (also while it is being written) or in `_free` (a
        # heap); `_closed` is set once. Worker thread: `_folder` is final when the file is opened as `_fd`; `_direct`
        # says whether I/O bypasses the page cache. `_stale` is set by the loop when all slots are free, so no thread
        # writes then. The thread that has emptied the file clears it.
        self._used: set[int] = set()
        self._free: list[int] = []
        self._closed = False
        self._folder = folder or _DEFAULT_FOLDER
        self._folder_is_default = folder is None
        self._fd: int | None = None
        self._closing = threading.Lock()  # a thread that was given up may close the file at the same time
        self._direct = direct and bool(O_DIRECT)
        self._stale = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    @property
    def num_slots_used(self) -> int:
        """Slots that hold a block or are being written."""
        return len(self._used)

    @property
    def bytes_used(self) -> int:
        return len(self._used) * self._slot_bytes

    async def write(self, views: Sequence[memoryview]) -> list[int]:
        """Writes each view (`slot_bytes` bytes, page-aligned) into a slot of its own.

        Returns:
            The slots' numbers, in the order of `views`. They are used until `free`.

        Raises:
            ParkingError: The file could not be made or written, or is closed. No slot is used. Earlier slots can still
                be read.
            ValueError: A view has another size.

        Cancellation: the call returns when its thread has finished with the views, after a few system calls at most, or
        was given up. No slot is used.
        """
        self._check(views)
        if not views:
            return []
        slots = [heapq.heappop(self._free) for _ in range(min(len(views), len(self._free)))]
        end = len(self._used) + len(self._free) + len(slots)
        slots.extend(range(end, end + len(views) - len(slots)))
        self._used.update(slots)
        try:
            await self._run(f"parking {len(views) * self._slot_bytes} bytes", partial(self._write, slots, list(views)))
        except BaseException:
            self._give_back(slots)
            raise
        return slots

    async def read(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        """Fills each view (`slot_bytes` bytes, page-aligned) from its slot; the slots stay used.

        Raises:
            ParkingError: The file could not be read, or is closed. The content of the views is undefined.
            ValueError: A slot is not in use, or a view has another size.

        Cancellation: as `write`. The content of the views is undefined; the slots keep theirs.
        """
        self._check(views)
        if len(slots) != len(views) or not self._used.issuperset(slots):
            raise ValueError(f"slots that are in use, one for each of {len(views)} views, are needed, not {slots}")
        if views:
            doing = f"bringing back {len(views) * self._slot_bytes} bytes"
            await self._run(doing, partial(self._read, list(slots), list(views)))

    def free(self, slots: Sequence[int]) -> None:
        """Frees slots for later writes, without I/O. No read of them may be running. Does nothing after `aclose`.

        Raises:
            ValueError: A slot is not in use, or is given twice. No slot was freed.
        """
        if self._closed:
            return
        if len(set(slots)) != len(slots) or not self._used.issuperset(slots):
            raise ValueError(f"only slots in use can be freed, each once, not {slots}")
        self._give_back(slots)

    async def aclose(self) -> None:
        """Closes the file, which deletes it. A second call does nothing.

        Cancellation: the file is closed before the call returns, unless the disk hangs.
        """
        self._closed = True
        self.watch.close()
        self._used.clear()
        self._free.clear()
        await self._run("closing the file", self._close, closing=True)

    def _check(self, views: Sequence[memoryview]) -> None:
        self._check_open()
        for view in views:
            if not len(view) == view.nbytes == self._slot_bytes:
                raise ValueError(f"a view must have {self._slot_bytes} bytes, not {view.nbytes}")

    def _check_open(self) -> None:
        if self._closed:
            raise ParkingError(f"the file for idle KV in {self._folder} is closed", path=self._folder)

    def _give_back(self, slots: Sequence[int]) -> None:
        if self._closed:
            return
        self._used.difference_update(slots)
        if self._used:
            for slot in slots:
                heapq.heappush(self._free, slot)
        else:
            self._free.clear()
            self._stale = True

    async def _run(self, doing: str, call: Callable[[], None], *, closing: bool = False) -> None:
        """Runs `call` on a worker thread. Returns when the thread has finished or was given up."""
        errors: list[Exception] = []

        async def run() -> None:
            try:
                with anyio.CancelScope(shield=closing):
                    async with self._limiter:
                        if closing and self.watch.under_way:
                            return  # a thread that was given up: it closes the file when it returns
                        self.watch.warn_later()
                        with anyio.move_on_after(SECONDS_UNTIL_GIVEN_UP if closing else None):
                            try:
                                await run_in_thread(call, left_at_exit=True, when_given_up=self._close)
                            finally:
                                self._closed = self._closed or bool(self.watch.under_way)  # the call was given up
            except Exception as error:
                errors.append(error)

        # A separate task, because a shield does not protect from asyncio's own `Task.cancel` of the caller. A task
        # group does, and waits for the thread.
        async with anyio.create_task_group() as group:
            group.start_soon(run)
        for error in errors:
            if isinstance(error, OSError):
                raise self._error(doing, error) from error
            raise error

    def _error(self, doing: str, error: OSError) -> ParkingError:
        reason = error.strerror or str(error)
        if error.errno in _REASONS:
            reason = f"{_REASONS[error.errno]} ({reason})"
        return ParkingError(
            f"{doing} of idle KV in {self._folder} failed: {reason}", path=self._folder, errno=error.errno
        )

    # From here on: worker thread, one at a time.

    def _write(self, slots: list[int], views: list[memoryview]) -> None:
        self._check_open()  # it may have been closed in the meantime
        with self.watch.reading(*views) as under_way:
            with under_way.at(self._folder, 0, "making a file"):
                fd = self._open()
                if self._stale:
                    os.ftruncate(fd, 0)
                    self._stale = False
                size = os.fstat(fd).st_size
            try:
                for offset, batch in self._batches(slots, views):
                    self._transfer(fd, offset, batch, under_way, writing=True)
            except BaseException:
                with under_way.at(self._folder, size, "a write"), suppress(OSError):
                    os.ftruncate(fd, size)  # on a full disk, other programs may need the space
                raise

    def _read(self, slots: list[int], views: list[memoryview]) -> None:
        self._check_open()
        with self.watch.reading(*views) as under_way:
            for offset, batch in self._batches(slots, views):
                self._transfer(self._open(), offset, batch, under_way, writing=False)

    def _batches(self, slots: list[int], views: list[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
        """Offset and views of each run of consecutive slots, split where it is too long for one system call."""
        most = max(1, min(_MAX_VIEWS_PER_CALL, _MAX_BYTES_PER_CALL // self._slot_bytes))
        start = 0
        for end in range(1, len(slots) + 1):
            if end == len(slots) or end - start == most or slots[end] != slots[end - 1] + 1:
                yield slots[start] * self._slot_bytes, views[start:end]
                start = end

    def _transfer(
        self, fd: int, offset: int, views: list[memoryview], under_way: ReadUnderWay, *, writing: bool
    ) -> None:
        """Writes or reads `views` one after another from `offset`. Empties the list."""
        while views:
            check_cancelled()
            try:
                with under_way.at(self._folder, offset, "a write" if writing else "a read"):
                    count = os.pwritev(fd, views, offset) if writing else os.preadv(fd, views, offset)
                    if writing and not self._direct and hasattr(os, "posix_fadvise"):
                        os.fdatasync(fd)  # only pages that are on disk are dropped from the cache
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._set_direct(fd, False)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file ended early")
            if not self._direct:
                drop_cache(fd, offset, count)
            count = align_down(count) or count  # direct I/O continues only at the beginning of a block
            offset += count
            num_done = 0
            while num_done < len(views) and count >= len(views[num_done]):
                count -= len(views[num_done])
                num_done += 1
            del views[:num_done]
            if count:
                views[0] = views[0][count:]

    def _open(self) -> int:
        if self._fd is None:
            if self._folder_is_default and not (is_dir(self._folder) and os.access(self._folder, os.W_OK | os.X_OK)):
                self._folder = Path(tempfile.gettempdir())
            self._fd = open_unnamed(self._folder)
            if self._direct:
                self._set_direct(self._fd, True)
        return self._fd

    def _set_direct(self, fd: int, direct: bool) -> None:
        """Turns direct I/O on, if the file system allows it, or off. A file without a name cannot be reopened."""
        try:
            set_direct(fd, direct)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            direct = False
        self._direct = direct

    def _close(self) -> None:
        with self._closing:
            fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # nobody needs what could not be written
                os.close(fd)


def open_unnamed(folder: Path) -> int:
    """Opens a new file in `folder`, which only this user can read. Closing it deletes it."""
    if _O_TMPFILE:
        with suppress(OSError):  # if the system refuses this, `mkstemp` below reports the reason
            return os.open(folder, os.O_RDWR | os.O_EXCL | _O_TMPFILE, 0o600)
    for left in folder.glob(f"{_PREFIX}*"):  # of processes that were killed just then; nobody needs their names
        with suppress(OSError):
            left.unlink()
    fd, path = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    try:
        Path(path).unlink(missing_ok=True)
    except OSError:
        os.close(fd)
        raise
    return fd
