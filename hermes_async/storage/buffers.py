"""Page-aligned buffers in host memory. They are made once and reused as long as the engine lives."""

from __future__ import annotations

import logging
import mmap
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakSet

import anyio
import torch

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError
from hermes_async.storage.locked_pages import lock_pages, unlock_pages

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python has a name for it since 3.13
"""Flag of a mapping that reserves addresses only, and no swap."""

ALIGNMENT = 4096
"""Direct I/O needs file offset, length and memory address to be multiples of this, in bytes."""


def align_up(num_bytes: int) -> int:
    """The least multiple of `ALIGNMENT` that is not smaller."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def align_down(num_bytes: int) -> int:
    """The largest multiple of `ALIGNMENT` that is not larger."""
    return num_bytes // ALIGNMENT * ALIGNMENT


def map_memory(nbytes: int, flags: int = 0) -> mmap.mmap:
    """Maps private anonymous memory, aligned to a page. Memory is resident only after it was written to.

    Args:
        flags: Beside those for private anonymous memory.

    Raises:
        MemoryBudgetError: The system does not give the memory.
    """
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0x20) | flags)
    except OSError as error:
        raise MemoryBudgetError(
            f"the system does not give {format_bytes(nbytes)} of memory: {error.strerror or error}; use a smaller "
            "memory budget, or try again when other programs have given memory back",
            requested_bytes=nbytes,
            budget_bytes=0,
        ) from error


class Buffer:
    """Private anonymous memory, aligned to a page.

    The memory comes from `mmap`, in huge pages as far as possible: a read into huge pages needs fewer requests to the
    disk and causes fewer page faults. Memory is resident only after it was written to.

    Args:
        nbytes: Rounded up to whole pages.
        within: The memory that this buffer is a part of, and its offset there; None makes memory of its own.

    Raises:
        MemoryBudgetError: The system does not give the memory.
    """

    def __init__(self, nbytes: int, *, within: tuple[_Mapped, int] | None = None) -> None:
        self.nbytes = align_up(nbytes)
        mapped, start = self._within = within or (_Mapped(self.nbytes), 0)
        self.view = mapped.view[start : start + self.nbytes]
        self._is_locked = False

    @classmethod
    def side_by_side(cls, sizes: Sequence[int]) -> list[Buffer]:
        """Makes buffers of these sizes in one piece of memory.

        Neighbours can share a huge page. Separate buffers would each end in small pages: a disk of 2.8 GiB/s gave 2.4
        with separate buffers of 9 MiB.
        """
        if not sizes:
            return []
        *starts, end = accumulate(map(align_up, sizes), initial=0)
        mapped = _Mapped(end)
        return [cls(nbytes, within=(mapped, start)) for nbytes, start in zip(sizes, starts, strict=True)]

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Views a part of the buffer as a tensor, without a copy. The tensor keeps the memory alive."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.view, dtype=dtype, count=count, offset=offset).view(shape)

    def lock(self) -> None:
        """Locks its pages in memory, each when it is first used.

        Raises:
            OSError: The system does not lock them.
        """
        if self.nbytes and not self._is_locked:
            lock_pages(self._address, self.nbytes)
            self._is_locked = True

    def unlock(self) -> None:
        """Lets the system swap its pages out again."""
        if self._is_locked:
            unlock_pages(self._address, self.nbytes)
            self._is_locked = False

    @property
    def _address(self) -> int:
        return self.tensor(0, torch.uint8, (1,)).data_ptr()

    def close(self) -> None:
        """Gives the pages back to the system at once, even if a tensor view still exists. They are no longer locked."""
        self.unlock()  # the system keeps pages that are locked
        mapped, start = self._within
        mapped.give_back(start, self.nbytes)


class _Mapped:
    """Private anonymous memory that begins at a huge page, if it is large enough for one."""

    def __init__(self, nbytes: int) -> None:
        huge_bytes = nbytes // _HUGE_PAGE * _HUGE_PAGE
        more = _HUGE_PAGE if huge_bytes else 0  # only addresses: memory that is never written to is not resident
        self._map = map_memory(nbytes + more)
        self._start = 0
        if huge_bytes:
            self._start = -torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr() % _HUGE_PAGE
            self._advise("MADV_HUGEPAGE", self._start, huge_bytes)
            # A huge page for the rest would take more memory than was requested.
            self._advise("MADV_NOHUGEPAGE", self._start + huge_bytes, nbytes + more - self._start - huge_bytes)
        self.view = memoryview(self._map)[self._start : self._start + nbytes]

    def give_back(self, start: int, nbytes: int) -> None:
        """Gives a part back to the system, which does not make it a huge page again. It then reads as zeros."""
        self._map.madvise(mmap.MADV_DONTNEED, self._start + start, nbytes)
        self._advise("MADV_NOHUGEPAGE", self._start + start, nbytes)

    def _advise(self, option: str, start: int, nbytes: int) -> None:
        """Advises the kernel. It may refuse, or have no transparent huge pages; nothing depends on it."""
        if hasattr(mmap, option):
            with suppress(OSError):
                self._map.madvise(getattr(mmap, option), start, nbytes)


class BufferLock:
    """Locks the buffers of an engine in memory: all of them, or none. Event-loop side only.

    Whether the limit allows it is checked before an engine begins to lock. If another part of the process has locked
    memory since then, there may be too little left for a buffer. Then all buffers are unlocked, and a warning says so.

    Attributes:
        is_on: Buffers are locked.
    """

    def __init__(self, *, is_on: bool = False) -> None:
        # All mutable state: whether buffers are locked, and which are or were.
        self.is_on = is_on
        self._locked: WeakSet[Buffer] = WeakSet()

    def add(self, buffers: Iterable[Buffer]) -> None:
        """Locks these buffers too, until they are closed."""
        for buffer in buffers if self.is_on else ():
            try:
                buffer.lock()
            except OSError as error:
                self.release()
                logger.warning("the engine's memory is no longer locked, because the system locks no more: %s", error)
                return
            self._locked.add(buffer)

    def release(self) -> None:
        """Unlocks all buffers, and locks none from now on."""
        self.is_on = False
        for buffer in self._locked:
            buffer.unlock()
        self._locked.clear()


@dataclass(frozen=True, slots=True)
class BufferPoolStatistics:
    """State of a pool.

    Attributes:
        num_buffers: All buffers.
        num_free: Buffers that nobody has taken.
    """

    num_buffers: int
    num_free: int


class BufferPool:
    """The memory of the ring: a free list of equal buffers, one for each streamed stage in memory.

    Nobody waits for a buffer: a lease of the ring's governor comes first. Event-loop side only.
    """

    def __init__(self, num_buffers: int, nbytes: int) -> None:
        # All mutable state: the free buffers, and the number of all buffers.
        self._free: deque[Buffer] = deque()
        self._num_buffers = 0
        self.add(num_buffers, nbytes)

    def add(self, num_buffers: int, nbytes: int) -> list[Buffer]:
        """Makes more buffers, and returns them. `nbytes` must be the size of the others, if there are any."""
        added = Buffer.side_by_side([nbytes] * num_buffers)
        for buffer in added:
            self._num_buffers += 1
            self.release(buffer)
        return added

    def remove_all(self) -> None:
        """Frees the memory of all buffers, which must be free."""
        assert len(self._free) == self._num_buffers
        self.close()
        self._num_buffers = 0

    def acquire_nowait(self) -> Buffer:
        """Takes a free buffer.

        Raises:
            anyio.WouldBlock: None is free.
        """
        if not self._free:
            raise anyio.WouldBlock
        return self._free.popleft()

    def release(self, buffer: Buffer) -> None:
        """Gives a buffer back. No thread may still write to it.

        Raises:
            ValueError: All buffers are free already.
        """
        if len(self._free) == self._num_buffers:
            raise ValueError("a buffer was released twice, or is not from this pool")
        self._free.append(buffer)

    def statistics(self) -> BufferPoolStatistics:
        return BufferPoolStatistics(self._num_buffers, len(self._free))

    def close(self) -> None:
        """Frees the memory of all free buffers."""
        while self._free:
            self._free.popleft().close()
