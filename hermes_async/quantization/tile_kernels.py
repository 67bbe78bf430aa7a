"""Compiled functions that multiply several rows with several lines of inputs at once; their loops are in `tile_loops`.

All arrays are contiguous, and no index is checked. The number of columns is a multiple of `LANES`. The functions
release the interpreter's lock. They are compiled, within two seconds, if they are new here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from hermes_async.quantization.kernel_sizes import MOST_TILE_LINES, ROWS_OF_SUMS
from hermes_async.quantization.machine_code import CompiledFunction, Loop, compiled, has_wide_vectors

_PACK = "void({}[:, ::1], float32[::1])"
_MULTIPLY = "void(float32[::1], {}[::1], float32[::1], float32[::1], {}[:, ::1], int64, int64, int64, int64)"


def tile_shape() -> tuple[int, int]:
    """Lines and rows of a tile. With eight lines and three rows, their sums are 24 of 32 registers."""
    return (MOST_TILE_LINES, 3) if has_wide_vectors() else (4, 2)


def packed_size(num_lines: int, columns: int) -> int:
    """How many numbers lines [n, columns] are when they are packed: n is rounded up to whole tiles."""
    of_tile, _ = tile_shape()
    return -(-num_lines // of_tile) * of_tile * columns


def pack(lines: Any, packed: Any) -> None:
    """Writes `lines` [n, columns] to `packed`, float32 [packed_size], in the order in which they are multiplied.

    Args:
        lines: float32, or the bits of bfloat16 in uint16.
    """
    dtype = lines.dtype.name
    compiled(Loop("tile_loops", ("pack", dtype), _PACK.format(dtype)))((lines, packed))


def multiplier(packed: Any, bias: Any, out: Any, of_rows: str) -> Callable[[Any, tuple[int, int, int, int]], None]:
    """A function that multiplies rows with lines that `pack` has packed.

    It takes the rows, [all * columns], and four numbers: columns, the first row, the row behind the last, and the
    column of `out` for row 0.

    Args:
        bias: A number in float32 for each column of `out`, added before a result is rounded; empty if there is none.
        out: [n, any number], float32, or the bits of bfloat16 in uint16. Each result is rounded once.
        of_rows: The dtype of the rows: as `out`.
    """
    function = _multiplier(of_rows, out.dtype.name).bound((packed, bias, out))

    def multiply(rows: Any, shape: tuple[int, int, int, int]) -> None:
        sums = np.empty(packed.size // shape[0] * ROWS_OF_SUMS, np.float32)
        function((sums, rows), shape)

    return multiply


def prepare(of_rows: str, of_lines: str) -> None:
    """Compiles the functions for rows and lines of these dtypes, if they are new here."""
    compiled(Loop("tile_loops", ("pack", of_lines), _PACK.format(of_lines)))
    _multiplier(of_rows, of_lines)


@cache
def _multiplier(of_rows: str, of_results: str) -> CompiledFunction:
    return compiled(Loop("tile_loops", ("multiply", of_results), _MULTIPLY.format(of_rows, of_results)))
