"""Loops that dequantize the blocks of GGUF's types, for Numba.

The numbers of a block share a scale, and a minimum, in runs. A number times its scale, less its minimum, is a value. So
a type is described by two functions:

- `scales(blocks, at, halves, factors)` writes the scale of each run of a block, and then the minimum of each run if the
  type has them. `at` is the block's first byte.
- `numbers(blocks, at, group)` is a group of sixteen numbers of a block, as a vector of bytes.

`loop_of` makes loops of them.

Source: the `gguf` package, `quants`.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numba import float32, int32, uint8

from hermes_async.quantization.compiling import copy_of, inlined, inlined_copy, names_of_lines
from hermes_async.quantization.kernel_sizes import COLUMNS_AT_ONCE, LANES
from hermes_async.quantization.lane_sums import add_products, totals
from hermes_async.quantization.lanes import (
    bits_at,
    bits_of,
    bits_of_each,
    constant_bytes,
    element_at,
    filled,
    floats,
    half_filled,
    high_bytes,
    lanes_at,
    multiply_add,
    places,
    signed,
    table,
    write_lanes,
)

_Scales: TypeAlias = Callable[..., None]
_Numbers: TypeAlias = Callable[..., Any]


# --- scales and minimums ---


@inlined
def _half(blocks, at, halves):
    """The number in float16 at a byte. `halves` has the value of each of the 65536."""
    return halves[int32(element_at(blocks, at)) | int32(element_at(blocks, at + 1)) << 8]


@inlined
def _bits(blocks, at, shift, mask):
    """Some bits of sixteen bytes."""
    return bits_of(lanes_at(blocks, at), uint8(shift), uint8(mask))


def _scale_at(offset: int) -> _Scales:
    """The function of a block with one scale, at a byte of it."""

    @inlined
    def scales(blocks, at, halves, factors):
        factors[0] = _half(blocks, at + offset, halves)

    result: _Scales = scales
    return result


@inlined
def _scale_and_minimum_first(blocks, at, halves, factors):
    """A block that begins with one scale, and one minimum, which is stored with the other sign."""
    factors[0] = _half(blocks, at, halves)
    factors[1] = -_half(blocks, at + 2, halves)


@inlined
def _q8_k_scale(blocks, at, halves, factors):
    word = np.uint32(0)
    for byte in range(4):
        word |= np.uint32(element_at(blocks, at + byte)) << np.uint32(8 * byte)
    factors[0] = np.uint32(word).view(np.float32)


@inlined
def _q2_k_scales(blocks, at, halves, factors):
    write_lanes(factors, 0, floats(_bits(blocks, at, 0, 15)) * _half(blocks, at + 80, halves))
    write_lanes(factors, 16, floats(_bits(blocks, at, 4, 15)) * _half(blocks, at + 82, halves))


_q3_k_low, _q3_k_high = places(range(2, 10)), places(range(10, 14))
_q3_k_low_shifts = constant_bytes([0] * 8 + [4] * 8)
_q3_k_high_shifts = constant_bytes([0] * 4 + [2] * 4 + [4] * 4 + [6] * 4)
_15, _3 = constant_bytes([15]), constant_bytes([3])


@inlined
def _q3_k_scales(blocks, at, halves, factors):
    """Sixteen numbers of six bits in twelve bytes."""
    stored = lanes_at(blocks, at + 94)  # ends with the block
    low = bits_of_each(_q3_k_low(stored), _q3_k_low_shifts(), _15())
    high = bits_of_each(_q3_k_high(stored), _q3_k_high_shifts(), _3())
    write_lanes(factors, 0, floats(signed(low + high * 16 - 32)) * _half(blocks, at + 108, halves))


_k_low = places((0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11))
_k_high = places([0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2)
_k_low_shifts = constant_bytes([0] * 12 + [4] * 4)
_k_low_masks = constant_bytes([63] * 4 + [15] * 4)
_k_high_masks = constant_bytes([0] * 4 + [3] * 4)
_6 = constant_bytes([6])


@inlined
def _k_scales(blocks, at, halves, factors):
    """Eight scales, and eight minimums, with six bits each in twelve bytes: those of Q4_K and Q5_K."""
    stored = lanes_at(blocks, at + 4)
    low = bits_of_each(_k_low(stored), _k_low_shifts(), _k_low_masks())
    high = bits_of_each(_k_high(stored), _6(), _k_high_masks())
    of_blocks = half_filled(_half(blocks, at, halves), _half(blocks, at + 2, halves))
    write_lanes(factors, 0, floats(low + high * 16) * of_blocks)


@inlined
def _q6_k_scales(blocks, at, halves, factors):
    write_lanes(factors, 0, floats(signed(lanes_at(blocks, at + 192))) * _half(blocks, at + 208, halves))


_iq4_xs_low, _iq4_xs_high = places((2, 2, 3, 3, 4, 4, 5, 5)), places([0] * 4 + [1] * 4)
_iq4_xs_low_shifts, _iq4_xs_high_shifts = constant_bytes((0, 4)), constant_bytes((0, 2, 4, 6))


@inlined
def _iq4_xs_scales(blocks, at, halves, factors):
    """Eight numbers of six bits in six bytes."""
    stored = lanes_at(blocks, at + 2)
    low = bits_of_each(_iq4_xs_low(stored), _iq4_xs_low_shifts(), _15())
    high = bits_of_each(_iq4_xs_high(stored), _iq4_xs_high_shifts(), _3())
    write_lanes(factors, 0, floats(signed(low + high * 16 - 32)) * _half(blocks, at, halves))


@inlined
def _mxfp4_scale(blocks, at, halves, factors):
    """Half of two to the power of a byte: the numbers are twice what they stand for."""
    exponent = np.uint32(element_at(blocks, at))
    bits = np.uint32(0x00200000) << exponent if exponent < 2 else np.uint32(exponent - np.uint32(1)) << np.uint32(23)
    factors[0] = np.uint32(bits).view(np.float32)


# --- numbers ---


@inlined
def _q8_0(blocks, at, group):
    return signed(lanes_at(blocks, at + 2 + 16 * group))


@inlined
def _q8_k(blocks, at, group):
    return signed(lanes_at(blocks, at + 4 + 16 * group))


@inlined
def _q4_0(blocks, at, group):
    return signed(_bits(blocks, at + 2, 4 * group, 15) - 8)


@inlined
def _q4_1(blocks, at, group):
    return _bits(blocks, at + 4, 4 * group, 15)


@inlined
def _q5_0(blocks, at, group):
    return signed(_bits(blocks, at + 6, 4 * group, 15) + bits_at(blocks, at + 2 + 2 * group) * 16 - 16)


@inlined
def _q5_1(blocks, at, group):
    return _bits(blocks, at + 8, 4 * group, 15) + bits_at(blocks, at + 4 + 2 * group) * 16


@inlined
def _q2_k(blocks, at, group):
    half, run = group & 1, group >> 1
    return _bits(blocks, at + 16 + 32 * (run >> 2) + 16 * half, 2 * (run & 3), 3)


@inlined
def _q3_k(blocks, at, group):
    half, run = group & 1, group >> 1
    low = _bits(blocks, at + 32 + 32 * (run >> 2) + 16 * half, 2 * (run & 3), 3)
    return signed(low + _bits(blocks, at + 16 * half, run, 1) * 4 - 4)


@inlined
def _q4_k(blocks, at, group):
    half, run = group & 1, group >> 1
    return _bits(blocks, at + 16 + 32 * (run >> 1) + 16 * half, 4 * (run & 1), 15)


@inlined
def _q5_k(blocks, at, group):
    half, run = group & 1, group >> 1
    low = _bits(blocks, at + 48 + 32 * (run >> 1) + 16 * half, 4 * (run & 1), 15)
    return low + _bits(blocks, at + 16 + 16 * half, run, 1) * 16


@inlined
def _q6_k(blocks, at, group):
    half, quarter, of_block = group & 1, group >> 1 & 3, group >> 3
    low = _bits(blocks, at + 64 * of_block + 32 * (quarter & 1) + 16 * half, 4 * (quarter >> 1), 15)
    high = _bits(blocks, at + 128 + 32 * of_block + 16 * half, 2 * quarter, 3)
    return signed(low + high * 16 - 32)


_iq4_numbers = table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_mxfp4_numbers = table((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))


@inlined
def _iq4_nl(blocks, at, group):
    return _iq4_numbers(_bits(blocks, at + 2, 4 * group, 15))


@inlined
def _iq4_xs(blocks, at, group):
    return _iq4_numbers(_bits(blocks, at + 8 + 16 * (group >> 1), 4 * (group & 1), 15))


@inlined
def _mxfp4(blocks, at, group):
    return _mxfp4_numbers(_bits(blocks, at + 1, 4 * group, 15))


_last_four = places((10, 11, 12, 13))
_powers_of_3 = constant_bytes([1] * 4 + [3] * 4 + [9] * 4 + [27] * 4)
_POWERS_OF_3 = np.array((1, 3, 9, 27, 81), np.uint8)


@inlined
def _tq1_0(blocks, at, group):
    """Five numbers of -1, 0 and 1 to a byte, as digits of a fraction with the base three."""
    if group < 15:
        digit = group >> 1 if group < 10 else group - 10
        stored = lanes_at(blocks, at + (16 * (group & 1) if group < 10 else 32))
        fractions = stored * element_at(_POWERS_OF_3, digit)
    else:
        fractions = _last_four(lanes_at(blocks, at + 38)) * _powers_of_3()
    return signed(high_bytes(fractions, uint8(3)) - 1)


@inlined
def _tq2_0(blocks, at, group):
    half, run = group & 1, group >> 1
    return signed(_bits(blocks, at + 32 * (run >> 2) + 16 * half, 2 * (run & 3), 3) - 1)


# --- the loops ---


@dataclass(frozen=True, slots=True)
class _Type:
    """How the values of a block are made.

    Attributes:
        run_length: The numbers that share a scale.
    """

    run_length: int
    scales: _Scales
    numbers: _Numbers
    has_minimums: bool = False


_TYPES = {
    "Q8_0": _Type(32, _scale_at(0), _q8_0),
    "Q4_0": _Type(32, _scale_at(0), _q4_0),
    "Q4_1": _Type(32, _scale_and_minimum_first, _q4_1, has_minimums=True),
    "Q5_0": _Type(32, _scale_at(0), _q5_0),
    "Q5_1": _Type(32, _scale_and_minimum_first, _q5_1, has_minimums=True),
    "Q2_K": _Type(16, _q2_k_scales, _q2_k, has_minimums=True),
    "Q3_K": _Type(16, _q3_k_scales, _q3_k),
    "Q4_K": _Type(32, _k_scales, _q4_k, has_minimums=True),
    "Q5_K": _Type(32, _k_scales, _q5_k, has_minimums=True),
    "Q6_K": _Type(16, _q6_k_scales, _q6_k),
    "Q8_K": _Type(256, _q8_k_scale, _q8_k),
    "IQ4_NL": _Type(32, _scale_at(0), _iq4_nl),
    "IQ4_XS": _Type(32, _iq4_xs_scales, _iq4_xs),
    "MXFP4": _Type(32, _mxfp4_scale, _mxfp4),
    "TQ1_0": _Type(256, _scale_at(52), _tq1_0),
    "TQ2_0": _Type(256, _scale_at(64), _tq2_0),
}


def loop_of(what: str, type_name: str, elements: int, nbytes: int, count: int = 1):
    """A loop of a type whose blocks have so many numbers and take so many bytes.

    Args:
        what: "dequantize" or "multiply".
        count: Lines that are multiplied at once.
    """
    of_type = _TYPES[type_name]
    names: dict[str, Any] = {field: getattr(of_type, field) for field in _Type.__slots__}
    names |= {"block_length": elements, "block_bytes": nbytes, "num_runs": elements // of_type.run_length}
    names["values_of"] = inlined_copy(_values_of, names)
    loop = {"dequantize": _dequantize, "multiply": _multiply}[what]
    return copy_of(loop, names | names_of_lines(count))


# In the loops, each type has these names of its own.
run_length: int
num_runs: int
block_length: int
block_bytes: int
has_minimums: bool
scales: _Scales
numbers: _Numbers
num_lines: int
no_sums: Callable[[], Any]
values_of: Callable[..., Any]


def _dequantize(factors, blocks, values, halves):
    for block in range(values.size // block_length):
        at = block * block_bytes
        scales(blocks, at, halves, factors)
        for group in range(block_length // LANES):
            run = group * LANES // run_length
            value = floats(numbers(blocks, at, group)) * factors[run]
            if has_minimums:
                value = value - factors[num_runs + run]
            write_lanes(values, block * block_length + group * LANES, value)


def _multiply(factors, blocks, halves, lines, products, first, last):
    columns = lines.size // products.shape[0]
    of_row, of_part = columns // block_length, COLUMNS_AT_ONCE // num_lines // block_length
    for first_line in range(0, products.shape[0], num_lines):
        for start in range(0, of_row, of_part):
            for row in range(first, last):
                even, odd = no_sums(), no_sums()
                for block in range(start, min(of_row, start + of_part)):
                    at, column = (row * of_row + block) * block_bytes, first_line * columns + block * block_length
                    scales(blocks, at, halves, factors)
                    for group in range(0, block_length // LANES, 2):
                        value = values_of(blocks, at, group, factors)
                        even = add_products(even, value, lines, column + group * LANES, columns)
                        value = values_of(blocks, at, group + 1, factors)
                        odd = add_products(odd, value, lines, column + (group + 1) * LANES, columns)
                of_even, of_odd = totals(even), totals(odd)
                for line in range(num_lines):
                    before = products[first_line + line, row] if start else float32(0)
                    products[first_line + line, row] = before + (of_even[line] + of_odd[line])


def _values_of(blocks, at, group, factors):
    """Sixteen values of a block. Unlike in `_dequantize`, number, scale and minimum may be rounded once."""
    run = group * LANES // run_length
    value = floats(numbers(blocks, at, group))
    if has_minimums:
        return multiply_add(value, filled(factors[run]), filled(-factors[num_runs + run]))
    return value * factors[run]
