"""Loops that multiply several rows with several lines of inputs at once, for Numba.

The sums of a tile of rows and lines stay in the processor's registers. So a number that is read from memory, or made of
the bits of bfloat16, is multiplied several times. torch's kernels copy both matrices into another order first, which
takes longer than the products of a few dozens of lines.

Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, sections 4 and 6.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, uint16, uint32

from hermes_async.quantization.compiling import copy_of
from hermes_async.quantization.kernel_sizes import LANES, ROWS_OF_SUMS
from hermes_async.quantization.lane_sums import empty_sums, tile_adder, tile_finisher
from hermes_async.quantization.tile_kernels import tile_shape

TILE_LINES, TILE_ROWS = tile_shape()
_COLUMNS_AT_ONCE = 1024
"""Columns of these rows that are multiplied before the next ones."""

add_tile: Callable[..., Any] = tile_adder(TILE_ROWS, TILE_LINES)
add_row: Callable[..., Any] = tile_adder(1, TILE_LINES)
no_tile: Callable[[], Any] = empty_sums(TILE_ROWS * TILE_LINES)
no_row: Callable[[], Any] = empty_sums(TILE_LINES)
add_tile_totals: Callable[..., None] = tile_finisher(TILE_ROWS, TILE_LINES)
add_row_totals: Callable[..., None] = tile_finisher(1, TILE_LINES)


def loop_of(what: str, of_results: str):
    """A loop.

    Args:
        what: "pack" or "multiply".
        of_results: "uint16", if bits of bfloat16 are read or written; else "float32".
    """
    return copy_of({"pack": _pack, "multiply": _multiply}[what], {"has_bits": of_results == "uint16"})


has_bits: bool  # each copy of the loops has its own


def _pack(lines, packed):
    """Sixteen columns of each line of a tile follow each other, and then the next sixteen columns."""
    num_lines, columns = lines.shape
    as_bits = packed.view(np.uint32)
    for tile in range(packed.size // (TILE_LINES * columns)):
        for line in range(TILE_LINES):
            source, at = tile * TILE_LINES + line, tile * TILE_LINES * columns + line * LANES
            for column in range(0, columns, LANES):
                for lane in range(LANES):
                    if source >= num_lines:
                        as_bits[at + lane] = 0
                    elif has_bits:
                        as_bits[at + lane] = uint32(lines[source, column + lane]) << 16
                    else:
                        packed[at + lane] = lines[source, column + lane]
                at += TILE_LINES * LANES


def _multiply(sums, rows, packed, bias, out, columns, first, last, before):
    """`sums` has `ROWS_OF_SUMS` times as many numbers as there are lines: those of a row one behind the other."""
    num_lines, num_tiles = out.shape[0], packed.size // (TILE_LINES * columns)
    row_length = num_tiles * TILE_LINES
    for first_row in range(first, last, ROWS_OF_SUMS):
        count = min(ROWS_OF_SUMS, last - first_row)
        for row in range(count):
            added = bias[before + first_row + row] if bias.size else float32(0)
            for line in range(row_length):
                sums[row * row_length + line] = added
        for start in range(0, columns, _COLUMNS_AT_ONCE):
            end = min(columns, start + _COLUMNS_AT_ONCE)
            for tile in range(num_tiles):
                lines_at, row = tile * TILE_LINES * columns, 0
                while row < count:
                    at, sums_at = (first_row + row) * columns, row * row_length + tile * TILE_LINES
                    if row + TILE_ROWS <= count:
                        of_tile = no_tile()
                        for column in range(start, end, LANES):
                            lines = lines_at + column * TILE_LINES
                            of_tile = add_tile(of_tile, rows, (at + column, columns), packed, lines)
                        add_tile_totals(of_tile, sums, sums_at, row_length)
                        row += TILE_ROWS
                    else:
                        of_row = no_row()
                        for column in range(start, end, LANES):
                            lines = lines_at + column * TILE_LINES
                            of_row = add_row(of_row, rows, (at + column, columns), packed, lines)
                        add_row_totals(of_row, sums, sums_at, row_length)
                        row += 1
        as_bits = sums.view(np.uint32)
        for line in range(num_lines):
            for row in range(count):
                if has_bits:  # rounded to the nearest; of two as near, to the even one
                    number = as_bits[row * row_length + line]
                    rounded = number + uint32(0x7FFF) + (number >> uint32(16) & uint32(1))
                    out[line, before + first_row + row] = uint16(rounded >> uint32(16))
                else:
                    out[line, before + first_row + row] = sums[row * row_length + line]
