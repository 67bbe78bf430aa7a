"""Looks up all numbers of a byte at once, in pieces whose memory stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

PIECE_ELEMENTS = 15 << 12
"""Elements that are dequantized at once. In float32 they take less than 256 KiB. The heap gives larger pieces back to
the system when they are freed, and getting them anew takes time."""

_ELEMENTS = {1: torch.float32, 2: torch.float64, 4: torch.complex128}
"""A dtype as large as so many numbers in float32. Its values mean nothing."""


def byte_table(numbers: Sequence[float], *, high_bits_first: bool = False) -> torch.Tensor:
    """All numbers of each byte, as one element.

    Args:
        numbers: What each code stands for; 256, 16 or 4 of them.
        high_bits_first: The first number of a byte is in its highest bits, and not in its lowest.
    """
    values = torch.tensor(numbers, dtype=torch.float32)
    bits = len(numbers).bit_length() - 1
    shifts = range(0, 8, bits)
    codes = [torch.arange(256) >> shift & len(numbers) - 1 for shift in shifts]
    places = reversed(codes) if high_bits_first else codes
    return torch.stack([values[place] for place in places], 1).view(_ELEMENTS[len(codes)]).view(-1)


def look_up(codes: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the numbers of some bytes.

    Args:
        codes: [bytes] uint8.
        table: See `byte_table`.
        out: [bytes * numbers of a byte] float32, contiguous.
    """
    torch.index_select(table, 0, codes.int(), out=out.view(table.dtype))


def row_pieces(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Divides the rows `start` to `stop` into pieces of at most `PIECE_ELEMENTS`, or of one row."""
    step = max(1, PIECE_ELEMENTS // max(1, columns))
    for begin in range(start, stop, step):
        yield begin, min(stop, begin + step)


def piece_bytes(rows: int, columns: int, element_bytes: int) -> int:
    """Of the largest of these pieces, with so many bytes an element."""
    return min(rows * columns, max(PIECE_ELEMENTS, columns)) * element_bytes
