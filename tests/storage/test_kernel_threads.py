"""Threads that wait keep no kernel threads, because those would slow down the threads that compute."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from hermes_async.storage.kernel_threads import end_kernel_threads, openmp_libraries
from hermes_async.storage.threads import run_in_thread

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not openmp_libraries(), reason="OpenMP is not GNU's here"),
    pytest.mark.skipif(torch.get_num_threads() < 2, reason="kernels have one thread here"),
]

SUM = 2.0 * (1 << 20)


def threads() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def compute() -> float:
    return float(torch.ones(1 << 20).add_(1).sum())


def test_the_next_kernel_starts_new_ones() -> None:
    before, num_used = threads(), torch.get_num_threads()
    num_more, results = [], []

    def run() -> None:
        for _ in range(2):
            results.append(compute())
            num_more.append(len(threads() - before))
            end_kernel_threads()
            num_more.append(len(threads() - before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [SUM] * 2
    assert num_more == [num_used, 1] * 2
    assert torch.get_num_threads() == num_used


async def test_a_worker_thread_keeps_none() -> None:
    await run_in_thread(int)  # so that a worker is there
    before = threads()
    during = await run_in_thread(lambda: (compute(), threads()))
    assert during[0] == SUM
    assert len(during[1] - before) == torch.get_num_threads() - 1
    assert not threads() - before


def test_only_libraries_that_are_there_are_called(tmp_path: Path) -> None:
    """A file that was replaced has another name in the list. A file that is only read is no library."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    executable = next(line for line in lines if "libgomp" in line and line.split()[1] == "r-xp")
    *fields, path = executable.split(maxsplit=5)
    others = (f"{path} (deleted)", str(tmp_path / "libgomp.so.1"), str(tmp_path / "libgomp" / "model.safetensors"))
    read_only = " ".join([fields[0], "r--p", *fields[2:], path])
    none, one = tmp_path / "none", tmp_path / "one"
    none.write_text("\n".join([*(" ".join([*fields, other]) for other in others), read_only, " ".join(fields)]))
    one.write_text(executable)
    assert [len(openmp_libraries(maps)) for maps in (none, one, tmp_path / "missing")] == [0, 1, 0]
