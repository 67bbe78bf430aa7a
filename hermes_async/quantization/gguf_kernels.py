"""Compiled functions that dequantize the blocks of GGUF's types.

A block is made of runs: numbers in a row that share a scale, and a minimum. A number times its scale, less its minimum,
is a value. So a type is described by two functions:

- `scales(blocks, block, halves, scale, minimum)` writes the scale of each run of a block, and the minimum if the type
  has them. Some types have two of each for a run: one for each half.
- `number(blocks, block, run, idx)` is one of a run's numbers.

`kernels_of` makes loops of them, which Numba compiles when a type is first used. The compiler makes vector instructions
of a loop only if it can see that no index is negative, and if numbers are no wider than they need to be. That is why
lengths of runs are masked, and bytes are handled as bytes.

Source: the `gguf` package, `quants`.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, call-overload"

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, TypeAlias

import numba
import numpy as np
from numba import float32, int8, int32, uint8

_Scales: TypeAlias = Callable[..., None]
_Number: TypeAlias = Callable[..., Any]

_inlined = numba.njit(forceinline=True)

_MAY_SUM_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}
"""What lets the compiler sum several numbers at a time: flags of LLVM's language reference, "Fast-Math Flags"."""

# --- scales and minimums ---


@_inlined
def _half(blocks, block, at, halves):
    """The number in float16 at a byte of a block. `halves` has the value of each of the 65536."""
    return halves[int32(blocks[block, at]) | int32(blocks[block, at + 1]) << 8]


@_inlined
def _word(blocks, block, at):
    """The number in uint32 at a byte of a block."""
    word = np.uint32(0)
    for byte in range(4):
        word |= np.uint32(blocks[block, at + byte]) << np.uint32(8 * byte)
    return np.uint32(word)


def _scale_at(at: int) -> _Scales:
    """The function of a block with one scale, at a byte of it."""

    @_inlined
    def scales(blocks, block, halves, scale, minimum):
        for run in range(len(scale)):
            scale[run] = _half(blocks, block, at, halves)

    result: _Scales = scales
    return result


@_inlined
def _scale_and_minimum_first(blocks, block, halves, scale, minimum):
    """A block that begins with one scale, and one minimum, which is stored with the other sign."""
    for run in range(len(scale)):
        scale[run] = _half(blocks, block, 0, halves)
        minimum[run] = -_half(blocks, block, 2, halves)


@_inlined
def _q8_k_scale(blocks, block, halves, scale, minimum):
    for run in range(len(scale)):
        scale[run] = np.uint32(_word(blocks, block, 0)).view(np.float32)


@_inlined
def _q2_k_scales(blocks, block, halves, scale, minimum):
    of_scales, of_minimums = _half(blocks, block, 80, halves), _half(blocks, block, 82, halves)
    for run in range(16):
        scale[run] = of_scales * float32(blocks[block, run] & 15)
        minimum[run] = of_minimums * float32(blocks[block, run] >> 4)


@_inlined
def _q3_k_scales(blocks, block, halves, scale, minimum):
    of_scales = _half(blocks, block, 108, halves)
    for run in range(16):
        low = blocks[block, 96 + (run & 7)] >> 4 * (run >> 3) & 15
        high = blocks[block, 104 + (run & 3)] >> 2 * (run >> 2) & 3
        scale[run] = of_scales * float32(int32(low | high << 4) - 32)


@_inlined
def _k_scales(blocks, block, halves, scale, minimum):
    """Eight scales, and eight minimums, in twelve bytes: those of Q4_K and Q5_K."""
    of_scales, of_minimums = _half(blocks, block, 0, halves), _half(blocks, block, 2, halves)
    for run in range(4):
        first, second, third = blocks[block, 4 + run], blocks[block, 8 + run], blocks[block, 12 + run]
        scale[run] = of_scales * float32(first & 63)
        minimum[run] = of_minimums * float32(second & 63)
        scale[4 + run] = of_scales * float32(third & 15 | first >> 6 << 4)
        minimum[4 + run] = of_minimums * float32(third >> 4 | second >> 6 << 4)


