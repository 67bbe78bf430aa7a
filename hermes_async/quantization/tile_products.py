"""Products of dozens of lines of inputs with rows, by compiled functions, a tile of rows and lines at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hermes_async.quantization import tile_kernels
from hermes_async.quantization.encoding import CompiledRows, has_compiler
from hermes_async.quantization.kernel_sizes import LANES, MOST_TILE_LINES, ROWS_OF_SUMS
from hermes_async.quantization.row_threads import RowThreads
from hermes_async.storage.kernel_threads import end_kernel_threads

MOST_LINES = 256
"""More are multiplied as fast by `linear` in float32."""
_MOST_INPUTS = 1 << 21
"""Elements of inputs that are packed at once. Where there are more, `linear` multiplies."""
_BLOCK = 1 << 16
"""Elements that a thread dequantizes, and then multiplies. They stay in its second cache."""
TILED_DTYPES = {torch.float32: "float32", torch.bfloat16: "uint16"}
"""Of inputs, and what NumPy has in their place."""


def can_tile(lines: torch.Tensor) -> bool:
    """Whether `lines` [n, columns] may be `TiledInputs`."""
    in_bounds = 1 < len(lines) <= MOST_LINES and lines.numel() <= _MOST_INPUTS
    return in_bounds and lines.shape[1] % LANES == 0 and lines.dtype in TILED_DTYPES and has_compiler()


def tile_bytes(num_lines: int, columns: int) -> int:
    """The most memory that products of so many lines take, beside their results. It never shrinks with more lines."""
    elements = min((min(num_lines, MOST_LINES) + MOST_TILE_LINES) * columns, _MOST_INPUTS + MOST_TILE_LINES * columns)
    sums = torch.get_num_threads() * (MOST_LINES + MOST_TILE_LINES) * ROWS_OF_SUMS
    return (elements + sums) * torch.float32.itemsize


def prepare_tiles(of_rows: torch.dtype, of_inputs: torch.dtype) -> None:
    """Compiles the functions for rows and inputs of these dtypes, if they are new here. It may take seconds."""
    tile_kernels.prepare(TILED_DTYPES[of_rows], TILED_DTYPES[of_inputs])


class TiledInputs:
    """Inputs [n, columns], to be multiplied with rows by compiled functions. `can_tile` says which inputs may be.

    Products are computed in float32, and rounded once to the dtype of the inputs: float32 or bfloat16.

    Args:
        threads: Divide each product.
    """

    def __init__(self, lines: torch.Tensor, threads: RowThreads) -> None:
        self._num_lines, self._columns = lines.shape
        self._dtype, self._threads = lines.dtype, threads
        self._packed = np.empty(tile_kernels.packed_size(*lines.shape), np.float32)
        tile_kernels.pack(_array(lines.contiguous()), self._packed)

    def multiply(
        self, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, first_column: int = 0
    ) -> None:
        """Writes the inputs times `weight` [rows, columns], plus `bias`, into `out`, from a column on.

        Args:
            weight: In float32 or bfloat16, and contiguous.
            bias: A number for each column of `out`.
            out: [n, at least as many columns as there are rows], contiguous, in the dtype of the inputs.
        """
        rows, columns = _array(weight).reshape(-1), self._columns
        multiply = tile_kernels.multiplier(self._packed, _bias_array(bias), _array(out), rows.dtype.name)

        def part(first: int, last: int) -> None:
            multiply(rows, (columns, first, last, first_column))

        end_kernel_threads()  # they spin after a kernel, and would take processors from the threads here
        self._threads.divide(len(weight), part)

    def multiply_compiled(self, compiled: CompiledRows, bias: torch.Tensor | None, num_rows: int) -> torch.Tensor:
        """The inputs times all rows of a matrix, plus `bias` [rows]: [n, rows].

        Each thread dequantizes its own rows.
        """
        out = torch.empty((self._num_lines, num_rows), dtype=self._dtype)
        columns, at_once = self._columns, max(1, _BLOCK // self._columns)
        multiply = tile_kernels.multiplier(self._packed, _bias_array(bias), _array(out), "float32")

        def part(first: int, last: int) -> None:
            block = np.empty((min(at_once, last - first), columns), np.float32)
            for start in range(first, last, at_once):
                stop = min(last, start + at_once)
                rows = block[: stop - start]
                compiled.write(start, stop, rows)
                multiply(rows.reshape(-1), (columns, 0, stop - start, start))

        end_kernel_threads()
        self._threads.divide(num_rows, part)
        return out


def _bias_array(bias: torch.Tensor | None) -> NDArray[np.float32]:
    return np.empty(0, np.float32) if bias is None else _array(bias.float().contiguous())


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The numbers of a tensor, those of bfloat16 as bits."""
    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
