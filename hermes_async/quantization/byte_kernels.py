"""Compiled functions that dequantize and multiply numbers of one byte, or of half of one, with scales of blocks.

Source: as `fp8`, `scaled_numbers` and `packed_integers`.
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
from hermes_async.quantization.lane_sums import add_products, totals
from hermes_async.quantization.lanes import (
    LANES,
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


@dataclass(frozen=True, slots=True)
class Bytes:
    """What matrices have in common whose functions are the same.

    Attributes:
        kind: Of the numbers: "fp8" (e4m3), "int8", "uint8" or "int4".
        has_zeros: A value is (number - zero) * scale, with a zero for each block.
        rounds: Each value is rounded to bfloat16.
    """

    kind: str
    has_zeros: bool
    rounds: bool

    @property
    def name(self) -> str:
        return f"{self.kind}{self.has_zeros:d}{self.rounds:d}"

    @property
    def names(self) -> dict[str, Any]:
        """Those of the loops."""
        names: dict[str, Any] = {"number_at": _KINDS[self.kind], "has_zeros": self.has_zeros, "rounds": self.rounds}
        return names | {"values_at": inlined_copy(_values_at, names)}


# A matrix is `numbers`, uint8 [bytes], and two grids, float32 [blocks below each other, beside each other]: the scale
# and the zero of each block. The second is not read where there are no zeros. A block has `size`: rows and columns. The
# last blocks may be smaller. All arrays are contiguous, and the functions release the interpreter's lock. They are
# compiled, within two seconds, if they are new here.


@cache
def dequantizer(of_bytes: Bytes, *, bits: bool) -> Callable[..., None]:
    """A function of `numbers`, `grid`, `zeros`, `size`, a first row, and `values` [n, columns]: it writes n rows.

    Args:
        bits: `values` are the bits of numbers in bfloat16, in uint16, and not numbers in float32.
    """
    names = of_bytes.names | {"write": write_bfloat16 if bits else write_lanes}
    signature = _DEQUANTIZE.format("uint16" if bits else "float32")
    compiled = compiled_copy(_dequantize, signature, f"{of_bytes.name}{bits:d}", names)

    def dequantize(numbers, grid, zeros, size, first, values):
        compiled(numbers, grid, zeros, *size, first=first, values=values)

    return dequantize


@cache
def multiplier(of_bytes: Bytes) -> Callable[..., None]:
    """A function of `numbers`, `grid`, `zeros`, `size`, `lines`, `products`, `first` and `last`.

    It writes the products of `lines`, float32 [lines, columns], with the rows from `first` to `last` (exclusive), to
    `products`, float32 [lines, all rows]. There is one line, or a multiple of `LINES_AT_ONCE`.
    """
    names = of_bytes.names
    one, several = (
        compiled_copy(_multiply, _MULTIPLY, f"{of_bytes.name}_{count}", names | names_of_lines(count))
        for count in (1, LINES_AT_ONCE)
    )

    def multiply(numbers, grid, zeros, size, lines, products, first, last):
        function = one if len(lines) == 1 else several
        function(numbers, grid, zeros, *size, lines=lines.reshape(-1), products=products, first=first, last=last)

    return multiply


# In the loops, each kind has these names of its own.
rounds: bool
has_zeros: bool
num_lines: int
no_sums: Callable[[], Any]
number_at: Callable[..., Any]
values_at: Callable[..., Any]
write: Callable[..., None]


_DEQUANTIZE = "void(uint8[::1], float32[:, ::1], float32[:, ::1], int64, int64, int64, {}[:, ::1])"
_MULTIPLY = (
    "void(uint8[::1], float32[:, ::1], float32[:, ::1], int64, int64, float32[::1], float32[:, ::1], int64, int64)"
)


def _dequantize(numbers, grid, zeros, height, width, first, values):
    columns = values.shape[1]
    flat = values.reshape(values.size)
    for idx in range(values.shape[0]):
        row = first + idx
        down = row // height
        for across in range(grid.shape[1]):
            scale, zero = grid[down, across], zeros[down, across] if has_zeros else float32(0)
            for column in range(across * width, min(columns, (across + 1) * width), LANES):
                of_lanes = values_at(numbers, row * columns + column, scale, zero)
                write(flat, idx * columns + column, of_lanes)


def _multiply(numbers, grid, zeros, height, width, lines, products, first, last):
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
