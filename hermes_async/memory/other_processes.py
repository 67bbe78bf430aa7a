"""Engines of the user's other processes, which share the machine's memory, and that of cgroups, with this one's."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_START_TIME = 21  # among the fields of /proc/PID/stat


@dataclass(frozen=True, slots=True)
class Claimed:
    """What the engines of one process claim together.

    Attributes:
        budget: Bytes of all budgets that are decided.
        fixed: Bytes of those that do not follow the machine.
        num_automatic: Engines that follow it.
        num_undecided: Engines that have no budget yet.
        baseline: Bytes that the process holds beside its engines.
    """

    budget: int
    fixed: int
    num_automatic: int
    num_undecided: int
    baseline: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another process; `held` bytes of its budgets are in memory by now, and `groups` are its cgroups by hierarchy."""

    claimed: Claimed
    held: int
    groups: Mapping[str, str]

    def is_in(self, hierarchy: str, group: str) -> bool:
        """Whether a limit of that cgroup is this process's too; everybody is in the root group."""
        own = self.groups.get(hierarchy, "")
        return group == "" or own == group or own.startswith(f"{group}/")


class Neighbourhood:
    """A file for each process, which others read. Where there can be none, processes do not know of each other.

    Nothing waits for another process, and one that ended without taking its file away is passed over: of whoever has
    its number now, the start is another.

    Args:
        folder: In memory; of this user alone.
        proc: Where the kernel tells of processes.
    """

    def __init__(self, folder: Path, proc: Path = Path("/proc")) -> None:
        self._folder = folder
        self._proc = proc

    def publish(self, claimed: Claimed | None) -> None:
        """Tells others what this process claims now, or that it has no engine any more."""
        name = self._own_name()
        if name is None:
            return
        file = self._folder / name
        with suppress(OSError):
            if claimed is None:
                file.unlink(missing_ok=True)
                return
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not self._is_ours():
                return
            record = {**asdict(claimed), "started": self._started(str(os.getpid()))}
            unfinished = file.with_name(f".{name}")
            unfinished.write_text(json.dumps(record))
            unfinished.replace(file)

    def look(self) -> list[Neighbour]:
        """Other processes with engines that are alive now."""
        own = self._own_name()
        if own is None or not self._is_ours():
            return []
        space = own.partition("-")[0]
        files = [file for file in self._folder.glob(f"{space}-*") if file.name != own]
        return [neighbour for file in files if (neighbour := self._neighbour(file)) is not None]

    def _neighbour(self, file: Path) -> Neighbour | None:
        pid = file.name.partition("-")[2]
        try:
            record = json.loads(file.read_text())
            if record.pop("started") != self._started(pid):
                file.unlink(missing_ok=True)
                return None
            claimed = Claimed(**record)
            rss = int((self._proc / pid / "statm").read_text().split()[1]) * resource.getpagesize()
            groups = cgroups((self._proc / pid / "cgroup").read_text())
            held = min(claimed.budget, max(0, rss - claimed.baseline))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
            return None  # it ended meanwhile, or is of another version
        return Neighbour(claimed, held, groups)

    def _started(self, pid: str) -> str | None:
        """When the process started, in the kernel's own count; None where there is none."""
        try:
            return (self._proc / pid / "stat").read_text().rpartition(")")[2].split()[_START_TIME - 2]
        except (OSError, IndexError):
            return None

    def _own_name(self) -> str | None:
        """A process's number means something in its own namespace alone."""
        try:
            space = (self._proc / "self/ns/pid").readlink().name.strip("pid:[]")
        except OSError:
            return None
        return f"{space}-{os.getpid()}"

    def _is_ours(self) -> bool:
        try:
            status = self._folder.lstat()
        except OSError:
            return False
        return self._folder.is_dir() and not self._folder.is_symlink() and status.st_uid == os.getuid()


def cgroups(text: str) -> dict[str, str]:
    """The groups of a process that limit its memory, by hierarchy ("" for version 2), from its `cgroup` file."""
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            groups["memory" if controllers else ""] = path.rstrip("/")
    return groups
