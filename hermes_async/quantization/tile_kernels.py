"""Compiled functions that multiply several rows with several lines of inputs at once.

The sums of a tile of rows and lines stay in the processor's registers. So a number that is read from memory, or made of
the bits of bfloat16, is multiplied several times. torch's kernels copy both matrices into another order first, which
takes longer than the products of a few dozens of lines.

Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, sections 4 and 6.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding
from numba import float32, uint16, uint32

from hermes_async.quantization.compiling import compiled_copy
from hermes_async.quantization.lane_sums import empty_sums, tile_adder, totals
from hermes_async.quantization.lanes import LANES
from hermes_async.quantization.tile_products import ROWS_AT_ONCE

_HAS_MANY_REGISTERS = bool(binding.get_host_cpu_features().get("avx512f"))
TILE_LINES = 8 if _HAS_MANY_REGISTERS else 4
"""Lines of a tile. Inputs are padded to a multiple of it."""
TILE_ROWS = 3 if _HAS_MANY_REGISTERS else 2
"""Rows of a tile. With eight lines, their sums are 24 of 32 registers with sixteen numbers."""
_COLUMNS_AT_ONCE = 1024
"""Columns of these rows that are multiplied before the next ones."""

add_tile: Callable[..., Any] = tile_adder(TILE_ROWS, TILE_LINES)
add_row: Callable[..., Any] = tile_adder(1, TILE_LINES)
no_tile: Callable[[], Any] = empty_sums(TILE_ROWS * TILE_LINES)
no_row: Callable[[], Any] = empty_sums(TILE_LINES)


# All arrays are contiguous, and no index is checked. The number of columns is a multiple of `LANES`. The functions
# release the interpreter's lock. They are compiled, within two seconds, if they are new here.


@cache
def packer(of_lines: str) -> Callable[..., None]:
    """A function of `lines` [n, columns] and `packed`, which writes the lines into it, in the order of `multiplier`.

    `packed` is float32, of `packed_size`; what it has behind the last line is set to zero.

    Args:
        of_lines: "float32", or "uint16" for the bits of bfloat16.
    """
    names = {"has_bits": of_lines == "uint16"}
    compiled: Callable[..., None] = compiled_copy(_pack, _PACK.format(of_lines), of_lines, names)
    return compiled


def packed_size(num_lines: int, columns: int) -> int:
    """How many numbers lines [n, columns] are when they are packed."""
    return -(-num_lines // TILE_LINES) * TILE_LINES * columns


@cache
def multiplier(of_rows: str, of_results: str) -> Callable[..., None]:
    """A function of `rows`, `packed`, `bias`, `out`, `columns`, and by name `first`, `last` and `before`.

    It multiplies the rows from `first` to `last` (exclusive) of `rows` [all * columns] with lines that `packer` has
    packed, and writes the results to `out` [n, any number], from the column `before + first` on. To a result in the
    column i of `out`, `bias[i]` is added before it is rounded. `bias` is float32, and empty if there is none.

    Args:
        of_rows: As for `packer`.
        of_results: Of `out`; each result is rounded once.
    """
    names = {"has_bits": of_results == "uint16"}
    signature = _MULTIPLY.format(of_rows, of_results)
    compiled: Callable[..., None] = compiled_copy(_multiply, signature, f"{of_rows}_{of_results}", names)
    return compiled


has_bits: bool  # each copy of the functions has its own

_PACK = "void({}[:, ::1], float32[::1])"
_MULTIPLY = "void({}[::1], float32[::1], float32[::1], {}[:, ::1], int64, int64, int64, int64)"


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


def _multiply(rows, packed, bias, out, columns, first, last, before):
    num_lines = out.shape[0]
    num_tiles = packed.size // (TILE_LINES * columns)
    sums = np.empty((num_tiles * TILE_LINES, ROWS_AT_ONCE), np.float32)
    as_bits = sums.view(np.uint32)
    for first_row in range(first, last, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, last - first_row)
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
