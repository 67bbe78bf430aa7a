"""Compiled functions that dequantize and multiply numbers of one byte, FP8 (e4m3) or int8, with scales of blocks.

Source: as `fp8` and `scaled_numbers`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import float32

from hermes_async.quantization.compiling import (
    COLUMNS_AT_ONCE,
    LINES_AT_ONCE,
    compiled_copy,
    inlined,
    inlined_copy,
    names_of_lines,
)
from hermes_async.quantization.lanes import (
    LANES,
    add_products,
    floats,
    floats_of_e4m3,
    lanes_at,
    rounded_to_bfloat16,
    signed,
    totals,
    write_lanes,
)


@inlined
def _int8(numbers, at):
    return floats(signed(lanes_at(numbers, at)))


@inlined
def _e4m3(numbers, at):
    return floats_of_e4m3(lanes_at(numbers, at))


_KINDS = {"int8": _int8, "fp8": _e4m3}

COLUMN_STEP = 2 * LANES
"""The columns of a block, and of a matrix, are a multiple of it."""


@dataclass(frozen=True, slots=True)
class ByteKernels:
    """The compiled functions of a kind of numbers. They release the interpreter's lock; all arrays are contiguous.

    A matrix is `numbers`, uint8 [rows * columns], and `grid`, float32 [blocks below each other, beside each other]: the
    scale of each block. A block has `height` rows and `width` columns. The last blocks may be smaller.

    Attributes:
        dequantize: Of numbers, grid, (height, width), a first row, and `values`, float32 [n, columns]: writes n rows.
        multiply: Of numbers, grid, (height, width); `lines`, float32 [lines, columns]; and `products`, float32 [lines,
            rows], which it writes for the rows from `first` to `last` (exclusive). There is one line, or a multiple of
            `lines_at_once`.
    """

    dequantize: Callable[..., None]
    multiply: Callable[..., None]
    lines_at_once: int = LINES_AT_ONCE


@cache
def kernels_of(kind: str, *, rounds: bool) -> ByteKernels:
    """The functions of a kind of numbers: "fp8" or "int8".

    Compiles them, within three seconds, if they are new on this machine.

    Args:
        rounds: Each value is rounded to bfloat16.
    """
    names: dict[str, Any] = {"number_at": _KINDS[kind], "rounds": rounds}
    names["values_at"] = inlined_copy(_values_at, names)
    name = f"{kind}_bfloat16" if rounds else kind
    one, several = (
        compiled_copy(_multiply, _MULTIPLY, f"{name}_{count}", names | names_of_lines(count))
        for count in (1, LINES_AT_ONCE)
    )

    write = compiled_copy(_dequantize, _DEQUANTIZE, name, names)

    def dequantize(numbers, grid, size, first, values):
        write(numbers, grid, *size, first=first, values=values)

    def multiply(numbers, grid, size, lines, products, first, last):
        function = one if len(lines) == 1 else several
        function(numbers, grid, *size, lines=lines.reshape(-1), products=products, first=first, last=last)

    return ByteKernels(dequantize, multiply)


# In the loops, each kind has these names of its own.
rounds: bool
num_lines: int
zeros: Callable[[], Any]
number_at: Callable[..., Any]
values_at: Callable[..., Any]


_DEQUANTIZE = "void(uint8[::1], float32[:, ::1], int64, int64, int64, float32[:, ::1])"
_MULTIPLY = "void(uint8[::1], float32[:, ::1], int64, int64, float32[::1], float32[:, ::1], int64, int64)"


def _dequantize(numbers, grid, height, width, first, values):
    columns = values.shape[1]
    flat = values.reshape(values.size)
    for idx in range(values.shape[0]):
        row = first + idx
        scales = grid[row // height]
        for across in range(grid.shape[1]):
            scale = scales[across]
            for column in range(across * width, min(columns, (across + 1) * width), LANES):
                write_lanes(flat, idx * columns + column, values_at(numbers, row * columns + column, scale))


def _multiply(numbers, grid, height, width, lines, products, first, last):
    columns = lines.size // products.shape[0]
    for first_line in range(0, products.shape[0], num_lines):
        before_line = first_line * columns
        for start in range(0, columns, COLUMNS_AT_ONCE // num_lines):
            end = min(columns, start + COLUMNS_AT_ONCE // num_lines)
            for row in range(first, last):
                even, odd, scales = zeros(), zeros(), grid[row // height]
                for across in range(start // width, (end - 1) // width + 1):
                    scale = scales[across]
                    for column in range(max(start, across * width), min(end, (across + 1) * width), 2 * LANES):
                        values = values_at(numbers, row * columns + column, scale)
                        even = add_products(even, values, lines, before_line + column, columns)
                        values = values_at(numbers, row * columns + column + LANES, scale)
                        odd = add_products(odd, values, lines, before_line + column + LANES, columns)
                of_even, of_odd = totals(even), totals(odd)
                for line in range(num_lines):
                    before = products[first_line + line, row] if start else float32(0)
                    products[first_line + line, row] = before + (of_even[line] + of_odd[line])


def _values_at(numbers, at, scale):
    """Sixteen values from an index on."""
    values = number_at(numbers, at) * scale
    return rounded_to_bfloat16(values) if rounds else values
