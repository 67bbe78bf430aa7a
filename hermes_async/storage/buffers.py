"""Page-aligned host buffers, made once and reused for as long as the engine lives."""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import anyio
import torch

_HUGE_PAGE = 2 << 20

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python has a name for it from 3.13 on
"""A mapping's flag: addresses alone are taken, and no swap is set aside for what is never written."""

ALIGNMENT = 4096
"""Direct I/O wants file offset, length and memory address to be multiples of this many bytes."""


def align_up(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def align_down(num_bytes: int) -> int:
    """The multiple of `ALIGNMENT` before."""
    return num_bytes // ALIGNMENT * ALIGNMENT


class Buffer:
    """Private anonymous memory of `nbytes` bytes (rounded up to whole pages), aligned to a page.

    With `pinned`, the memory comes from torch's pinned allocator, for copies to a CUDA device; elsewhere from
    `mmap`, in huge pages as far as whole ones go: a read into them is fewer requests to the disk, and takes fewer page
    faults. Memory counts as resident only once it was written to.

    Args:
        within: Memory that it is a part of, and where it begins there; without it has memory of its own.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False, within: tuple[_Mapped, int] | None = None) -> None:
        self.nbytes = align_up(nbytes)
        self.view: memoryview
        self._within: tuple[_Mapped, int] | None = None
        if pinned:
            tensor = torch.empty(self.nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
            start = -tensor.data_ptr() % ALIGNMENT
            self.view = memoryview(tensor.numpy().data)[start : start + self.nbytes]
        else:
            mapped, start = self._within = within or (_Mapped(self.nbytes), 0)
            self.view = mapped.view[start : start + self.nbytes]

    @classmethod
    def side_by_side(cls, sizes: Sequence[int], *, pinned: bool = False) -> list[Buffer]:
        """Buffers of these sizes in one piece of memory, if they are not pinned.

        A huge page may then be part of two of them. If each had memory of its own, what is more than whole huge pages
        would be small ones in each: into buffers of 9 MiB a disk of 2.8 GiB/s gave 2.4.
        """
        if pinned or not sizes:
            return [cls(nbytes, pinned=pinned) for nbytes in sizes]
        *starts, end = accumulate(map(align_up, sizes), initial=0)
        mapped = _Mapped(end)
        return [cls(nbytes, within=(mapped, start)) for nbytes, start in zip(sizes, starts, strict=True)]

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of the buffer as a tensor: no copy, and it keeps the memory alive."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.view, dtype=dtype, count=count, offset=offset).view(shape)

    def close(self) -> None:
        """Gives the pages back to the system at once, even while a tensor view is still alive somewhere."""
        if self._within is not None:
            mapped, start = self._within
            mapped.give_back(start, self.nbytes)


class _Mapped:
    """Private anonymous memory that begins at a huge page, if there is room for one."""

    def __init__(self, nbytes: int) -> None:
        huge_bytes = nbytes // _HUGE_PAGE * _HUGE_PAGE
        more = _HUGE_PAGE if huge_bytes else 0  # addresses alone: what nobody writes to is no memory
        self._map = mmap.mmap(-1, nbytes + more, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0x20))
        self._start = 0
        if huge_bytes:
            self._start = -torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr() % _HUGE_PAGE
            self._advise("MADV_HUGEPAGE", self._start, huge_bytes)
            # A huge page for the rest would be more memory than was asked for.
            self._advise("MADV_NOHUGEPAGE", self._start + huge_bytes, nbytes + more - self._start - huge_bytes)
        self.view = memoryview(self._map)[self._start : self._start + nbytes]

    def give_back(self, start: int, nbytes: int) -> None:
        """To the system, which does not fill it up to a huge page again; what is read there afterwards is zeros."""
        self._map.madvise(mmap.MADV_DONTNEED, self._start + start, nbytes)
        self._advise("MADV_NOHUGEPAGE", self._start + start, nbytes)

    def _advise(self, option: str, start: int, nbytes: int) -> None:
        """Kernels without transparent huge pages refuse, and not every system has them; nothing depends on it."""
        if hasattr(mmap, option):
            with suppress(OSError):
                self._map.madvise(getattr(mmap, option), start, nbytes)


@dataclass(frozen=True, slots=True)
class BufferPoolStatistics:
    """Attributes: num_buffers: all; num_free: not in use."""

    num_buffers: int
    num_free: int


class BufferPool:
    """The ring: a fixed number of equal buffers.

    Their number is what caps how many streamed stages are in memory at once, and so what holds the loading agents back.
    Event-loop side only.
    """

    def __init__(self, num_buffers: int, nbytes: int, *, pinned: bool = False) -> None:
        # All mutable state: the buffers that nobody has, and how many there are in all.
        self._free: deque[Buffer] = deque()
        self._num_buffers = 0
        self.add(num_buffers, nbytes, pinned=pinned)

    def add(self, num_buffers: int, nbytes: int, *, pinned: bool = False) -> None:
        """Makes more buffers, as large as those that are there."""
        for buffer in Buffer.side_by_side([nbytes] * num_buffers, pinned=pinned):
            self._num_buffers += 1
            self.release(buffer)

    def acquire_nowait(self) -> Buffer:
        """Takes a free buffer.

        Raises:
            anyio.WouldBlock: None is free.
        """
        if not self._free:
            raise anyio.WouldBlock
        return self._free.popleft()

    def release(self, buffer: Buffer) -> None:
        """Gives a buffer back; no thread may still write to it.

        Raises:
            ValueError: There were no more out.
        """
        if len(self._free) == self._num_buffers:
            raise ValueError("a buffer was released that is not this pool's, or twice")
        self._free.append(buffer)

    def statistics(self) -> BufferPoolStatistics:
        return BufferPoolStatistics(self._num_buffers, len(self._free))

    def close(self) -> None:
        """Frees the memory of the buffers that were given back."""
        while self._free:
            self._free.popleft().close()
