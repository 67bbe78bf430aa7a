"""What the process holds and what the machine would still give it, in bytes."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from hermes_async.errors import ConfigError
from hermes_async.memory.other_processes import cgroups

HEADROOM = 0.05
"""The share of the room that is left to others, at the least."""

OVERHEAD_BYTES = 32 << 20
"""What engines take beside their budgets in each process: kernels, stacks of threads, pieces of the heap."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that something would still give this process: the machine, or a cgroup of a hierarchy that limits it."""

    free: int
    hierarchy: str = ""
    group: str = ""


def process_rss_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return process_peak_rss_bytes()
    return pages * resource.getpagesize()


def process_peak_rss_bytes() -> int:
    """The most resident memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def automatic_budget(root: Path = Path("/")) -> int:
    """The tightest of the cgroup's room (v1 and v2) and the memory available, less `headroom`.

    What the process holds already (the baseline) is taken off by both figures.

    Raises:
        ConfigError: The system tells neither.
    """
    room = room_bytes(root)
    return max(0, room - headroom(room))


def headroom(room: int, beside: int = 0, num_processes: int = 1) -> int:
    """What of `room` no budget takes: a share for others, and not less than what engines take beside their budgets.

    Args:
        beside: Bytes that have been taken beside budgets already, which are no longer in `room`. They are what was set
            aside for that; half as much again may come.
        num_processes: With engines, in this room.
    """
    whole = max(num_processes * OVERHEAD_BYTES, int((room + beside) * HEADROOM))
    return max(whole - beside, whole // 2)


def room_bytes(root: Path = Path("/")) -> int:
    """What the machine and the cgroups would still give this process.

    Raises:
        ConfigError: The system does not tell.
    """
    return min(room.free for room in rooms(root))


def rooms(root: Path = Path("/")) -> list[Room]:
    """What each would still give: the machine, and each cgroup that this process is in and that has a limit.

    Raises:
        ConfigError: The system does not tell.
    """
    available = _available(root)
    found = _cgroup_rooms(root) if available is None else [Room(available), *_cgroup_rooms(root)]
    if not found:
        raise ConfigError("memory_budget='auto' works only on Linux; give a size such as '3GiB'")
    return found


def stalled_share(root: Path = Path("/")) -> float:
    """Of the last ten seconds, the share in which some task waited for memory (PSI); 0.0 where that is not told."""
    try:
        some = (root / "proc/pressure/memory").read_text().splitlines()[0]
        return float(dict(item.split("=") for item in some.split()[1:])["avg10"]) / 100
    except (OSError, ValueError, KeyError, IndexError):
        return 0.0


def _available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_rooms(root: Path) -> list[Room]:
    """Limit less use of this process's cgroup and of each one above it."""
    try:
        groups = cgroups((root / "proc/self/cgroup").read_text())
    except OSError:
        return []
    found = []
    mount = root / "sys/fs/cgroup"
    for hierarchy, path in groups.items():
        if hierarchy == "":
            base, limit, used, prefix = mount, "memory.max", "memory.current", ""
        else:
            base, limit, used, prefix = (
                mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_",
            )  # fmt: skip
        parts = [part for part in path.split("/") if part]
        # A container sees its own group at the mount's root, under whatever path the host has for it.
        for depth in range(len(parts) + 1):
            free = _room(base.joinpath(*parts[:depth]), limit, used, prefix)
            if free is not None:
                found.append(Room(max(0, free), hierarchy, "".join(f"/{part}" for part in parts[:depth])))
    return found


def _room(group: Path, limit: str, used: str, prefix: str) -> int | None:
    try:
        text = (group / limit).read_text().strip()
        if text == "max" or int(text) >= 2**60:
            return None
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        counts = {name.removeprefix(prefix): int(count) for name, count in lines if name.startswith(prefix)}
        # Page cache that the kernel would give up, also what was used twice; but not the code that runs.
        cache = counts.get("inactive_file", 0) + counts.get("active_file", 0)
        mapped = counts.get("file_mapped", counts.get("mapped_file", 0))
        return int(text) - int((group / used).read_text()) + max(0, cache - mapped)
    except (OSError, ValueError):
        return None
