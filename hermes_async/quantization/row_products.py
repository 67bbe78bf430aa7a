"""Products with rows that a compiled function dequantizes, on several threads.

Few lines of inputs: each thread dequantizes some rows at a time, which stay in its processor's cache, and multiplies
them. Many lines: the threads dequantize a block of rows together, and `linear` multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hermes_async.quantization.encoding import RowWriter
from hermes_async.quantization.row_threads import RowThreads

_FEW_LINES = 4
_ROWS_OF_A_THREAD = 1 << 17
"""Elements that a thread dequantizes and then multiplies: half a megabyte."""


def product_of_rows(
    write: RowWriter, num_rows: int, block_rows: int, lines: torch.Tensor, threads: RowThreads
) -> torch.Tensor:
    """The product of `lines` [n, columns], in float32, with all rows of a matrix: [n, rows].

    Args:
        write: Dequantizes rows.
        block_rows: The most rows that are in memory at once.
    """
    scratch = torch.empty((min(num_rows, block_rows), lines.shape[1]))
    if len(lines) <= _FEW_LINES:
        return _few_lines(write, num_rows, scratch.numpy(), lines, threads)
    out = torch.empty((len(lines), num_rows))
    for start in range(0, num_rows, block_rows):
        block = scratch[: num_rows - start]
        threads.divide(len(block), _writing(write, start, block.numpy()))
        out[:, start : start + len(block)] = F.linear(lines, block)
    return out


def _writing(write: RowWriter, start: int, block: NDArray[np.float32]) -> Callable[[int, int, int], None]:
    return lambda _, first, last: write(start + first, start + last, block[first:last])


def _few_lines(
    write: RowWriter, num_rows: int, scratch: NDArray[np.float32], lines: torch.Tensor, threads: RowThreads
) -> torch.Tensor:
    from hermes_async.quantization.compiled_product import multiply  # compiles it, and imports Numba

    out = torch.empty((len(lines), num_rows))
    inputs, products = lines.contiguous().numpy(), out.numpy()
    count = min(threads.count, len(scratch))
    own_rows = max(1, min(len(scratch) // count, _ROWS_OF_A_THREAD // scratch.shape[1]))

    def part(thread: int, first: int, last: int) -> None:
        own = scratch[thread * own_rows : (thread + 1) * own_rows]
        for start in range(first, last, own_rows):
            stop = min(last, start + own_rows)
            write(start, stop, own[: stop - start])
            multiply(own[: stop - start], inputs, products, start)

    threads.divide(num_rows, part, at_most=count)
    return out
