"""What libraries keep beside a budget is bounded, which only a process of its own can show."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from hermes_async.memory.library_caches import KERNELS_PER_CACHE

# Each number of tokens takes a kernel of its own. In the second turn each is the one that was used longest ago.
MULTIPLYING = f"""
{{imports}}
import sys
import torch
weight = torch.ones(64, 64, dtype=torch.bfloat16)
with torch.inference_mode():
    for turn in range(2):
        print("turn", turn, flush=True)
        for num_tokens in range(2, {2 * KERNELS_PER_CACHE + 2}):
            torch.nn.functional.linear(torch.ones(num_tokens, 64, dtype=torch.bfloat16), weight)
"""


def kernels_made_again(imports: str, **variables: str) -> int:
    """In the second turn; none where the caches hold as many as the first turn made."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    environment |= {"ONEDNN_VERBOSE": "profile_create", **variables}
    done = subprocess.run(
        [sys.executable, "-c", MULTIPLYING.format(imports=imports)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, second = done.stdout.split("turn 1")
    if "create:cache_miss" not in first:
        pytest.skip("torch does not multiply bf16 with oneDNN here")
    return second.count("create:cache_miss")


@pytest.mark.parametrize("imports", ["import hermes_async", "import torch\nimport hermes_async"])
def test_the_caches_are_bounded(imports: str) -> None:
    assert kernels_made_again(imports) == 2 * KERNELS_PER_CACHE


def test_the_libraries_own_bounds_are_larger() -> None:
    assert kernels_made_again("") == 0


def test_a_user_s_own_bounds_stand() -> None:
    own = {"LRU_CACHE_CAPACITY": "100", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100"}
    assert kernels_made_again("import hermes_async", **own) == 0


# A block of 16 MiB is freed, after which glibc would take blocks of up to 16 MiB from the heap.
FREEING = """
import ctypes
from hermes_async.memory.library_caches import bound_heap

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


def bounded_and_mapped(program: str = FREEING, **variables: str) -> list[str]:
    """What a program prints: whether thresholds were set, and how many mappings of its own a block of a MiB then is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.split()


# Blocks of a MiB within `reused_heap`, and again after it, on a thread: how many new pages each takes.
REUSING = """
import resource, threading
import torch
from hermes_async.memory.library_caches import bound_heap, reused_heap

def new_pages(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        for numel in (1 << 18, 3 << 16):
            torch.ones(numel)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // count

def compute():
    print(new_pages(20) > 200)
    with reused_heap():
        new_pages(2)
        with reused_heap():
            pass
        print(new_pages(20) > 200)

print(bound_heap())
thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the heap is not glibc's, or too old to tell")
class TestHeap:
    def test_what_a_sweep_has_freed_goes_back(self) -> None:
        assert bounded_and_mapped() == ["True", "1"]

    @pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
    def test_a_user_s_own_threshold_stands(self, name: str) -> None:
        assert bounded_and_mapped(**{name: "33554432"})[0] == "False"

    def test_a_user_s_own_tunable_stands(self) -> None:
        assert bounded_and_mapped(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=33554432") == ["False", "0"]

    def test_a_product_uses_the_pages_of_the_one_before_again(self) -> None:
        assert bounded_and_mapped(REUSING) == ["True", "True", "False"]
