"""Measures how fast a folder's disk reads, with a temporary file and without an engine. Imports no torch."""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hermes_async.errors import ConfigError
from hermes_async.storage.direct_io import O_DIRECT, drop_cache, set_direct

READ_BYTES = 4 << 20
"""The size of each read and write."""

FILE_BYTES = 256 << 20
"""The most bytes of the temporary file."""

WRITE_S = 3.0
"""Writing the file stops after this time."""

READ_S = 1.0
"""Reading it stops after this time."""

_NUM_AGENTS = 4
_FREE_SHARE = 4  # the file takes at most one part in so many of the free space


@dataclass(frozen=True, slots=True)
class DiskCheck:
    """What a temporary file in a folder showed.

    Attributes:
        direct: Whether reads can bypass the page cache there.
        bytes_per_s: The rate of reading; None if there was no space for a file.
        num_bytes: The size of the file that was read.
    """

    direct: bool
    bytes_per_s: float | None
    num_bytes: int


def check_disk(folder: Path) -> DiskCheck:
    """Writes a temporary file of at most 256 MiB into the folder, and reads it for a second. Call it on a thread.

    The file has no name while it exists, so that nothing is left of it, however the process ends. Writing stops after
    three seconds. On a slow disk the file is then smaller.

    Raises:
        ConfigError: There is no such folder, or no file can be written to it.
    """
    try:
        most = min(FILE_BYTES, shutil.disk_usage(folder).free // _FREE_SHARE)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            fd = file.fileno()
            direct = _bypasses_cache(fd)
            num_bytes = _fill(fd, most)
            rate = _read_rate(fd, num_bytes, direct=direct) if num_bytes else None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be measured: {error.strerror or error}") from error
    return DiskCheck(direct, rate, num_bytes)


def _bypasses_cache(fd: int) -> bool:
    """Switches direct I/O on, where the file system allows it."""
    try:
        set_direct(fd, True)
    except OSError:
        return False
    return bool(O_DIRECT)


def _fill(fd: int, most: int) -> int:
    """Writes at most so many bytes, in pieces. Returns how many are in whole pieces."""
    deadline, end = time.perf_counter() + WRITE_S, 0
    with _aligned_memory() as piece:
        piece[:] = os.urandom(READ_BYTES)  # a disk or file system that compresses must not look fast
        while end + READ_BYTES <= most and time.perf_counter() < deadline:
            if os.pwrite(fd, piece, end) < READ_BYTES:  # no space is left, or a limit on files is reached
                break
            end += READ_BYTES
    os.fsync(fd)
    return end


def _read_rate(fd: int, num_bytes: int, *, direct: bool) -> float:
    """Bytes a second that all agents read together."""
    if not direct:
        drop_cache(fd, 0, num_bytes)
    offsets = itertools.cycle(range(0, num_bytes, READ_BYTES))
    started = time.perf_counter()

    def read_until_the_end() -> int:
        count = 0
        with _aligned_memory() as piece:
            while not count or time.perf_counter() < started + READ_S:
                offset = next(offsets)
                count += os.preadv(fd, [piece], offset)
                if not direct:
                    drop_cache(fd, offset, READ_BYTES)
        return count

    with ThreadPoolExecutor(_NUM_AGENTS, "hermes-disk-check") as agents:
        running = [agents.submit(read_until_the_end) for _ in range(_NUM_AGENTS)]
        total = sum(agent.result() for agent in running)
    return total / (time.perf_counter() - started)


@contextmanager
def _aligned_memory() -> Iterator[mmap.mmap]:
    """Memory for one read; it begins at a page, as direct I/O needs it."""
    with mmap.mmap(-1, READ_BYTES) as memory:
        yield memory