@_inlined
def _q6_k_scales(blocks, block, halves, scale, minimum):
    of_scales = _half(blocks, block, 208, halves)
    for run in range(16):
        scale[run] = of_scales * float32(int8(blocks[block, 192 + run]))


@_inlined
def _iq4_xs_scales(blocks, block, halves, scale, minimum):
    of_scales = _half(blocks, block, 0, halves)
    for pair in range(8):
        low = blocks[block, 4 + (pair >> 1)] >> 4 * (pair & 1) & 15
        high = blocks[block, 2 + (pair >> 2)] >> 2 * (pair & 3) & 3
        of_pair = of_scales * float32(int32(low | high << 4) - 32)
        for run in range(2 * pair, 2 * pair + 2):
            scale[run] = of_pair


@_inlined
def _mxfp4_scale(blocks, block, halves, scale, minimum):
    """Half of two to the power of a byte: the numbers are twice what they stand for."""
    exponent = np.uint32(blocks[block, 0])
    bits = np.uint32(0x00200000) << exponent if exponent < 2 else np.uint32(exponent - np.uint32(1)) << np.uint32(23)
    for run in range(len(scale)):
        scale[run] = np.uint32(bits).view(np.float32)


# --- numbers ---


@_inlined
def _bits(byte, shift, mask):
    """Some bits of a byte, as a byte."""
    return uint8(uint8(byte >> uint8(shift)) & uint8(mask))


@_inlined
def _fifth_bit(blocks, block, at, idx):
    """A bit of four bytes, times sixteen."""
    bits = np.uint32(_word(blocks, block, at) >> np.uint32(idx))
    return int32(np.uint32(bits & np.uint32(1)) * np.uint32(16))


@_inlined
def _q8_0(blocks, block, run, idx):
    return int8(blocks[block, 2 + idx])


@_inlined
def _q8_k(blocks, block, run, idx):
    return int8(blocks[block, 4 + 32 * run + idx])


@_inlined
def _q4_0(blocks, block, run, idx):
    return int32(_bits(blocks[block, 2 + idx], 4 * run, 15)) - 8


@_inlined
def _q4_1(blocks, block, run, idx):
    return _bits(blocks[block, 4 + idx], 4 * run, 15)


@_inlined
def _q5_0(blocks, block, run, idx):
    return int32(_bits(blocks[block, 6 + idx], 4 * run, 15)) + _fifth_bit(blocks, block, 2, 16 * run + idx) - 16


@_inlined
def _q5_1(blocks, block, run, idx):
    return int32(_bits(blocks[block, 8 + idx], 4 * run, 15)) + _fifth_bit(blocks, block, 4, 16 * run + idx)


@_inlined
def _q2_k(blocks, block, run, idx):
    return _bits(blocks[block, 16 + 32 * (run >> 2) + idx], 2 * (run & 3), 3)


@_inlined
def _q3_k(blocks, block, run, idx):
    low = _bits(blocks[block, 32 + 32 * (run >> 2) + idx], 2 * (run & 3), 3)
    high = _bits(blocks[block, idx], run, 1)
    return int32(uint8(low + uint8(high * uint8(4)))) - 4


@_inlined
def _q4_k(blocks, block, run, idx):
    return _bits(blocks[block, 16 + 32 * (run >> 1) + idx], 4 * (run & 1), 15)


@_inlined
def _q5_k(blocks, block, run, idx):
    low = _bits(blocks[block, 48 + 32 * (run >> 1) + idx], 4 * (run & 1), 15)
    return uint8(low + uint8(_bits(blocks[block, 16 + idx], run, 1) * uint8(16)))


