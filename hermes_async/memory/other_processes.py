"""How processes of one user tell each other what memory their engines claim: one small file for each process."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hermes_async.storage.file_kinds import is_dir
from hermes_async.storage.own_file import NewFile, remove_if_left

_START_TIME = 21  # among the fields of /proc/PID/stat


@dataclass(frozen=True, slots=True)
class ProcessClaims:
    """What the engines of one process claim together.

    Attributes:
        budget: Bytes that they may come to hold of their budgets, as far as that is decided.
        fixed: Those of engines whose budget does not follow the machine.
        num_automatic: Engines whose budget follows the machine.
        num_undecided: Those of them that have no budget yet.
        baseline: Bytes that the process holds beside its engines.
    """

    budget: int
    fixed: int
    num_automatic: int
    num_undecided: int
    baseline: int


@dataclass(frozen=True, slots=True)
class OtherProcess:
    """Another process with engines.

    Attributes:
        pid: Its number.
        claims: What its engines claim.
        held: Bytes of its budgets that are in memory now.
        groups: Its cgroups, by hierarchy.
    """

    pid: int
    claims: ProcessClaims
    held: int
    groups: Mapping[str, str]

    def is_in(self, hierarchy: str, group: str) -> bool:
        """Whether the limit of that cgroup also limits this process. The root group limits all."""
        own = self.groups.get(hierarchy, "")
        return group == "" or own == group or own.startswith(f"{group}/")


class ProcessRegistry:
    """A folder with a file for each process, which the others read.

    Where there can be no such folder, processes do not know of each other. Nothing waits for another process. A file
    that an ended process has left is ignored: if its number is in use again, that process has another start time.

    Args:
        folder: In memory, and owned by this user.
        proc: Where the kernel tells of processes.
    """

    def __init__(self, folder: Path, proc: Path = Path("/proc")) -> None:
        self._folder = folder
        self._proc = proc

    def publish(self, claims: ProcessClaims | None) -> None:
        """Tells other processes what this one claims now; None tells that it has no engine any more."""
        name = self._own_name()
        if name is None:
            return
        file = self._folder / name
        with suppress(OSError):
            if claims is None:
                file.unlink(missing_ok=True)
                return
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not self._is_ours():
                return
            record = {**asdict(claims), "started": self._start_time(str(os.getpid()))}
            with NewFile(file) as new:
                new.file.write(json.dumps(record).encode())

    def others(self) -> list[OtherProcess]:
        """The other processes that have engines and are alive."""
        own = self._own_name()
        if own is None or not self._is_ours():
            return []
        namespace = own.partition("-")[0]
        for unfinished in self._folder.glob(f".{namespace}-*"):  # of any process, which may have been killed
            remove_if_left(unfinished)
        files = [file for file in self._folder.glob(f"{namespace}-*") if file.name != own]
        return [process for file in files if (process := self._read(file)) is not None]

    def _read(self, file: Path) -> OtherProcess | None:
        pid = file.name.partition("-")[2]
        try:
            record = json.loads(file.read_text())
            if record.pop("started") != self._start_time(pid):
                file.unlink(missing_ok=True)
                return None
            claims = ProcessClaims(**record)
            rss = int((self._proc / pid / "statm").read_text().split()[1]) * resource.getpagesize()
            groups = memory_cgroups((self._proc / pid / "cgroup").read_text())
            held = min(claims.budget, max(0, rss - claims.baseline))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
            return None  # it has ended meanwhile, or is of another version
        return OtherProcess(int(pid), claims, held, groups)

    def _start_time(self, pid: str) -> str | None:
        """When the process started, in the kernel's own unit; None if there is no such process."""
        try:
            return (self._proc / pid / "stat").read_text().rpartition(")")[2].split()[_START_TIME - 2]
        except (OSError, IndexError):
            return None

    def _own_name(self) -> str | None:
        """Namespace and number of this process: a number means something only in its own namespace."""
        try:
            namespace = (self._proc / "self/ns/pid").readlink().name.strip("pid:[]")
        except OSError:
            return None
        return f"{namespace}-{os.getpid()}"

    def _is_ours(self) -> bool:
        try:
            status = self._folder.lstat()
        except OSError:
            return False
        return is_dir(self._folder) and not self._folder.is_symlink() and status.st_uid == os.getuid()


def memory_cgroups(text: str) -> dict[str, str]:
    """The cgroups that limit a process's memory, from its `cgroup` file.

    Returns:
        Their paths by hierarchy: "memory", or "" for version 2.
    """
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            groups["memory" if controllers else ""] = path.rstrip("/")
    return groups
