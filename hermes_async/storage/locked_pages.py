"""Pages that no swap takes: they are locked in memory when they are first used (Linux only)."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

_MLOCK_ONFAULT = 1


@dataclass(frozen=True, slots=True)
class LockLimit:
    """How much memory this process may lock.

    Attributes:
        most: `RLIMIT_MEMLOCK` in bytes; None without a limit. A process with CAP_IPC_LOCK may lock more.
        locked: Bytes that this process has locked.
    """

    most: int | None
    locked: int


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library; None if it cannot lock pages on their first use.

    A plain `mlock` would make all pages resident at once, and hold up the event loop meanwhile.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mlock2"):
        return None
    libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def has_locked_pages() -> bool:
    """Whether the system can lock pages on their first use."""
    return _libc() is not None


def lock_pages(address: int, nbytes: int) -> None:
    """Locks pages. Those that are not resident are locked when they are first used.

    A child process that is forked has them, too, and not locked.

    Raises:
        OSError: The limit forbids it, or the system cannot do it.
    """
    libc = _libc()
    if libc is None:
        raise OSError("this system has no mlock2")
    if libc.mlock2(address, nbytes, _MLOCK_ONFAULT):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def unlock_pages(address: int, nbytes: int) -> None:
    """Unlocks pages that were locked.

    Raises:
        OSError: They are not mapped.
    """
    libc = _libc()
    if libc is not None and libc.munlock(address, nbytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def can_lock(nbytes: int) -> bool:
    """Whether this process may lock so many bytes more.

    Addresses are locked for a moment, and no memory. What a process may do depends on its limit, its capabilities and
    its user namespace, and the answer of the kernel has regard to all of them.
    """
    try:
        with mmap.mmap(
            -1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
        ) as addresses:
            lock_pages(np.frombuffer(addresses, dtype=np.uint8).ctypes.data, len(addresses))
    except OSError:
        return False
    return True


def lock_limit() -> LockLimit:
    """The limit of this process, and what it has locked of it. Reads a file, so not for the event loop."""
    most, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    locked = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmLck:")), 0)
    return LockLimit(None if most == resource.RLIM_INFINITY else most, locked)
