"""Products with rows that compiled functions dequantize, on several threads.

Few lines of inputs: each thread dequantizes and multiplies one row after another. Many lines: the threads dequantize a
block of rows together, and `linear` multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hermes_async.quantization.encoding import CompiledRows
from hermes_async.quantization.row_threads import RowThreads

_FEW_LINES = 4


def product_of_rows(
    compiled: CompiledRows, num_rows: int, block_rows: int, lines: torch.Tensor, threads: RowThreads
) -> torch.Tensor:
    """The product of `lines` [n, columns], in float32, with all rows of a matrix: [n, rows].

    Args:
        block_rows: The most rows that are in memory at once.
    """
    out = torch.empty((len(lines), num_rows))
    if len(lines) <= _FEW_LINES:
        scratch = torch.empty((min(num_rows, block_rows, threads.count), lines.shape[1])).numpy()
        inputs, products = lines.contiguous().numpy(), out.numpy()
        threads.divide(
            num_rows,
            lambda thread, first, last: compiled.multiply(inputs, products, first, last, scratch[thread : thread + 1]),
            at_most=len(scratch),
        )
        return out
    block = torch.empty((min(num_rows, block_rows), lines.shape[1]))
    for start in range(0, num_rows, block_rows):
        rows = block[: num_rows - start]
        threads.divide(len(rows), _writing(compiled, start, rows.numpy()))
        out[:, start : start + len(rows)] = F.linear(lines, rows)
    return out


def _writing(compiled: CompiledRows, start: int, rows: NDArray[np.float32]) -> Callable[[int, int, int], None]:
    return lambda _, first, last: compiled.write(start + first, start + last, rows[first:last])
