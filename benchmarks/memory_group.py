"""Makes a memory cgroup (version 1 or 2) with a hard limit, and measures the most that its processes use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.folders import undone_after_sigterm

GROUP_PREFIX = "hermes-auto-"
_SECONDS_BETWEEN_SAMPLES = 0.01
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class _Hierarchy:
    """Where groups are, and the names of their files and counts."""

    mount: Path
    used: str
    limit: str
    peak: str
    events: str
    cache: tuple[str, str]
    mapped: str


_V1 = _Hierarchy(
    Path("/sys/fs/cgroup/memory"),
    used="memory.usage_in_bytes",
    limit="memory.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
    cache=("total_inactive_file", "total_active_file"),
    mapped="total_mapped_file",
)
_V2 = _Hierarchy(
    Path("/sys/fs/cgroup"),
    used="memory.current",
    limit="memory.max",
    peak="memory.peak",
    events="memory.events",
    cache=("inactive_file", "active_file"),
    mapped="file_mapped",
)


class MemoryGroupError(SystemExit):
    """No memory cgroup can be made."""


class _ProcessMemory:
    """Starts a process, and measures its memory."""

    def __init__(self) -> None:
        self.peak_used_bytes = 0
        self.samples: list[int] = []

    @property
    def used_bytes(self) -> int:
        raise NotImplementedError

    def start(
        self,
        arguments: Sequence[str],
        python: Path = Path(sys.executable),
        environment: Mapping[str, str] | None = None,
        errors: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Starts `python` with these arguments, with pipes as standard streams.

        Args:
            environment: Variables beside this process's own.
            errors: Takes what the process writes to standard error; None leaves it with this process's own.
        """
        return subprocess.Popen(
            [*self._prefix(), str(python), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | dict(environment or {}),
            text=True,
        )

    def _prefix(self) -> list[str]:
        """The command that starts the given one."""
        return []

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Keeps `samples` of what is used, and `peak_used_bytes`, while the body runs."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(_SECONDS_BETWEEN_SAMPLES):
                self.samples.append(self.used_bytes)
                self.peak_used_bytes = max(self.peak_used_bytes, self.samples[-1])

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class MemoryGroup(_ProcessMemory):
    """A memory cgroup; counts are in bytes. `used` is all memory but unmapped page cache, which can be reclaimed."""

    def __init__(self, hierarchy: _Hierarchy, path: Path) -> None:
        super().__init__()
        self._files = hierarchy
        self._path = path

    @property
    def used_bytes(self) -> int:
        cache = self.page_cache_bytes - self._counts("memory.stat")[self._files.mapped]
        return self._count(self._files.used) - max(0, cache)

    @property
    def page_cache_bytes(self) -> int:
        counts = self._counts("memory.stat")
        return sum(counts[name] for name in self._files.cache)

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged to the group, page cache included; None if the kernel does not keep it."""
        with suppress(FileNotFoundError):
            return self._count(self._files.peak)
        return None

    @property
    def num_killed(self) -> int:
        """Processes that the kernel ended because the limit was reached."""
        return self._counts(self._files.events)["oom_kill"]

    def forget_peak(self) -> None:
        """Begins `peak_bytes` anew. Version 2 of cgroups does not allow that, and keeps it."""
        if self._files is _V1:
            (self._path / self._files.peak).write_text("0")

    def limit(self, limit_bytes: int) -> None:
        """Sets another hard limit."""
        (self._path / self._files.limit).write_text(str(limit_bytes))

    @property
    def swapped_bytes(self) -> int:
        """What its processes have on a swap device; 0 where the kernel does not count it."""
        counts = self._counts("memory.stat")
        if self._files is _V1:
            return counts.get("total_swap", 0)
        with suppress(FileNotFoundError):
            return self._count("memory.swap.current")
        return 0

    @contextmanager
    def inner(self, name: str) -> Iterator[MemoryGroup]:
        """A group in this one, without a limit of its own. Its processes are ended at the end, and it is removed."""
        if self._files is _V2:
            (self._path / "cgroup.subtree_control").write_text("+memory")
        path = self._path / name
        path.mkdir()
        group = MemoryGroup(self._files, path)
        try:
            yield group
        finally:
            group.remove()

    def remove(self) -> None:
        """Ends the processes that are left, and removes the group."""
        deadline = time.monotonic() + _SECONDS_TO_END
        while left := (self._path / "cgroup.procs").read_text().split():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise SystemExit(f"processes {', '.join(left)} of {self._path} do not end")
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        if self._files is _V1:
            (self._path / "memory.force_empty").write_text("0")
        self._path.rmdir()

    def _prefix(self) -> list[str]:
        return ["/bin/sh", "-c", f'echo $$ > {self._path}/cgroup.procs && exec "$@"', "sh"]

    def _count(self, file: str) -> int:
        return int((self._path / file).read_text())

    def _counts(self, file: str) -> dict[str, int]:
        lines = (line.split() for line in (self._path / file).read_text().splitlines())
        return {name: int(count) for name, count in lines}


class LoneProcess(_ProcessMemory):
    """A process in no group of its own: nothing limits its memory, and `used` is its resident memory."""

    peak_bytes = None
    num_killed = 0

    def start(self, *args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        self._process = super().start(*args, **kwargs)
        return self._process

    @property
    def used_bytes(self) -> int:
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


@contextmanager
def memory_group(limit_bytes: int | None) -> Iterator[MemoryGroup]:
    """Makes a group with a hard limit, or none yet. At the end, its processes are ended, and it is removed.

    Raises:
        MemoryGroupError: There is no memory controller, or only root may make groups.
    """
    with undone_after_sigterm():
        group = _made()
        try:
            if limit_bytes is not None:
                group.limit(limit_bytes)
            yield group
        finally:
            group.remove()


def _made() -> MemoryGroup:
    v1 = (_V1.mount / _V1.used).exists()
    hierarchy = _V1 if v1 else _V2
    path = hierarchy.mount / f"{GROUP_PREFIX}{os.getpid()}"
    try:
        if not v1:
            # The disk is held by the same group: in version 2, a process is in one.
            controllers = (_V2.mount / "cgroup.controllers").read_text().split()
            wanted = " ".join(f"+{name}" for name in ("memory", "io") if name in controllers)
            (_V2.mount / "cgroup.subtree_control").write_text(wanted)
        path.mkdir()
        if not (path / hierarchy.limit).exists():
            path.rmdir()
            raise FileNotFoundError("no memory controller")
    except OSError as error:
        raise MemoryGroupError(f"a memory cgroup cannot be made in {hierarchy.mount} ({error}); be root") from error
    return MemoryGroup(hierarchy, path)


def line_of(pipe: IO[str] | None) -> str:
    """The next line that a process writes; empty when it has ended."""
    assert pipe is not None
    return pipe.readline().strip()


def let_go_on(process: subprocess.Popen[str]) -> None:
    """Tells a process that waits for a line to go on. If it has ended, its exit code tells that."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write("go\n")
        process.stdin.flush()
