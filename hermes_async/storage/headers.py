"""Opens files whose headers are read, and names what is wrong with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hermes_async.errors import CheckpointError, CorruptShardError
from hermes_async.storage.file_state import FileState
from hermes_async.storage.opening_watch import reads_file

MAX_HEADER_BYTES = 32 * 2**20
"""The most bytes of a header that are read. The safetensors format allows 100 MB."""

MAX_TENSORS = 2**17
"""The most tensors of a file."""

MAX_INT64 = 2**63 - 1
"""The largest file offset or size in torch."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, FileState]]:
    """Opens a regular file, and yields it with its state. Read at most as many bytes as the state says.

    Some files of `/proc` look like regular ones of 0 bytes, and reading them may never end.

    Raises:
        CheckpointError: It is missing, is no regular file, or cannot be read.
    """
    try:
        with reads_file(path):
            # Checked before opening, because opening a device may have an effect.
            check_regular(path, path.stat())
            # It may have been replaced meanwhile: opening a named pipe must not wait for a writer.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                check_regular(path, status)
                yield file, FileState.of(status)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is the checkpoint complete?", path=path) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=path) from error


def check_regular(path: Path, status: os.stat_result) -> None:
    """Raises `CheckpointError` if a file is none on a disk: a folder, a named pipe, a device."""
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file", path=path)


def corrupt(path: Path, message: str, **numbers: int) -> CorruptShardError:
    """The error for a file that violates its format. `numbers` are `expected` and `actual`."""
    # Shortened, because it may quote any length of the file.
    return CorruptShardError(f"{path}: {message:.1000}", path=path, **numbers)


def num_elements(path: Path, name: str, shape: list[int] | tuple[int, ...]) -> int:
    """The elements of the tensor `name` in the file `path`.

    Raises:
        CorruptShardError: There are more than any tensor can have.
    """
    count = 1
    for size in shape:
        count *= size
        if count > MAX_INT64:  # at each step, so that a long shape does not make a huge number
            raise corrupt(path, f"tensor {name!r} has too many elements: shape {list(shape)}")
    return count
