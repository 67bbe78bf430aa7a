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
from hermes_async.quantization.lane_sums import empty_sums, tile_adder, totals
from hermes_async.quantization.tile_kernels import tile_shape

TILE_LINES, TILE_ROWS = tile_shape()
_COLUMNS_AT_ONCE = 1024
"""Columns of these rows that are multiplied before the next ones."""

add_tile: Callable[..., Any] = tile_adder(TILE_ROWS, TILE_LINES)
add_row: Callable[..., Any] = tile_adder(1, TILE_LINES)
no_tile: Callable[[], Any] = empty_sums(TILE_ROWS * TILE_LINES)
no_row: Callable[[], Any] = empty_sums(TILE_LINES)


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


def _multiply(rows, packed, bias, sums, out, columns, first, last, before):
    num_lines = out.shape[0]
    num_tiles = packed.size // (TILE_LINES * columns)
    as_bits = sums.view(np.uint32)
    for first_row in range(first, last, ROWS_OF_SUMS):
        count = min(ROWS_OF_SUMS, last - first_row)
        for row in range(count):
            sums[:, row] = bias[before + first_row + row] if bias.size else float32(0)
        for start in range(0, columns, _COLUMNS_AT_ONCE):
            end = min(columns, start + _COLUMNS_AT_ONCE)
            for tile in range(num_tiles):
                line, lines_at = tile * TILE_LINES, tile * TILE_LINES * columns
                row = 0
                while row + TILE_ROWS <= count:
                    of_tile, at = no_tile(), (first_row + row) * columns
                    for column in range(start, end, LANES):
                        of_tile = add_tile(
                            of_tile, rows, (at + column, columns), packed, lines_at + column * TILE_LINES
                        )
                    results = totals(of_tile)
                    for idx in range(TILE_LINES):
                        for of_row in range(TILE_ROWS):
                            sums[line + idx, row + of_row] += results[idx * TILE_ROWS + of_row]
                    row += TILE_ROWS
                while row < count:
                    of_row, at = no_row(), (first_row + row) * columns
                    for column in range(start, end, LANES):
                        of_row = add_row(of_row, rows, (at + column, columns), packed, lines_at + column * TILE_LINES)
                    results_of_row = totals(of_row)
                    for idx in range(TILE_LINES):
                        sums[line + idx, row] += results_of_row[idx]
                    row += 1
        for line in range(num_lines):
            for row in range(count):
                if has_bits:  # rounded to the nearest; of two as near, to the even one
                    number = as_bits[line, row]
                    out[line, before + first_row + row] = uint16(
                        (number + uint32(0x7FFF) + (number >> uint32(16) & uint32(1))) >> uint32(16)
                    )
                else:
                    out[line, before + first_row + row] = sums[line, row]
