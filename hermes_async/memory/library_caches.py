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

BESIDE_BUDGET_BYTES = 64 << 20
"""What an engine may take in addition to the baseline and its budget, for any model, prompt length and budget.

The kernels in the caches took 35 MiB at most, with matrices of 2 to 3,000 tokens. The rest is for thread stacks and
pieces of the heap. `python -m benchmarks.memory` checks it.
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


def bound_heap() -> bool:
    """Sets both thresholds of the heap, for the whole process.

    Returns:
        False if the user has set one of them, or the allocator is not glibc's.
    """
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
    # Both, because setting one freezes the other at its current value.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))
