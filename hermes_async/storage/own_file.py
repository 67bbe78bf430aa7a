"""Files that the package makes: only this user can read them, and each is there as a whole or not at all.

A file has a temporary name until it is whole. Its writer holds a lock on it. So the next writer knows what a killed
process has left, and removes it. Links are not followed, and files of others are not overwritten.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from hermes_async.errors import ConfigError

_INSPECTED_BYTES = 65536  # at each end of an existing file
_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_UNFINISHED = ".unfinished"
_SCRATCH = "hermes-async-scratch-"


class NewFile:
    """A file that gets its name with `finish`, when its content is on the disk. It replaces a file of that name.

    Until then it has a temporary name in the same folder, which nobody can guess. Only this user can read it. Making
    one removes what killed processes have left of the same file. As a context manager, it is finished if the block
    raises nothing, and else discarded.

    Attributes:
        file: Open for writing.

    Raises:
        OSError: There can be no new file in the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        prefix = _unfinished_prefix(path.name)
        for left in path.parent.glob(f"{escape(prefix)}*{_UNFINISHED}"):
            remove_if_left(left)
        fd = -1
        while fd < 0:
            made, name = tempfile.mkstemp(_UNFINISHED, prefix, path.parent)
            fd = _kept(made)
        self._temporary = Path(name)
        self.file: BinaryIO = os.fdopen(fd, "wb")

    def finish(self) -> None:
        """Gives the file its name.

        Raises:
            OSError: It cannot be written. Nothing is left of it.
        """
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self._temporary.replace(self._path)
        except BaseException:
            self.discard()
            raise
        self.file.close()

    def discard(self) -> None:
        """Removes the file."""
        with suppress(FileNotFoundError):
            self._temporary.unlink()
        with suppress(OSError):  # what was not written is not needed
            self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.discard()


def is_unfinished(name: str, of: str) -> bool:
    """Whether `name` is the temporary name of a file that is to be named `of`."""
    return name.startswith(_unfinished_prefix(of)) and name.endswith(_UNFINISHED)


def check_own_file(path: Path, is_ours: Callable[[bytes], bool], what: str) -> None:
    """Checks that a file may be written: it must be new, empty, or one that the package made.

    Args:
        is_ours: Says whether the package made a file, from its first and last 64 KiB.
        what: What is written, such as "trace"; for messages.

    Raises:
        ConfigError: The file is something else, or cannot be read.
    """
    with own_file_errors(path, what):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        # Checked before opening, because opening a device may have an effect.
        _check_regular(path, status, what)
        fd = os.open(path, _READ_FLAGS)
        try:
            status = os.fstat(fd)
            _check_regular(path, status, what)
            tail_offset = max(_INSPECTED_BYTES, status.st_size - _INSPECTED_BYTES)
            content = os.pread(fd, _INSPECTED_BYTES, 0) + os.pread(fd, _INSPECTED_BYTES, tail_offset)
        finally:
            os.close(fd)
        if content and not is_ours(content):
            raise ConfigError(
                f"the {what} {path} cannot be written: a file that is no {what} of hermes-async is there; "
                "remove it, or give another name"
            )


@contextmanager
def own_file_errors(path: Path, what: str) -> Iterator[None]:
    """Turns errors of the system, and of names that are none, into `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"the {what} {path} cannot be written: {reason}") from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's temporary folder, which only this user can read. It is deleted behind the block.

    Folders that killed processes have left are deleted first.
    """
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_SCRATCH}*"):
        remove_if_left(left)
    fd = -1
    while fd < 0:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        with suppress(FileNotFoundError):
            fd = _kept(os.open(folder, _READ_FLAGS))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _kept(fd: int) -> int:
    """Locks a new file or folder until it is closed. Returns -1 if another process takes it for one that was left."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    except OSError:  # a file system without locks: what is left there stays
        return fd
    if os.fstat(fd).st_nlink == 0:
        os.close(fd)
        return -1
    return fd


def remove_if_left(path: Path) -> None:
    """Deletes a file or folder of this user that no process has locked."""
    with suppress(OSError):  # another process removes it, or it is not ours
        fd = os.open(path, _READ_FLAGS)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.getuid():
                return
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            elif stat.S_ISREG(status.st_mode):
                path.unlink()
        finally:
            os.close(fd)


def _unfinished_prefix(name: str) -> str:
    return f".{name}."


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
