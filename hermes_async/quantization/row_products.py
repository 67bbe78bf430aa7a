"""Products with rows that compiled functions dequantize, on several threads.

Few lines of inputs: each thread dequantizes and multiplies one row after another. Dozens of lines: each thread
dequantizes some rows, and multiplies them with tiles of lines. More: the threads dequantize a block of rows together,
and `linear` multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hermes_async.quantization.encoding import CompiledRows
from hermes_async.quantization.row_threads import RowThreads
from hermes_async.quantization.tile_products import TiledInputs, can_tile
from hermes_async.storage.kernel_threads import end_kernel_threads

FEW_LINES = 12
"""So many are multiplied row by row, which is faster than in blocks."""


def product_of_rows(
    compiled: CompiledRows,
    num_rows: int,
    lines: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    block_rows: int,
    threads: RowThreads,
) -> torch.Tensor:
    """The product of `lines` [n, columns] with all rows of a matrix, plus `bias` [rows]: [n, rows].

    It is computed in float32, and rounded once to the dtype of `lines`.

    Args:
        block_rows: The most rows that are in memory at once where `linear` multiplies.
    """
    if len(lines) > FEW_LINES and can_tile(lines):
        return TiledInputs(lines, threads).multiply_compiled(compiled, bias, num_rows)
    out = _product(compiled, num_rows, block_rows, lines.float(), threads)
    return (out if bias is None else out.add_(bias)).to(lines.dtype)


def _product(
    compiled: CompiledRows, num_rows: int, block_rows: int, lines: torch.Tensor, threads: RowThreads
) -> torch.Tensor:
    num_lines = len(lines)
    if num_lines <= FEW_LINES:
        inputs = _padded(lines, compiled.inputs_at_once)
        out = torch.empty((len(inputs), num_rows))
        multiply = compiled.multiplier(inputs, out.numpy())
        end_kernel_threads()  # they spin after a kernel, and would take processors from the threads here
        threads.divide(num_rows, multiply)
        return out[:num_lines]
    out = torch.empty((num_lines, num_rows))
    block = torch.empty((min(num_rows, block_rows), lines.shape[1]))
    for start in range(0, num_rows, block_rows):
        rows = block[: num_rows - start]
        threads.divide(len(rows), _writing(compiled, start, rows.numpy()))
        out[:, start : start + len(rows)] = F.linear(lines, rows)
    return out


def _padded(lines: torch.Tensor, at_once: int) -> NDArray[np.float32]:
    """The lines, with lines of zeros behind them where there is more than one, but no multiple of `at_once`."""
    if len(lines) > 1:
        lines = F.pad(lines, (0, 0, 0, -len(lines) % at_once))
    padded: NDArray[np.float32] = lines.contiguous().numpy()
    return padded


def _writing(compiled: CompiledRows, start: int, rows: NDArray[np.float32]) -> Callable[[int, int], None]:
    return lambda first, last: compiled.write(start + first, start + last, rows[first:last])