@_inlined
def _q6_k(blocks, block, run, idx):
    half, quarter = run >> 2, run & 3
    low = _bits(blocks[block, 64 * half + 32 * (quarter & 1) + idx], 4 * (quarter >> 1), 15)
    high = _bits(blocks[block, 128 + 32 * half + idx], 2 * quarter, 3)
    return int32(uint8(low + uint8(high * uint8(16)))) - 32


_IQ4_NUMBERS = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8)
_MXFP4_NUMBERS = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.int8)


@_inlined
def _iq4_nl(blocks, block, run, idx):
    return _IQ4_NUMBERS[_bits(blocks[block, 2 + idx], 4 * run, 15)]


@_inlined
def _iq4_xs(blocks, block, run, idx):
    return _IQ4_NUMBERS[_bits(blocks[block, 8 + 16 * (run >> 1) + idx], 4 * (run & 1), 15)]


@_inlined
def _mxfp4(blocks, block, run, idx):
    return _MXFP4_NUMBERS[_bits(blocks[block, 1 + idx], 4 * run, 15)]


@_inlined
def _tq1_0(blocks, block, run, idx):
    """Five numbers of -1, 0 and 1 to a byte, as digits of a fraction with the base three."""
    if run < 10:
        byte, digit = 16 * (run & 1) + idx, run >> 1
    elif run < 15:
        byte, digit = 32 + idx, run - 10
    else:
        byte, digit = 48 + (idx & 3), idx >> 2
    fraction = blocks[block, byte]
    for _ in range(digit):
        fraction = uint8(fraction * uint8(3))
    return (int32(fraction) * 3 >> 8) - 1


@_inlined
def _tq2_0(blocks, block, run, idx):
    return int32(_bits(blocks[block, 32 * (run >> 2) + idx], 2 * (run & 3), 3)) - 1


# --- the loop ---


@dataclass(frozen=True, slots=True)
class _Type:
    """How the values of a block are made.

    Attributes:
        runs: Of a block.
        scales_of_run: 1, or 2: one for each half.
    """

    runs: int
    scales: _Scales
    number: _Number
    has_minimums: bool = False
    scales_of_run: int = 1


_TYPES = {
    "Q8_0": _Type(1, _scale_at(0), _q8_0),
    "Q4_0": _Type(2, _scale_at(0), _q4_0),
    "Q4_1": _Type(2, _scale_and_minimum_first, _q4_1, has_minimums=True),
    "Q5_0": _Type(2, _scale_at(0), _q5_0),
    "Q5_1": _Type(2, _scale_and_minimum_first, _q5_1, has_minimums=True),
    "Q2_K": _Type(8, _q2_k_scales, _q2_k, has_minimums=True, scales_of_run=2),
    "Q3_K": _Type(8, _q3_k_scales, _q3_k, scales_of_run=2),
    "Q4_K": _Type(8, _k_scales, _q4_k, has_minimums=True),
    "Q5_K": _Type(8, _k_scales, _q5_k, has_minimums=True),
    "Q6_K": _Type(8, _q6_k_scales, _q6_k, scales_of_run=2),
    "Q8_K": _Type(8, _q8_k_scale, _q8_k),
    "IQ4_NL": _Type(2, _scale_at(0), _iq4_nl),
    "IQ4_XS": _Type(16, _iq4_xs_scales, _iq4_xs),
    "MXFP4": _Type(2, _mxfp4_scale, _mxfp4),
    "TQ1_0": _Type(16, _scale_at(52), _tq1_0),
    "TQ2_0": _Type(8, _scale_at(64), _tq2_0),
}


@dataclass(frozen=True, slots=True)
class BlockKernels:
    """The compiled functions of a type. They release the interpreter's lock; all arrays are contiguous.

    Attributes:
        dequantize: Of `blocks`, uint8 [blocks, bytes], and `values`, float32 [blocks, elements], which it writes.
        multiply: Of `blocks`, uint8 [rows of blocks, bytes]; `lines`, float32 [lines, columns]; `products`, float32
            [lines, rows], which it writes for the rows from `first` to `last` (exclusive); and `scratch`, float32
            [1, columns].
    """

    dequantize: Callable[[Any, Any], None]
    multiply: Callable[[Any, Any, Any, int, int, Any], None]


