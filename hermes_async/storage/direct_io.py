"""Direct I/O, past the page cache, and what does for it where a file system refuses that."""

from __future__ import annotations

import fcntl
import os

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""The flag for opening a file directly; 0 where there is none."""


def set_direct(fd: int, direct: bool) -> None:
    """Turns direct I/O of an open file on or off: it need not be opened again, and may have no name any more.

    Raises:
        OSError: With EINVAL, where the file system does not take it.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | (O_DIRECT if direct else 0))


def drop_cache(fd: int, offset: int, nbytes: int) -> None:
    """Takes what was read or written out of the page cache again, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
