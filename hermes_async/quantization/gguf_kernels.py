"""Compiled functions that dequantize the blocks of GGUF's types; their loops are in `gguf_loops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes_async.quantization.kernel_sizes import LANES, LINES_AT_ONCE
from hermes_async.quantization.machine_code import Loop, compiled

_DEQUANTIZE = "void(float32[::1], uint8[::1], float32[::1], float32[::1])"
_MULTIPLY = "void(float32[::1], uint8[::1], float32[::1], float32[::1], float32[:, ::1], int64, int64)"


@dataclass(frozen=True, slots=True)
class BlockKernels:
    """The compiled functions of a type. They release the interpreter's lock; all arrays are contiguous.

    Attributes:
        dequantize: Of `blocks`, uint8 [blocks, bytes], and `values`, float32 [blocks, elements], which it writes.
        multiplier: Of `blocks`, uint8 [rows of blocks, bytes]; `lines`, float32 [lines, columns]; and `products`,
            float32 [lines, rows]. It returns a function of two rows, which writes the products with those from the
            first to the second (exclusive). There is one line, or a multiple of `lines_at_once`.
    """

    dequantize: Callable[[Any, Any], None]
    multiplier: Callable[[Any, Any, Any], Callable[[int, int], None]]
    lines_at_once: int = LINES_AT_ONCE


@cache
def kernels_of(type_name: str, elements: int, nbytes: int) -> BlockKernels:
    """The functions of a type, whose blocks have so many numbers and take so many bytes.

    Compiles them, within three seconds, if they are new on this machine.
    """
    of_type = type_name, elements, nbytes
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    dequantize_blocks = compiled(Loop("gguf_loops", ("dequantize", *of_type), _DEQUANTIZE)).bound((halves,))
    one, several = (
        compiled(Loop("gguf_loops", ("multiply", *of_type, count), _MULTIPLY)) for count in (1, LINES_AT_ONCE)
    )

    def dequantize(blocks: Any, values: Any) -> None:
        dequantize_blocks((_factors(), blocks.reshape(-1), values.reshape(-1)), ())

    def multiplier(blocks: Any, lines: Any, products: Any) -> Callable[[int, int], None]:
        arrays = blocks.reshape(-1), halves, lines.reshape(-1), products
        function = (one if len(lines) == 1 else several).bound(arrays)
        return lambda first, last: function((_factors(),), (first, last))

    return BlockKernels(dequantize, multiplier)


def _factors() -> NDArray[np.float32]:
    """Room for the scales and minimums of a block."""
    return np.empty(2 * LANES, np.float32)
