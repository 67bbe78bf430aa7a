"""Output files that a user names: the package writes only new files, and overwrites only files that it made."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hermes_async.errors import ConfigError

_INSPECTED_BYTES = 65536  # at each end of an existing file
_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def open_own_file(path: Path, is_ours: Callable[[bytes], bool], what: str) -> BinaryIO:
    """Opens a file for writing and empties it. The file must be new, empty, or one that the package made.

    Links are not followed. Only regular files are opened: opening a named pipe would wait for a reader.

    Args:
        is_ours: Says whether the package made a file, from its first and last 64 KiB.
        what: What is written, such as "trace"; for messages.

    Raises:
        ConfigError: The file is something else, or cannot be opened.
    """
    try:
        try:
            fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            fd = _open_existing(path, is_ours, what)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"the {what} {path} cannot be written: {reason}") from error
    return os.fdopen(fd, "wb")


def _open_existing(path: Path, is_ours: Callable[[bytes], bool], what: str) -> int:
    # Checked before opening, because opening a device may have an effect.
    _check_regular(path, path.lstat(), what)
    fd = os.open(path, _FLAGS | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        _check_regular(path, status, what)
        tail_offset = max(_INSPECTED_BYTES, status.st_size - _INSPECTED_BYTES)
        content = os.pread(fd, _INSPECTED_BYTES, 0) + os.pread(fd, _INSPECTED_BYTES, tail_offset)
        if content and not is_ours(content):
            raise ConfigError(
                f"the {what} {path} cannot be written: a file that is no {what} of hermes-async is there; "
                "remove it, or give another name"
            )
        os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(path: Path, status: os.stat_result, what: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISLNK(status.st_mode):
        found = "it is a link, which is not followed"
    elif stat.S_ISDIR(status.st_mode):
        found = "it is a directory"
    else:
        found = "it is no regular file"
    raise ConfigError(f"the {what} {path} cannot be written: {found}; give the name of a new file")
