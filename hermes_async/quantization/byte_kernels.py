"""Compiled functions that dequantize and multiply numbers of one byte, or of half of one, with scales of blocks.

Their loops are in `byte_loops`. A matrix is `numbers`, uint8 [bytes], and two grids, float32 [blocks below each other,
beside each other]: the scale and the zero of each block. The second is not read where there are no zeros. A block has
`size`: rows and columns. The last blocks may be smaller. All arrays are contiguous, and the functions release the
interpreter's lock. They are compiled, within two seconds, if they are new here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from hermes_async.quantization.kernel_sizes import LINES_AT_ONCE
from hermes_async.quantization.machine_code import Loop, compiled

_DEQUANTIZE = "void(uint8[::1], float32[:, ::1], float32[:, ::1], {}[::1], int64, int64, int64, int64)"
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


@cache
def dequantizer(of_bytes: Bytes, *, bits: bool) -> Callable[..., None]:
    """A function of `numbers`, `grid`, `zeros`, `size`, a first row, and `values` [n, columns]: it writes n rows.

    Args:
        bits: `values` are the bits of numbers in bfloat16, in uint16, and not numbers in float32.
    """
    signature = _DEQUANTIZE.format("uint16" if bits else "float32")
    function = compiled(_loop("dequantize", of_bytes, int(bits), signature))

    def dequantize(numbers: Any, grid: Any, zeros: Any, size: tuple[int, int], first: int, values: Any) -> None:
        function((numbers, grid, zeros, values.reshape(-1)), (values.shape[1], *size, first))

    return dequantize


@cache
def multiplier(of_bytes: Bytes) -> Callable[..., None]:
    """A function of `numbers`, `grid`, `zeros`, `size`, `lines`, `products`, `first` and `last`.

    It writes the products of `lines`, float32 [lines, columns], with the rows from `first` to `last` (exclusive), to
    `products`, float32 [lines, all rows]. There is one line, or a multiple of `LINES_AT_ONCE`.
    """
    one, several = (compiled(_loop("multiply", of_bytes, count, _MULTIPLY)) for count in (1, LINES_AT_ONCE))

    def multiply(
        numbers: Any, grid: Any, zeros: Any, size: tuple[int, int], lines: Any, products: Any, first: int, last: int
    ) -> None:
        function = one if len(lines) == 1 else several
        function((numbers, grid, zeros, lines.reshape(-1), products), (*size, first, last))

    return multiply


def _loop(what: str, of_bytes: Bytes, choice: int, signature: str) -> Loop:
    key = what, of_bytes.kind, int(of_bytes.has_zeros), int(of_bytes.rounds), choice
    return Loop("byte_loops", key, signature)
