"""Divides work on rows into pieces whose memory stays in the processor's cache.

A piece is large enough for two or more threads to compute it together.
"""

from __future__ import annotations

from collections.abc import Iterator

FLOAT32_ELEMENTS = 1 << 17
"""Elements that are computed at once in float32."""

INT8_ELEMENTS = 1 << 18
"""Elements of one byte that are computed at once."""

FLOAT16_ELEMENTS = 1 << 19
"""Elements of 16 bits that are computed at once, without other memory."""


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
