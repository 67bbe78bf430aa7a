"""Makes a memory cgroup (version 1) with a hard limit, and measures the most that its processes use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from benchmarks.folders import undone_after_sigterm

_MOUNT = Path("/sys/fs/cgroup/memory")
_SECONDS_BETWEEN_SAMPLES = 0.01


class MemoryGroup:
    """A memory cgroup; counts are in bytes. `used` is all memory but unmapped page cache, which can be reclaimed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.peak_used_bytes = 0

    @property
    def used_bytes(self) -> int:
        counts = self._counts("memory.stat")
        cache = counts["total_inactive_file"] + counts["total_active_file"] - counts["total_mapped_file"]
        return int((self._path / "memory.usage_in_bytes").read_text()) - max(0, cache)

    @property
    def page_cache_bytes(self) -> int:
        counts = self._counts("memory.stat")
        return counts["total_inactive_file"] + counts["total_active_file"]

    @property
    def num_killed(self) -> int:
        """Processes that the kernel ended because the limit was reached."""
        return self._counts("memory.oom_control")["oom_kill"]

    def limit(self, limit_bytes: int) -> None:
        """Sets another hard limit."""
        (self._path / "memory.limit_in_bytes").write_text(str(limit_bytes))

    def start(self, arguments: Sequence[str], python: Path = Path(sys.executable)) -> subprocess.Popen[str]:
        """Starts `python` with these arguments in the group, with pipes as standard streams."""
        script = f'echo $$ > {self._path}/tasks && exec "$@"'
        return subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", str(python), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Keeps `peak_used_bytes` while the body runs."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(_SECONDS_BETWEEN_SAMPLES):
                self.peak_used_bytes = max(self.peak_used_bytes, self.used_bytes)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _counts(self, file: str) -> dict[str, int]:
        lines = (line.split() for line in (self._path / file).read_text().splitlines())
        return {name: int(count) for name, count in lines}


@contextmanager
def memory_group(limit_bytes: int | None) -> Iterator[MemoryGroup]:
    """Makes a group with a hard limit, or none yet, and removes it when all its processes have ended.

    Raises:
        SystemExit: There is no version 1 hierarchy of the memory controller, or only root may make groups in it.
    """
    path = _MOUNT / f"hermes-auto-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        raise SystemExit(f"a memory cgroup of version 1 cannot be made in {_MOUNT} ({error}); be root") from error
    with undone_after_sigterm():
        try:
            group = MemoryGroup(path)
            if limit_bytes is not None:
                group.limit(limit_bytes)
            yield group
        finally:
            (path / "memory.force_empty").write_text("0")
            path.rmdir()


def line_of(pipe: IO[str] | None) -> str:
    """The next line that a process writes; empty when it has ended."""
    assert pipe is not None
    return pipe.readline().strip()
