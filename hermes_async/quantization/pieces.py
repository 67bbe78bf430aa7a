"""Divides work on rows into pieces whose memory stays in the processor's cache.

What is made of a piece takes less than 256 KiB: the heap gives larger blocks of memory back to the system when they are
freed, and getting them anew takes longer than all of the computation.
"""

from __future__ import annotations

from collections.abc import Iterator

FLOAT32_ELEMENTS = 15 << 12
"""Elements that are computed at once in float32."""

INT8_ELEMENTS = 15 << 14
"""Elements of one byte that are computed at once."""


def pieces(rows: int, columns: int, most: int) -> Iterator[tuple[int, int]]:
    """Divides rows into even pieces of at most so many elements, or of one row."""
    count = -(-rows // max(1, most // max(1, columns)))
    step = -(-rows // max(1, count))
    return ((start, min(rows, start + step)) for start in range(0, rows, max(1, step)))


def row_pieces(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Divides the rows `start` to `stop` into pieces for float32."""
    return ((start + begin, start + end) for begin, end in pieces(max(0, stop - start), columns, FLOAT32_ELEMENTS))


def piece_bytes(rows: int, columns: int, element_bytes: int) -> int:
    """Of the largest piece for float32, with so many bytes an element."""
    return min(rows * columns, max(FLOAT32_ELEMENTS, columns)) * element_bytes
