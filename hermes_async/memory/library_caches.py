"""Bounds the memory that oneDNN, torch and glibc keep for later use, in addition to baseline and budget.

oneDNN and torch keep kernels for each number of tokens that they have computed with. They read their limits when they
first compute with oneDNN, so the package imports this module before all others. It does not matter whether torch was
imported before. A program that has computed with oneDNN before keeps the libraries' own limits of 1,024 kernels each,
which can take more than a gibibyte.

glibc keeps freed memory. A larger block is a mapping of its own, and its size limit rises to 32 MiB as such blocks are
freed. Activations then come from the heap of the thread that computes, which keeps their pieces: 120 MiB after prompts
of some hundred lengths, in no lease. A limit that is set does not rise.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BESIDE_BUDGET_BYTES = 64 << 20
"""What an engine may take in addition to the baseline and its budget, for any model, prompt length and budget.

The kernels in the caches took 35 MiB at most, with matrices of 2 to 3,000 tokens. The rest is for thread stacks and
pieces of the heap. `python -m benchmarks.memory` checks it, also with weights that are dequantized.
"""

KERNELS_PER_CACHE = 16
"""A sweep uses a few: one for each shape of a layer's matrices."""

MMAP_THRESHOLD = 256 << 10
"""A block of memory from this size on is a mapping of its own, which goes back to the system when it is freed."""

TRIM_THRESHOLD = 4 << 20
"""Free memory at the end of a heap goes back to the system from this size on. With less, small sweeps would get it anew
each time."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_HEAP_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

for _variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, str(KERNELS_PER_CACHE))  # a user's own setting stays


REUSED_BYTES = 8 << 20
"""Within `reused_heap`, blocks of memory of less than this come from the heap."""


def bound_heap() -> bool:
    """Sets both thresholds of the heap, for the whole process.

    Returns:
        False if the user has set one of them, or the allocator is not glibc's.
    """
    return _HEAP.bound()


@contextmanager
def reused_heap() -> Iterator[None]:
    """Within the block, memory that is freed stays in the heap, and is used again for blocks of the same size.

    The system zeroes each page of a new mapping, which takes longer than to dequantize the numbers that are written
    there. Where `bound_heap` has set no thresholds, this changes nothing. They hold for the whole process; after the
    block, the heaps shrink again to what `bound_heap` allows.
    """
    _HEAP.raise_thresholds()
    try:
        yield
    finally:
        _HEAP.lower_thresholds()


class _Heap:
    """The heap of glibc. All state: how to set a threshold, if they are set here; and how many have raised them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set: Callable[[int, int], int] | None = None
        self._num_raised = 0

    def bound(self) -> bool:
        if not sys.platform.startswith("linux") or any(name in os.environ for name in _HEAP_VARIABLES):
            return False
        tunables = os.environ.get("GLIBC_TUNABLES", "")
        if "glibc.malloc.mmap_threshold" in tunables or "glibc.malloc.trim_threshold" in tunables:
            return False
        import ctypes  # not needed by `import hermes_async`

        try:
            mallopt = ctypes.CDLL(None).mallopt
        except AttributeError:  # not glibc
            return False
        with self._lock:
            # Both, because setting one freezes the other at its current value.
            if not (mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD) and mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)):
                return False
            self._set = mallopt
            if self._num_raised:
                self._raise()
        return True

    def raise_thresholds(self) -> None:
        with self._lock:
            self._num_raised += 1
            if self._num_raised == 1:
                self._raise()

    def lower_thresholds(self) -> None:
        with self._lock:
            self._num_raised -= 1
            if self._num_raised == 0 and self._set is not None:
                self._set(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
                self._set(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)

    def _raise(self) -> None:
        if self._set is not None:
            self._set(_M_MMAP_THRESHOLD, REUSED_BYTES)
            self._set(_M_TRIM_THRESHOLD, 4 * REUSED_BYTES)


_HEAP = _Heap()
