"""Compiled functions that dequantize and multiply numbers of one byte, FP8 (e4m3) or int8, with scales of blocks.

Source: as `fp8` and `scaled_numbers`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
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
    write_bfloat16,
    write_lanes,
)


@inlined
def _int8(numbers, at):
    return floats(signed(lanes_at(numbers, at)))


@inlined
def _e4m3(numbers, at):
    return floats_of_e4m3(lanes_at(numbers, at))


_KINDS = {"int8": _int8, "fp8": _e4m3}

# A matrix is `numbers`, uint8 [rows * columns], and `grid`, float32 [blocks below each other, beside each other]: the
# scale of each block. A block has `size`: rows and columns. The last blocks may be smaller. All arrays are contiguous,
# and the functions release the interpreter's lock. They are compiled, within two seconds, if they are new here.


@cache
def dequantizer(kind: str, *, rounds: bool, bits: bool) -> Callable[..., None]:
    """A function of `numbers`, `grid`, `size`, a first row, and `values` [n, columns]: it writes n rows of values.

    Args:
        kind: Of the numbers: "fp8" or "int8".
        rounds: Each value is rounded to bfloat16.
        bits: `values` are the bits of numbers in bfloat16, in uint16, and not numbers in float32.
    """
    names = _names(kind, rounds=rounds) | {"write": write_bfloat16 if bits else write_lanes}
    signature = _DEQUANTIZE.format("uint16" if bits else "float32")
    compiled = compiled_copy(_dequantize, signature, f"{kind}{rounds:d}{bits:d}", names)

    def dequantize(numbers, grid, size, first, values):
        compiled(numbers, grid, *size, first=first, values=values)

    return dequantize


@cache
def multiplier(kind: str, *, rounds: bool) -> Callable[..., None]:
    """A function of `numbers`, `grid`, `size`, `lines`, `products`, `first` and `last`.

    It writes the products of `lines`, float32 [lines, columns], with the rows from `first` to `last` (exclusive), to
    `products`, float32 [lines, all rows]. There is one line, or a multiple of `LINES_AT_ONCE`.

    Args:
        kind: Of the numbers: "fp8" or "int8".
        rounds: Each value is rounded to bfloat16.
    """
    one, several = (
        compiled_copy(
            _multiply, _MULTIPLY, f"{kind}{rounds:d}_{count}", _names(kind, rounds=rounds) | names_of_lines(count)
        )
        for count in (1, LINES_AT_ONCE)
    )

    def multiply(numbers, grid, size, lines, products, first, last):
        function = one if len(lines) == 1 else several
        function(numbers, grid, *size, lines=lines.reshape(-1), products=products, first=first, last=last)

    return multiply


def _names(kind: str, *, rounds: bool) -> dict[str, Any]:
    names: dict[str, Any] = {"number_at": _KINDS[kind], "rounds": rounds}
    return names | {"values_at": inlined_copy(_values_at, names)}


# In the loops, each kind has these names of its own.
rounds: bool
num_lines: int
zeros: Callable[[], Any]
number_at: Callable[..., Any]
values_at: Callable[..., Any]
write: Callable[..., None]


_DEQUANTIZE = "void(uint8[::1], float32[:, ::1], int64, int64, int64, {}[:, ::1])"
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
                write(flat, idx * columns + column, values_at(numbers, row * columns + column, scale))


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
