"""Compiled functions that dequantize and multiply numbers of one byte, or of half of one, with scales of blocks.

Their loops are in `byte_loops`. All arrays are contiguous, and the functions release the interpreter's lock. They are
compiled, within two seconds, if they are new here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes_async.quantization.kernel_sizes import LINES_AT_ONCE
from hermes_async.quantization.machine_code import CompiledFunction, Loop, compiled

_DEQUANTIZE = "void({}[::1], uint8[::1], float32[:, ::1], float32[:, ::1], int64, int64, int64, int64)"
_MULTIPLY = (
    "void(uint8[::1], float32[:, ::1], float32[:, ::1], float32[::1], float32[:, ::1], int64, int64, int64, int64)"
)


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


@dataclass(frozen=True, slots=True, eq=False)
class ByteMatrix:
    """A matrix.

    Attributes:
        numbers: uint8 [bytes].
        grid, zeros: float32 [blocks below each other, beside each other]: the scale and the zero of each block. The
            second is not read where there are no zeros.
        size: Rows and columns of a block. The last blocks may be smaller.
    """

    numbers: NDArray[np.uint8]
    grid: NDArray[np.float32]
    zeros: NDArray[np.float32]
    size: tuple[int, int]


def dequantizer(of_bytes: Bytes, matrix: ByteMatrix, *, bits: bool) -> Callable[[int, Any], None]:
    """A function of a first row, and of `values` [n, columns]: it writes n rows to them.

    Args:
        bits: `values` are the bits of numbers in bfloat16, in uint16, and not numbers in float32.
    """
    function = _dequantize(of_bytes, bits=bits).bound((matrix.numbers, matrix.grid, matrix.zeros))
    return lambda first, values: function((values.reshape(-1),), (values.shape[1], *matrix.size, first))


def multiplier(of_bytes: Bytes, matrix: ByteMatrix, lines: Any, products: Any) -> Callable[[int, int], None]:
    """A function of two rows, which writes the products of `lines` with those from the first to the second (exclusive).

    Args:
        lines: float32 [lines, columns]. There is one, or a multiple of `LINES_AT_ONCE`.
        products: float32 [lines, all rows].
    """
    arrays = matrix.numbers, matrix.grid, matrix.zeros, lines.reshape(-1), products
    function = _multiply(of_bytes, 1 if len(lines) == 1 else LINES_AT_ONCE).bound(arrays)
    return lambda first, last: function((), (*matrix.size, first, last))


def prepare(of_bytes: Bytes, *, bits: bool) -> None:
    """Compiles the functions that write float32, and with `bits` those that write bfloat16, if they are new here."""
    for count in (1, LINES_AT_ONCE):
        _multiply(of_bytes, count)
    for choice in {False, bits}:
        _dequantize(of_bytes, bits=choice)


@cache
def _dequantize(of_bytes: Bytes, *, bits: bool) -> CompiledFunction:
    return compiled(_loop("dequantize", of_bytes, int(bits), _DEQUANTIZE.format("uint16" if bits else "float32")))


@cache
def _multiply(of_bytes: Bytes, count: int) -> CompiledFunction:
    return compiled(_loop("multiply", of_bytes, count, _MULTIPLY))


def _loop(what: str, of_bytes: Bytes, choice: int, signature: str) -> Loop:
    key = what, of_bytes.kind, int(of_bytes.has_zeros), int(of_bytes.rounds), choice
    return Loop("byte_loops", key, signature)
