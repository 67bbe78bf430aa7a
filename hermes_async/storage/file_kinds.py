"""Whether a path is a file or a directory, or nothing at all.

Since Python 3.14, `Path.exists`, `Path.is_file` and `Path.is_dir` say no when the system cannot tell: a folder may not
be searched, a disk fails. What cannot be reached would count as missing: the engine would ignore a checkpoint's
settings, or ask the hub for a model that is on this machine. These functions raise the system's error.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


def exists(path: Path) -> bool:
    """Whether there is anything. Links are followed, as in the functions below.

    Raises:
        OSError: The system cannot tell.
    """
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether this is a regular file.

    Raises:
        OSError: The system cannot tell.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_dir(path: Path) -> bool:
    """Whether this is a directory.

    Raises:
        OSError: The system cannot tell.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except ValueError:  # no file has such a name
        return None
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise
