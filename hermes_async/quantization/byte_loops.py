"""Loops that dequantize and multiply numbers of one byte, or of half of one, with scales of blocks, for Numba.

Source: as `fp8`, `scaled_numbers` and `packed_integers`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import float32

from hermes_async.quantization.compiling import copy_of, inlined, inlined_copy, names_of_lines
from hermes_async.quantization.kernel_sizes import COLUMNS_AT_ONCE, LANES
from hermes_async.quantization.lane_sums import add_products, totals
from hermes_async.quantization.lanes import (
    floats,
    floats_of_e4m3,
    lanes_at,
    nibbles_at,
    rounded_to_bfloat16,
    signed,
    write_bfloat16,
    write_lanes,
)


@inlined
def _int8(numbers, at):
    return floats(signed(lanes_at(numbers, at)))


@inlined
def _uint8(numbers, at):
    return floats(signed(lanes_at(numbers, at) - 128))


@inlined
def _int4(numbers, at):
    return floats(signed(nibbles_at(numbers, at >> 1) - 8))


@inlined
def _e4m3(numbers, at):
    return floats_of_e4m3(lanes_at(numbers, at))


_KINDS = {"fp8": _e4m3, "int8": _int8, "uint8": _uint8, "int4": _int4}
"""Sixteen numbers from one on. Of "uint8" and "int4", the middle of the range is 0 then."""


def loop_of(what: str, kind: str, has_zeros: bool, rounds: bool, choice: int):
    """A loop of a kind of numbers.

    Args:
        what: "dequantize" or "multiply".
        has_zeros, rounds: As for `byte_kernels.Bytes`.
        choice: Whether bits of bfloat16 are written; or the lines that are multiplied at once.
    """
    names: dict[str, Any] = {"number_at": _KINDS[kind], "has_zeros": has_zeros, "rounds": rounds}
    names["values_at"] = inlined_copy(_values_at, names)
    if what == "dequantize":
        return copy_of(_dequantize, names | {"write": write_bfloat16 if choice else write_lanes})
    return copy_of(_multiply, names | names_of_lines(choice))


# In the loops, each kind has these names of its own.
rounds: bool
has_zeros: bool
num_lines: int
no_sums: Callable[[], Any]
number_at: Callable[..., Any]
values_at: Callable[..., Any]
write: Callable[..., None]


def _dequantize(values, numbers, grid, zeros, columns, height, width, first):
    for idx in range(values.size // columns):
        row = first + idx
        down = row // height
        for across in range(grid.shape[1]):
            scale, zero = grid[down, across], zeros[down, across] if has_zeros else float32(0)
            for column in range(across * width, min(columns, (across + 1) * width), LANES):
                of_lanes = values_at(numbers, row * columns + column, scale, zero)
                write(values, idx * columns + column, of_lanes)


def _multiply(numbers, grid, zeros, lines, products, height, width, first, last):
    columns = lines.size // products.shape[0]
    for first_line in range(0, products.shape[0], num_lines):
        before_line = first_line * columns
        for start in range(0, columns, COLUMNS_AT_ONCE // num_lines):
            end = min(columns, start + COLUMNS_AT_ONCE // num_lines)
            for row in range(first, last):
                even, odd, down = no_sums(), no_sums(), row // height
                for across in range(start // width, (end - 1) // width + 1):
                    scale, zero = grid[down, across], zeros[down, across] if has_zeros else float32(0)
                    for column in range(max(start, across * width), min(end, (across + 1) * width), 2 * LANES):
                        values = values_at(numbers, row * columns + column, scale, zero)
                        even = add_products(even, values, lines, before_line + column, columns)
                        values = values_at(numbers, row * columns + column + LANES, scale, zero)
                        odd = add_products(odd, values, lines, before_line + column + LANES, columns)
                of_even, of_odd = totals(even), totals(odd)
                for line in range(num_lines):
                    before = products[first_line + line, row] if start else float32(0)
                    products[first_line + line, row] = before + (of_even[line] + of_odd[line])


def _values_at(numbers, at, scale, zero):
    """Sixteen values from an index on."""
    values = number_at(numbers, at)
    if has_zeros:
        values = values - zero
    values = values * scale
    return rounded_to_bfloat16(values) if rounds else values
