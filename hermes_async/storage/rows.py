"""Single rows of a matrix on disk, for an input embedding that is not loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_up
from hermes_async.storage.checkpoint import TensorSpec, merge_extents
from hermes_async.storage.reader import Reader, ReadRange

ROWS_AT_ONCE = 8
"""Threads that a row reader's executor should have: a row is small, and a disk takes its time to begin a read."""

# A gap of up to two blocks takes no more room than the blocks at the edges of two reads.
_MAX_GAP_BYTES = 2 * ALIGNMENT


class RowReader:
    """Reads rows of `spec` (`[rows, columns]`) through a reader of its own.

    Args:
        max_rows: Most rows of one call.
    """

    def __init__(self, spec: TensorSpec, reader: Reader, max_rows: int) -> None:
        self._spec = spec
        self._reader = reader
        self._buffer = Buffer(self.buffer_bytes(spec, max_rows))

    @staticmethod
    def buffer_bytes(spec: TensorSpec, max_rows: int) -> int:
        """Memory for `max_rows` rows, each with the blocks around it."""
        row_bytes = spec.nbytes // spec.shape[0]
        spread = max_rows * (align_up(row_bytes) + 2 * ALIGNMENT)
        return min(spread, align_up(spec.nbytes) + 2 * ALIGNMENT)

    async def read(self, rows: Sequence[int]) -> list[torch.Tensor]:
        """Reads `rows` (sorted, each once); returns views `[columns]` that the next call overwrites.

        Raises:
            ReadError: The shard could not be read.

        Cancellation: as `Reader.read`.
        """
        specs = [self._spec.rows(row, row + 1) for row in rows]
        ranges = []
        end = 0
        for extent in merge_extents(specs, max_gap=_MAX_GAP_BYTES):
            position = end + extent.offset % ALIGNMENT
            ranges.append(ReadRange(extent.file, extent.offset, extent.nbytes, position))
            end = align_up(position + extent.nbytes)
        await self._reader.read_many(ranges, self._buffer.view, ROWS_AT_ONCE)
        views = []
        remaining = iter(ranges)
        item = next(remaining)
        for spec in specs:
            while spec.offset >= item.offset + item.nbytes:
                item = next(remaining)
            position = item.position + spec.offset - item.offset
            views.append(self._buffer.tensor(position, spec.dtype, spec.shape[1:]))
        return views

    def close(self) -> None:
        self._buffer.close()