@cache
def kernels_of(type_name: str, elements: int) -> BlockKernels:
    """The functions of a type, whose blocks have so many numbers.

    Compiles them, within two seconds, if they are new on this machine.
    """
    of_type = _TYPES[type_name]
    runs, length = of_type.runs, elements // of_type.runs
    names: dict[str, Any] = {field: getattr(of_type, field) for field in _Type.__slots__} | {"run_length": length}
    dequantize = _compiled(_dequantize, _DEQUANTIZE, type_name, names)
    multiply = _compiled(_multiply, _MULTIPLY, type_name, names | {"dequantize": dequantize}, _MAY_SUM_IN_ANY_ORDER)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return BlockKernels(
        lambda blocks, values: dequantize(blocks, halves, values.reshape(-1, runs, length)),
        lambda blocks, lines, products, first, last, scratch: multiply(
            blocks, halves, lines, products, first=first, last=last, scratch=scratch.reshape(-1, runs, length)
        ),
    )


def _compiled(
    function: Callable[..., None],
    signature: str,
    type_name: str,
    names: Mapping[str, Any],
    fastmath: Collection[str] = (),
) -> Callable[..., None]:
    """A compiled copy of a function, in which `names` have values of their own.

    Numba keeps what it compiles on disk, by the name of the function. Where no folder can be written to, it is compiled
    again in each process.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__, {**globals(), **names})
    own.__name__ = own.__qualname__ = f"{function.__name__}_{type_name}"
    own.__module__ = __name__
    options = {"nogil": True, "fastmath": set(fastmath)}
    try:
        compiled = numba.njit(signature, cache=True, **options)(own)
    except (RuntimeError, OSError):  # no folder for it, or no space
        compiled = numba.njit(signature, **options)(own)
    result: Callable[..., None] = compiled
    return result


# --- the loops, in which each type has these names of its own ---

runs: int
run_length: int
scales_of_run: int
has_minimums: bool
scales: _Scales
number: _Number
dequantize: Callable[..., None]


_DEQUANTIZE = "void(uint8[:, ::1], float32[::1], float32[:, :, ::1])"
_MULTIPLY = "void(uint8[:, ::1], float32[::1], float32[:, ::1], float32[:, ::1], int64, int64, float32[:, :, ::1])"


def _dequantize(blocks, halves, values):
    scale, minimum = np.empty(runs * scales_of_run, np.float32), np.empty(runs * scales_of_run, np.float32)
    length = values.shape[2] & 4 * run_length - 1
    for block in range(values.shape[0]):
        scales(blocks, block, halves, scale, minimum)
        for run in range(runs):
            first, last = scales_of_run * run, scales_of_run * (run + 1) - 1
            times, last_times, less, last_less = scale[first], scale[last], minimum[first], minimum[last]
            for idx in range(length):
                value = float32(int32(number(blocks, block, run, idx)))
                # The compiler leaves out what does not depend on the loop.
                value *= times if scales_of_run == 1 or idx < run_length // 2 else last_times
                if has_minimums:
                    value -= less if scales_of_run == 1 or idx < run_length // 2 else last_less
                values[block, run, idx] = value


def _multiply(blocks, halves, lines, products, first, last, scratch):
    of_row, row_values = scratch.shape[0], scratch.reshape(scratch.size)
    for row in range(first, last):
        dequantize(blocks[row * of_row : (row + 1) * of_row], halves, scratch)
        for line in range(lines.shape[0]):
            total = float32(0)
            for column in range(row_values.shape[0]):
                total += row_values[column] * lines[line, column]
            products[line, row] = total
