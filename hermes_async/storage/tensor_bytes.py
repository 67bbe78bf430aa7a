"""Reads small tensors while a checkpoint is opened: those that describe others, and scales.

They are read through the page cache, and dropped from it. Everything here blocks: call it on a worker thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from hermes_async.errors import CheckpointError, CorruptShardError
from hermes_async.storage.direct_io import drop_cache
from hermes_async.storage.file_state import FileState
from hermes_async.storage.tensor_spec import Extent, TensorSpec
from hermes_async.storage.threads import DaemonExecutor, check_cancelled, only_waiting

_NUM_THREADS = 8
_MAX_TASK_BYTES = 4 << 20  # of tensors, that one task of a thread reads
_MAX_TASK_PIECES = 256
_MAX_GAP_BYTES = 16 << 10  # between tensors that are read at once


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Bytes of a tensor, in memory.

    Attributes:
        start: The first of them, counted from the tensor's first.
        content: At most 4 MiB.
    """

    spec: TensorSpec
    start: int
    content: memoryview


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a tensor, from `start` on, that lie side by side in a file."""

    spec: TensorSpec
    start: int
    extent: Extent


def read_small_tensor(spec: TensorSpec, max_bytes: int) -> bytes:
    """All bytes of a tensor.

    Raises:
        CorruptShardError: It has more than `max_bytes`.
        CheckpointError: The file cannot be read, or has changed since its header was read.
    """
    if spec.nbytes > max_bytes:
        raise CorruptShardError(
            f"{spec.file}: tensor {spec.name!r} has {spec.nbytes} bytes, and may have at most {max_bytes}",
            path=spec.file,
            expected=max_bytes,
            actual=spec.nbytes,
        )
    with only_waiting():  # the disk may hang
        return b"".join(bytes(read.content) for piece in _pieces(spec) for read in _read([piece]))


def read_tensors(specs: Iterable[TensorSpec]) -> Generator[TensorBytes, None, None]:
    """The bytes of tensors of any size, in pieces, in the order in which they lie in their files.

    Threads read ahead, until the generator ends or is closed. Neighbours in a file are read at once. At most some 100
    MiB are in memory.

    Raises:
        CheckpointError: A file cannot be read, or has changed since its header was read.
    """
    # Comparing texts takes a fraction of the time of comparing paths.
    pieces = [piece for spec in specs for piece in _pieces(spec)]
    pieces.sort(key=lambda piece: (str(piece.extent.file), piece.extent.offset))
    under_way: deque[Future[list[TensorBytes]]] = deque()
    with DaemonExecutor(_NUM_THREADS, "tensors of hermes_async") as executor:
        for task in _tasks(pieces):
            under_way.append(executor.submit(_read, task))
            if len(under_way) == 2 * _NUM_THREADS:
                check_cancelled()
                yield from _result(under_way.popleft())
        while under_way:
            yield from _result(under_way.popleft())


def _result(reading: Future[list[TensorBytes]]) -> list[TensorBytes]:
    with only_waiting():  # the disk may hang
        return reading.result()


def _pieces(spec: TensorSpec) -> Iterator[_Piece]:
    start = 0
    for extent in spec.pieces or (Extent(spec.file, spec.offset, spec.nbytes),):
        for done in range(0, extent.nbytes, _MAX_TASK_BYTES):
            nbytes = min(_MAX_TASK_BYTES, extent.nbytes - done)
            yield _Piece(spec, start + done, Extent(extent.file, extent.offset + done, nbytes))
        start += extent.nbytes


def _tasks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Divides sorted pieces into tasks. Those of a task are in one file."""
    task: list[_Piece] = []
    nbytes = 0
    for piece in pieces:
        full = len(task) == _MAX_TASK_PIECES or nbytes + piece.extent.nbytes > _MAX_TASK_BYTES
        if task and (full or task[0].extent.file != piece.extent.file):
            yield task
            task, nbytes = [], 0
        task.append(piece)
        nbytes += piece.extent.nbytes
    if task:
        yield task


def _read(task: Sequence[_Piece]) -> list[TensorBytes]:
    """Reads the pieces of one file, which are sorted."""
    file, state = task[0].extent.file, task[0].spec.file_states.get(task[0].extent.file)
    result: list[TensorBytes] = []
    try:
        with file.open("rb", buffering=0) as opened:
            fd = opened.fileno()
            if state is not None and FileState.of(os.fstat(fd)) != state:
                raise CheckpointError(f"{file} was changed after its header was read; open it again", path=file)
            if hasattr(os, "posix_fadvise"):  # or the kernel would read neighbours too
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for pieces in _neighbours(task):
                first, last = pieces[0].extent, pieces[-1].extent
                end = last.offset + last.nbytes
                content = memoryview(_read_range(fd, file, first.offset, end))
                drop_cache(fd, first.offset, end - first.offset)
                for piece in pieces:
                    begin = piece.extent.offset - first.offset
                    result.append(TensorBytes(piece.spec, piece.start, content[begin : begin + piece.extent.nbytes]))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", path=file) from error
    return result


def _neighbours(task: Sequence[_Piece]) -> Iterator[Sequence[_Piece]]:
    """Groups of pieces that are read at once."""
    begin = 0
    for idx in range(1, len(task) + 1):
        before = task[idx - 1].extent
        if idx == len(task) or task[idx].extent.offset > before.offset + before.nbytes + _MAX_GAP_BYTES:
            yield task[begin:idx]
            begin = idx


def _read_range(fd: int, file: Path, start: int, stop: int) -> bytearray:
    content = bytearray(stop - start)
    done = read_into(fd, memoryview(content), start)
    if done < len(content):
        raise CorruptShardError(f"{file} ends at byte {start + done}, within a tensor", path=file)
    return content


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Reads a file from a byte on, until the view is full or the file ends; returns the bytes that were read."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done
