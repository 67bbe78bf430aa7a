"""Looks up all numbers of a byte at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
