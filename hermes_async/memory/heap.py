"""Makes the heap give back what a sweep has freed, so that the workspace's lease is all that activations take.

glibc's threshold, from which on a block of memory is a mapping of its own, rises to 32 MiB as larger blocks are freed.
Activations then come from the heap of the thread that computes, which keeps their pieces: 120 MiB after prompts of some
hundred lengths, and nobody has leased it. A threshold that is set stays.
"""

from __future__ import annotations

import ctypes
import os
import sys

MMAP_THRESHOLD = 256 << 10
TRIM_THRESHOLD = 4 << 20
"""What is free at the end of a heap goes back to the system when it is more; or each small sweep would take it anew."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def bound_heap() -> bool:
    """Sets both thresholds, for the whole process; False where the user or another allocator has decided on them."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _USERS_OWN):
        return False
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.mmap_threshold" in tunables or "glibc.malloc.trim_threshold" in tunables:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    # Each sets what the other one left alone to a constant, too.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))
