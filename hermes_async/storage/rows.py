"""Reads single rows of matrices on disk, for embeddings that are not in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
import torch

from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_up
from hermes_async.storage.reader import Reader
from hermes_async.storage.shard import ReadRange
from hermes_async.storage.tensor_spec import TensorSpec

ROWS_AT_ONCE = 8
"""Threads that a row reader's executor should have. A row is small, so the time to begin each read dominates."""

# Reading a gap of up to two blocks takes no more memory than the partial blocks of two reads.
_MAX_GAP_BYTES = 2 * ALIGNMENT


@dataclass(eq=False, slots=True)
class _Reading:
    """A read in a task of its own, and its outcome."""

    error: Exception | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)


class RowReader:
    """Reads rows of `tables` (each `[rows, columns]`) with a reader of its own, one call at a time.

    Owned with `async with`; leaving waits for a read whose call was cancelled, but gives up one that hangs.

    Args:
        usual_rows: The number of rows of each table that the buffer has room for. A call with more rows makes a larger
            buffer, which the next call replaces.
        others_held_back: A context that holds other reads back. It is entered if there are more reads than threads:
            later rows would otherwise wait for large reads that begin in between.
    """

    def __init__(
        self,
        tables: Sequence[TensorSpec],
        reader: Reader,
        usual_rows: int,
        others_held_back: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._tables = tables
        self._reader = reader
        self._others_held_back = others_held_back
        self._usual_rows = usual_rows
        # All mutable state: the buffer for the rows; the last read, which may continue after its call was cancelled.
        self._buffer = Buffer(sum(self.buffer_bytes(spec, usual_rows) for spec in tables))
        self._last: _Reading | None = None
        self._tasks: anyio.abc.TaskGroup = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)  # an error of the block is raised without a group
        finally:
            self._buffer.close()

    @staticmethod
    def buffer_bytes(spec: TensorSpec, num_rows: int) -> int:
        """Bytes for `num_rows` rows of one table, each with the blocks around it."""
        row_bytes = spec.nbytes // spec.shape[0]
        spread = num_rows * (align_up(row_bytes) + 2 * ALIGNMENT)
        return min(spread, align_up(spec.nbytes) + 2 * ALIGNMENT)

    async def read(self, rows: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        """Reads rows of each table; returns views `[columns]` that the next call overwrites.

        Args:
            rows: Of each table; sorted and distinct.

        Raises:
            ReadError: A shard could not be read.
            ReadTimeoutError: A read is overdue. It continues, and the next call first waits for it.

        Cancellation: returns at once. The read continues, and the next call first waits for it.
        """
        watch = self._reader.watch
        if self._last is not None:
            await watch.wait(self._last.ended)
        self._fit_buffer(rows)
        ranges: list[ReadRange] = []
        runs: list[tuple[TensorSpec, list[int]]] = []
        end = 0
        for spec, of_table in zip(self._tables, rows, strict=True):
            row_bytes = spec.nbytes // spec.shape[0]
            for run in _runs(of_table, row_bytes):
                offset = spec.offset + run[0] * row_bytes
                position = end + offset % ALIGNMENT
                nbytes = (run[-1] + 1 - run[0]) * row_bytes
                ranges.append(ReadRange(spec.file, offset, nbytes, position))
                runs.append((spec, run))
                end = align_up(position + nbytes)
        with self._others_held_back() if len(ranges) > ROWS_AT_ONCE else nullcontext():
            self._last = reading = _Reading()
            self._tasks.start_soon(self._read, reading, ranges)
            await watch.wait(reading.ended)
        if reading.error is not None:
            raise reading.error
        views: list[torch.Tensor] = []
        for (spec, run), item in zip(runs, ranges, strict=True):
            block = self._buffer.tensor(item.position, spec.dtype, (run[-1] + 1 - run[0], *spec.shape[1:]))
            views += [block[row - run[0]] for row in run]
        following = iter(views)
        return [list(islice(following, len(of_table))) for of_table in rows]

    async def _read(self, reading: _Reading, ranges: Sequence[ReadRange]) -> None:
        try:
            await self._reader.read_many(ranges, self._buffer.view, ROWS_AT_ONCE, kind="embedding rows")
        except Exception as error:  # `read` raises it
            reading.error = error
        finally:
            reading.ended.set()

    def _fit_buffer(self, rows: Sequence[Sequence[int]]) -> None:
        nbytes = sum(
            self.buffer_bytes(spec, max(len(of_table), self._usual_rows))
            for spec, of_table in zip(self._tables, rows, strict=True)
        )
        if nbytes != self._buffer.nbytes:
            self._buffer.close()
            self._buffer = Buffer(nbytes)


def _runs(rows: Sequence[int], row_bytes: int) -> list[list[int]]:
    """Groups rows that are read together, including the gaps between them."""
    most = 1 + _MAX_GAP_BYTES // row_bytes
    runs: list[list[int]] = []
    for row in rows:
        if runs and row - runs[-1][-1] <= most:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs
