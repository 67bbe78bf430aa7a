"""The heap's thresholds stay where they are set, which only a process of its own can show."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

# A block of 16 MiB is freed, after which glibc would take blocks of up to 16 MiB from the heap.
PROGRAM = """
import ctypes
from hermes_async.memory.heap import bound_heap

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Statistics
print(bound_heap())
libc.free(libc.malloc(16 << 20))
before = libc.mallinfo2().hblks
block = libc.malloc(1 << 20)
print(libc.mallinfo2().hblks - before)
"""


def bounded_and_mapped(**variables: str) -> list[str]:
    """Whether thresholds were set, and how many mappings of its own a block of a MiB then is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the heap is not glibc's, or too old to tell")
class TestHeap:
    def test_what_a_sweep_has_freed_goes_back(self) -> None:
        assert bounded_and_mapped() == ["True", "1"]

    @pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
    def test_a_user_s_own_threshold_stands(self, name: str) -> None:
        assert bounded_and_mapped(**{name: "33554432"})[0] == "False"

    def test_a_user_s_own_tunable_stands(self) -> None:
        assert bounded_and_mapped(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=33554432") == ["False", "0"]
