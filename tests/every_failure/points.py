"""The points at which a run can fail: reads, writes, allocations and task switches, at the lowest layer there is."""

from __future__ import annotations

import asyncio
import builtins
import errno
import io
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import pytest

from hermes_async.modeling.kv_cache import KVPool
from hermes_async.storage.buffers import Buffer
from tests.disks import first_bytes

Kind = Literal["read", "write", "allocation", "switch"]

Faults = dict[Kind, tuple[str, ...]]
FAULTS: Faults = {
    "read": ("fails", "is short", "finds the end", "is late", "cancel"),
    "write": ("fails", "is short", "cancel"),
    "allocation": ("fails",),
    "switch": ("cancel", "cancel natively"),
}
"""What can go wrong at a point of each kind. A read or write where the call is cancelled hangs until it has ended."""
HANGS: Faults = {"read": ("hangs",), "write": ("hangs",)}
"""What goes wrong in scenarios with a `read_timeout`: the call is not cancelled, and has to end by itself."""

_LATE_SECONDS = 0.03
_HANGS_SECONDS = 20.0
_POISON = 0xFF


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, at the point of the kind with this number, from 1 on."""

    kind: Kind
    how: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {self.how}"


class Points:
    """Counts points while it is armed, and lets one of them go wrong.

    Reads and writes are those of files below `root`: by `os.preadv` and its like, and by file objects of `open`.
    Allocations are anonymous mappings, which all buffers are, and blocks of KV. Task switches are the suspensions of
    all tasks that `new_task` makes.

    Attributes:
        counts: Of each kind, since `arm`.
        where: What the point was that went wrong; None while none did.
        outlasted: A read or write that came back because the victim did not end while it hung.
        memory: The buffers and the pools of KV that there are.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        # All mutable state, guarded by `_lock`. `_cancel` cancels the victim, on any thread, natively or by its scope.
        # `_ended` is set when the victim has ended; a read that is late or hangs waits for it.
        self._lock = threading.Lock()
        self._is_armed = False
        self._fault: Fault | None = None
        self._cancel: Callable[[bool], None] = lambda natively: None
        self._ended = threading.Event()
        self.counts: Counter[Kind] = Counter()
        self.where: str | None = None
        self.outlasted: str | None = None
        self.memory: WeakSet[Buffer | KVPool] = WeakSet()

    def arm(self, fault: Fault | None, cancel: Callable[[bool], None]) -> None:
        """From now on counts, and lets `fault` happen."""
        with self._lock:
            self._is_armed, self._fault, self._cancel = True, fault, cancel
            self._ended = threading.Event()
            self.counts, self.where, self.outlasted = Counter(), None, None

    def disarm(self) -> None:
        """The scenario has ended."""
        with self._lock:
            self._is_armed = False
            self._cancel = lambda natively: None  # which has the victim, and so the error that it ended with
        self._ended.set()

    def reach(self, kind: Kind, what: str) -> str | None:
        """A point; returns what goes wrong there."""
        with self._lock:
            if not self._is_armed:
                return None
            self.counts[kind] += 1
            fault = self._fault
            if fault is None or fault.kind != kind or fault.number != self.counts[kind]:
                return None
            self.where = what
            return fault.how

    # --- reads and writes ---

    def transfer(self, kind: Kind, what: str, nbytes: int, call: Callable[[int], Any], nothing: Any) -> Any:
        """Does a read or a write of `nbytes` bytes, or of fewer, or none.

        Args:
            call: Does it, with the most bytes that count.
            nothing: What it returns at the end of a file.
        """
        how = self.reach(kind, what)
        if how == "fails":
            raise OSError(errno.EIO if kind == "read" else errno.ENOSPC, "made to fail")
        if how == "finds the end":
            return nothing
        if how == "is late":
            self._ended.wait(_LATE_SECONDS)
        elif how in ("cancel", "hangs"):
            if how == "cancel":
                self._cancel(False)
            if not self._ended.wait(_HANGS_SECONDS):
                self.outlasted = what
        return call(_half(nbytes) if how == "is short" else nbytes)

    def is_watched(self, fd: int) -> bool:
        """Whether an open file is one of the scenario's."""
        return self._is_armed and os.readlink(f"/proc/self/fd/{fd}").startswith(self._root)  # noqa: PTH115

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """As `open`, which reads a file of the scenario through `_CountedFile`."""
        path = os.fspath(file) if isinstance(file, str | os.PathLike) else ""
        if not self._is_armed or not str(path).startswith(self._root) or set(mode) - set("rbt"):
            return _real_open(file, mode, *args, **kwargs)
        return self._open_counted(path, mode, *args, **kwargs)

    def _open_counted(
        self,
        path: str,
        mode: str,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        raw = _CountedFile(self, path, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    # --- task switches ---

    def new_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """A task whose suspensions are points; a task factory."""
        return asyncio.Task(_Counted(self, coro), loop=loop, **kwargs)

    def suspended(self, what: Any) -> None:
        """A task has begun to wait."""
        how = self.reach("switch", "")
        if how is not None:
            self.where = f"{what}"
            self._cancel(how == "cancel natively")


class _CountedFile(io.FileIO):
    """A file whose reads are points."""

    def __init__(self, points: Points, path: str, opener: Any) -> None:
        super().__init__(path, "rb", opener=opener)
        self._points = points

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")

        def read(most: int) -> int:
            count = io.FileIO.readinto(self, view) or 0
            return _cut(count, most, [view])

        count: int = self._points.transfer("read", str(self.name), len(view), read, 0)
        return count

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        read = lambda most: io.FileIO.read(self, most)  # noqa: E731
        content: bytes = self._points.transfer("read", str(self.name), size, read, b"")
        return content

    def readall(self) -> bytes:
        """All that is left, in one read after the other, as the interpreter's own."""
        pieces = []
        while piece := self.read(1 << 20):
            pieces.append(piece)
        return b"".join(pieces)


class _Counted(Coroutine[Any, Any, Any]):
    """A task's coroutine, whose suspensions are points."""

    def __init__(self, points: Points, coro: Any) -> None:
        self._points, self._coro = points, coro

    def send(self, value: Any) -> Any:
        result = self._coro.send(value)
        self._points.suspended(self)
        return result

    def throw(self, *error: Any) -> Any:
        result = self._coro.throw(*error)
        self._points.suspended(self)
        return result

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self._coro.__await__())

    def __getattr__(self, name: str) -> Any:
        """`cr_frame`, `cr_await` and the like, by which anyio and the tests see what a coroutine waits for."""
        return getattr(self._coro, name)

    def __str__(self) -> str:
        """What it waits for: where in each of the coroutines that wait for each other."""
        places: list[str] = []
        waits: Any = self._coro
        while waits is not None:
            frame = getattr(waits, "cr_frame", None) or getattr(waits, "ag_frame", None)
            if frame is not None:
                places.append(f"{waits.__qualname__}:{frame.f_lineno}")
            waits = getattr(waits, "cr_await", None) or getattr(waits, "ag_await", None)
        return " > ".join(places)


_real_open = builtins.open


def _half(nbytes: int) -> int:
    """About a half, in whole pages: a disk cuts reads and writes there. A page is not cut."""
    return nbytes // 2 // mmap.PAGESIZE * mmap.PAGESIZE or nbytes


def _cut(count: int, most: int, views: list[memoryview]) -> int:
    """A read's count, when at most `most` bytes are to have come: what else came is made invalid."""
    if count <= most:
        return count
    position = 0
    for view in views:
        start = max(0, most - position)
        if start < len(view):
            view[start:] = bytes([_POISON]) * (len(view) - start)
        position += len(view)
    return most


@contextmanager
def counted(root: Path) -> Iterator[Points]:
    """Points of all that this process does, until the block is left; of tasks, those that `new_task` makes."""
    points = Points(root)
    preadv, pread, read, pwritev, pwrite = os.preadv, os.pread, os.read, os.pwritev, os.pwrite
    new_mapping, allocate = mmap.mmap, KVPool.allocate

    class Mapping(new_mapping):  # type: ignore[valid-type, misc]
        def __new__(cls, fileno: int, *args: Any, **kwargs: Any) -> Any:
            if fileno == -1 and points.reach("allocation", f"mapping of {args[0]} bytes") == "fails":
                raise OSError(errno.ENOMEM, "made to fail")
            return super().__new__(cls, fileno, *args, **kwargs)

    def counted_preadv(fd: int, views: Any, offset: int, *flags: int) -> int:
        if not points.is_watched(fd):
            return preadv(fd, views, offset, *flags)
        views = [memoryview(view).cast("B") for view in views]
        nbytes = sum(map(len, views))
        call = lambda most: _cut(preadv(fd, views, offset, *flags), most, views)  # noqa: E731
        count: int = points.transfer("read", f"preadv of {nbytes} bytes at {offset}", nbytes, call, 0)
        return count

    def counted_pread(fd: int, nbytes: int, offset: int) -> bytes:
        if not points.is_watched(fd):
            return pread(fd, nbytes, offset)
        content: bytes = points.transfer("read", "pread", nbytes, lambda most: pread(fd, most, offset), b"")
        return content

    def counted_read(fd: int, nbytes: int) -> bytes:
        if not points.is_watched(fd):
            return read(fd, nbytes)
        content: bytes = points.transfer("read", "read", nbytes, lambda most: read(fd, most), b"")
        return content

    def counted_pwritev(fd: int, views: Any, offset: int, *flags: int) -> int:
        if not points.is_watched(fd):
            return pwritev(fd, views, offset, *flags)
        nbytes = sum(map(len, views))
        write = lambda most: pwritev(fd, first_bytes(views, most), offset, *flags)  # noqa: E731
        count: int = points.transfer("write", f"pwritev of {nbytes} bytes at {offset}", nbytes, write, 0)
        return count

    def counted_pwrite(fd: int, content: Any, offset: int) -> int:
        if not points.is_watched(fd):
            return pwrite(fd, content, offset)
        write = lambda most: pwrite(fd, memoryview(content)[:most], offset)  # noqa: E731
        count: int = points.transfer("write", "pwrite", len(content), write, 0)
        return count

    def counted_allocate(pool: KVPool, count: int) -> list[int]:
        if points.reach("allocation", f"{count} KV blocks") == "fails":
            raise MemoryError("made to fail")
        return allocate(pool, count)

    def noted(init: Callable[..., None]) -> Callable[..., None]:
        def init_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            points.memory.add(self)

        return init_and_note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffer, "__init__", noted(Buffer.__init__))
        patch.setattr(KVPool, "__init__", noted(KVPool.__init__))
        patch.setattr(builtins, "open", points.open)
        patch.setattr(io, "open", points.open)
        patch.setattr(os, "preadv", counted_preadv)
        patch.setattr(os, "pread", counted_pread)
        patch.setattr(os, "read", counted_read)
        patch.setattr(os, "pwritev", counted_pwritev)
        patch.setattr(os, "pwrite", counted_pwrite)
        patch.setattr(mmap, "mmap", Mapping)
        patch.setattr(KVPool, "allocate", counted_allocate)
        yield points
