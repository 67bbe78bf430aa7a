"""What the process holds, and what the machine and its cgroups would still give it, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hermes_async.errors import ConfigError
from hermes_async.memory.other_processes import memory_cgroups

HEADROOM_SHARE = 0.05
"""The least share of the memory that is left to other programs."""

OVERHEAD_BYTES = 32 << 20
"""What engines take in addition to their budgets, in each process: kernels, thread stacks, pieces of the heap.

`python -m benchmarks.auto_limits` measures it: `EngineStatistics.bytes_beside_budget`.
"""

NEIGHBOUR_BYTES = 16 << 20
"""What other programs under the same limit may take before an engine has looked and given memory back."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit on this process's memory: the machine's own, or that of a cgroup.

    Attributes:
        free: Bytes that this process may still take.
        hierarchy: The cgroup's hierarchy: "memory", or "" for version 2 and for the machine.
        group: The cgroup's path in it; "" is the root, and the machine.
        total: All bytes that the limit allows, used ones too; 0 if the system does not tell.
        processes: All processes under the limit, by their number; None for the machine, or if the system does not tell.
    """

    free: int
    hierarchy: str = ""
    group: str = ""
    total: int = 0
    processes: frozenset[int] | None = None

    def has_neighbours(self, known: Collection[int] = ()) -> bool:
        """Whether there are, or may be, other processes under the limit than this one and the `known` ones."""
        return self.processes is None or bool(self.processes - {os.getpid(), *known})


# --- this process ---


def process_rss_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return process_peak_rss_bytes()
    return pages * resource.getpagesize()


def process_peak_rss_bytes() -> int:
    """The most resident memory that this process ever had. Reads no file, so the event loop may call it.

    On Linux, a process inherits this figure from the process that started it. It is then too high until the process has
    taken more itself.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- the machine and its cgroups ---


def automatic_budget(root: Path = Path("/")) -> int:
    """What one engine alone may take: `free_bytes` less `headroom`.

    Raises:
        ConfigError: The system does not tell.
    """
    return min(
        max(0, limit.free - headroom(limit.free, neighbours=limit.has_neighbours())) for limit in memory_limits(root)
    )


def headroom(total: int, unleased: int = 0, num_processes: int = 1, *, neighbours: bool = True) -> int:
    """How much of `total` no budget takes: a share for other programs, and at least the engines' overhead.

    Args:
        unleased: Bytes of overhead that are already taken, and so are no longer in `total`. The headroom was meant
            for them, and shrinks by them. It keeps half of its size, for more of them.
        num_processes: The processes with engines that share `total`.
        neighbours: Whether there may be other programs under the limit.
    """
    least = num_processes * (OVERHEAD_BYTES + (NEIGHBOUR_BYTES if neighbours else 0))
    full = max(least, int((total + unleased) * HEADROOM_SHARE))
    return max(full - unleased, full // 2)


def free_bytes(root: Path = Path("/")) -> int:
    """What the machine and all cgroups would still give this process.

    Raises:
        ConfigError: The system does not tell.
    """
    return min(limit.free for limit in memory_limits(root))


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The machine's limit, and those of the cgroups that this process is in.

    Raises:
        ConfigError: The system does not tell.
    """
    counts = memory_counts(root)
    machine = [MemoryLimit(counts["MemAvailable"], total=counts.get("MemTotal", 0))] if "MemAvailable" in counts else []
    limits = [*machine, *cgroup_limits(root)]
    if not limits:
        raise ConfigError("memory_budget='auto' works only on Linux; give a size such as '3GiB'")
    return limits


def stalled_share(root: Path = Path("/")) -> float:
    """The share of the last ten seconds in which a task waited for memory (PSI); 0.0 where the system does not tell."""
    try:
        some = (root / "proc/pressure/memory").read_text().splitlines()[0]
        return float(dict(item.split("=") for item in some.split()[1:])["avg10"]) / 100
    except (OSError, ValueError, KeyError, IndexError):
        return 0.0


def memory_counts(root: Path = Path("/")) -> dict[str, int]:
    """The kernel's own counts (`/proc/meminfo`), in bytes, by name; empty where the system does not tell."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    counts = (line.split() for line in lines)
    return {count[0].rstrip(":"): int(count[1]) * 1024 for count in counts if len(count) == 3 and count[2] == "kB"}


def cgroup_limits(root: Path) -> list[MemoryLimit]:
    """The limits of this process's cgroup and of each one above it."""
    try:
        groups = memory_cgroups((root / "proc/self/cgroup").read_text())
    except OSError:
        return []
    limits = []
    for hierarchy, path in groups.items():
        parts = [part for part in path.split("/") if part]
        # A container sees its own group at the root of the mount, under any path that the host has for it.
        for depth in range(len(parts) + 1):
            folder = (root / "sys/fs/cgroup" / hierarchy).joinpath(*parts[:depth])
            found = _total_and_free(folder, is_version_1=bool(hierarchy))
            if found is not None:
                total, free = found
                group = "".join(f"/{part}" for part in parts[:depth])
                limits.append(MemoryLimit(max(0, free), hierarchy, group, total, _processes(folder)))
    return limits


def _processes(folder: Path) -> frozenset[int] | None:
    """The processes of a cgroup and of those in it, by their number here; 0 for one that this process cannot see."""
    try:
        files = [folder / "cgroup.procs", *folder.glob("**/*/cgroup.procs")]
        return frozenset(int(number) for file in files for number in file.read_text().split())
    except (OSError, ValueError):
        return None


def _total_and_free(folder: Path, *, is_version_1: bool) -> tuple[int, int] | None:
    """The cgroup's limit, and what its use leaves of it; None if it has no limit."""
    limit_file, use_file, prefix = "memory.max", "memory.current", ""
    if is_version_1:
        limit_file, use_file, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
    try:
        text = (folder / limit_file).read_text().strip()
        if text == "max" or int(text) >= 2**60:
            return None
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        counts = {name.removeprefix(prefix): int(count) for name, count in lines if name.startswith(prefix)}
        # The kernel would give up page cache, even if it was used twice. It would not give up the code that runs.
        cache = counts.get("inactive_file", 0) + counts.get("active_file", 0)
        mapped = counts.get("file_mapped", counts.get("mapped_file", 0))
        return int(text), int(text) - int((folder / use_file).read_text()) + max(0, cache - mapped)
    except (OSError, ValueError):
        return None
