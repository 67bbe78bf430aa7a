"""Measures the disk's rate, and holds it at a steady limit.

As a program, it reads `[[[file, offset, nbytes], ...], ...]` and a number of threads from stdin as JSON, and prints
seconds. It is a process of its own, so that its buffers are not in the engine's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.folders import undone_after_sigterm
from benchmarks.memory_group import GROUP_PREFIX
from hermes_async.storage.buffers import Buffer, align_down, align_up
from hermes_async.storage.shard import ReadRange

_CGROUPS = Path("/sys/fs/cgroup")


def read_directly(groups: Sequence[Sequence[ReadRange]], num_threads: int) -> float:
    """Reads each group of ranges with plain direct `preadv`, `num_threads` groups at once; returns seconds."""
    files = {item.file for group in groups for item in group}
    with contextlib.ExitStack() as exits:
        handles = {}
        for file in files:
            handles[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
            exits.callback(os.close, handles[file])
        largest = max(align_up(item.nbytes) + 8192 for group in groups for item in group)
        buffers = [Buffer(largest) for _ in range(num_threads)]  # as the engine's own: a read is fewer requests
        for buffer in buffers:
            exits.callback(buffer.close)
            buffer.view[:] = bytes(buffer.nbytes)  # page faults are not the disk's
        free = list(buffers)

        def read(group: Sequence[ReadRange]) -> None:
            buffer = free.pop()
            for item in group:
                offset = align_down(item.offset)
                wanted = item.offset + item.nbytes - offset
                done = 0
                while done < wanted:
                    done += os.preadv(handles[item.file], [buffer.view[done : align_up(wanted)]], offset + done)
            free.append(buffer)

        started = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(read, groups))
        return time.perf_counter() - started


@contextlib.contextmanager
def limited_disk(path: Path, bytes_per_second: int | None, process_id: int | None = None) -> Iterator[str | None]:
    """Holds a process's reads from the disk under `path` to a rate, by a cgroup (v1 or v2; needs root).

    Args:
        process_id: None takes this process.

    Yields None, or the reason why there is no limit.
    """
    if bytes_per_second is None:
        yield "not asked for"
        return
    held = os.getpid() if process_id is None else process_id
    name = f"hermes-benchmark-{held}"
    shared = _memory_group_of(held)
    device = _block_device(path)
    v1, v2 = _CGROUPS / "blkio", _CGROUPS
    try:
        if (v1 / "cgroup.procs").exists():
            group, home = v1 / name, v1
            group.mkdir()
            (group / "blkio.throttle.read_bps_device").write_text(f"{device} {bytes_per_second}")
        elif shared is not None and (shared / "io.max").exists():
            (shared / "io.max").write_text(f"{device} rbps={bytes_per_second}")
            try:
                yield None
            finally:
                (shared / "io.max").write_text(f"{device} rbps=max")
            return
        elif "io" in (v2 / "cgroup.controllers").read_text().split():
            group, home = v2 / name, v2
            (v2 / "cgroup.subtree_control").write_text("+io")
            group.mkdir()
            (group / "io.max").write_text(f"{device} rbps={bytes_per_second}")
        else:
            yield "no io controller among the cgroups"
            return
    except OSError as error:
        yield f"cgroup limits are not to be had: {error}"
        return
    with undone_after_sigterm():
        (group / "cgroup.procs").write_text(str(held))
        try:
            yield None
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                (home / "cgroup.procs").write_text(str(held))
            group.rmdir()


def _memory_group_of(process_id: int) -> Path | None:
    """The group of `benchmarks.memory_group` that a process is in; in version 2, it also holds the disk."""
    for line in Path(f"/proc/{process_id}/cgroup").read_text().splitlines():
        path = Path(line.partition("::")[2] or "/")
        if line.startswith("0::") and path.name.startswith(GROUP_PREFIX):
            return _CGROUPS / path.relative_to("/")
    return None


def _block_device(path: Path) -> str:
    """major:minor of the whole disk under `path`: limits apply to disks, not to partitions."""
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    partition = Path(f"/sys/dev/block/{device}").resolve()
    if (partition / "partition").exists():
        return (partition.parent / "dev").read_text().strip()
    return device


def main() -> None:
    asked = json.load(sys.stdin)
    groups = [[ReadRange(Path(file), offset, nbytes, 0) for file, offset, nbytes in group] for group in asked["groups"]]
    print(read_directly(groups, asked["num_threads"]))


if __name__ == "__main__":
    main()
