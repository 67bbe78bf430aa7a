"""Direct I/O, which bypasses the page cache, and its substitute where a file system refuses it.

The reader and the parking file share it.
"""

from __future__ import annotations

import fcntl
import os

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""The flag that opens a file for direct I/O; 0 if the system has none."""


def set_direct(fd: int, direct: bool) -> None:
    """Turns direct I/O on or off for an open file, which may have no name any more.

    Raises:
        OSError: With EINVAL, if the file system refuses it.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | (O_DIRECT if direct else 0))


def drop_cache(fd: int, offset: int, nbytes: int) -> None:
    """Drops bytes that were read or written from the page cache, if the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
