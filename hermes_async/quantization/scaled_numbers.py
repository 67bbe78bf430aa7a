"""Numbers of one byte each, int8 or FP8, that are multiplied with a scale of their tensor, row, group or block.

Source: `int-quantized`, `float-quantized` and `naive-quantized` in compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from hermes_async.quantization.block_scales import (
    EXPONENT_DTYPES,
    BlockEncoding,
    BlockSize,
    ScaledBytes,
    can_compile,
    prepare_bytes,
    scale_values,
)
from hermes_async.quantization.encoding import CompiledRows, IntegerGroups, IntegerRows, Parts
from hermes_async.quantization.fp8 import BFLOAT16_FOLD, folded, has_nan
from hermes_async.quantization.packed_integers import scratch_bytes, write_scaled
from hermes_async.quantization.pieces import INT8_ELEMENTS, pieces

_LARGE_SCALE = 2.0**7
"""Of numbers in FP8, smaller scales can be multiplied with `BFLOAT16_FOLD`."""


@dataclass(frozen=True)
class ScaledEncoding(BlockEncoding):
    """Parts: "weight" [rows, columns] and "scale" [blocks of rows, blocks of columns]; "zero_point" as "scale".

    Attributes:
        kind: Of the numbers: "int8" or "fp8" (e4m3).
        block: Rows and columns of a block.
        zero_point: Whether there are zero points. A weight is then (number - zero) * scale.
        in_scale_dtype: Products are rounded to the dtype of the scales, and then to that of the weight.
    """

    kind: str
    block: BlockSize
    zero_point: bool = False
    in_scale_dtype: bool = True

    @property
    def name(self) -> str:
        return self.kind

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        grid = self.block.grid(rows, columns)
        shapes = {"weight": (rows, columns), "scale": grid}
        return shapes | {"zero_point": grid} if self.zero_point else shapes

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        scaled = self._scaled_bytes(parts, slice(start, stop), out.shape[1], out.dtype)
        if scaled is not None:
            scaled.dequantize(start - self.block.first_row(start), out)
            return
        rows, columns = out.shape
        numbers, stored = parts["weight"][start:stop], _scale_values(parts["scale"])
        scale = self._of_rows(stored, start, stop)
        even = columns % scale.shape[1] == 0 and columns // scale.shape[1] == (self.block.columns or columns)
        scale = self._of_columns(scale, columns, even=even)
        zero = None
        if self.zero_point:
            zero = self._of_columns(self._of_rows(parts["zero_point"], start, stop), columns, even=even)
        fold = self.kind == "fp8" and not has_nan(numbers) and float(scale.abs().amax()) < _LARGE_SCALE
        if fold:
            scale = (scale.float() if scale.dtype == torch.float16 else scale) * BFLOAT16_FOLD
        rounded_to = stored.dtype if self.in_scale_dtype else None
        for begin, end in pieces(rows, columns, INT8_ELEMENTS // 2):
            piece = numbers[begin:end]
            if self.kind == "fp8":
                piece = folded(piece) if fold else piece.to(torch.bfloat16)
            own = slice(None) if self.block.rows is None else slice(begin, end)
            blocks = piece.view(end - begin, scale.shape[1], -1)
            own_zero = 0 if zero is None else zero[own]
            write_scaled(blocks, own_zero, scale[own], out[begin:end], rounded_to=rounded_to)

    def compiled_rows(self, parts: Parts, columns: int, dtype: torch.dtype) -> CompiledRows | None:
        scaled = self._scaled_bytes(parts, slice(0, len(parts["weight"])), columns, dtype)
        return None if scaled is None else scaled.compiled_rows(columns)

    def _scaled_bytes(self, parts: Parts, rows: slice, columns: int, dtype: torch.dtype) -> ScaledBytes | None:
        """Some rows for compiled functions, from the first one of a block on, if they handle them."""
        blocks = self.block.grid_rows(rows.start, rows.stop)
        stored = _scale_values(parts["scale"][blocks])
        dtypes = [stored.dtype, dtype] if self.in_scale_dtype else [dtype]
        if not can_compile(columns, self.block, *dtypes):
            return None
        numbers = parts["weight"][self.block.first_row(rows.start) : rows.stop]
        zeros = parts["zero_point"][blocks].float() if self.zero_point else None
        rounds = torch.bfloat16 in dtypes
        return ScaledBytes(self.kind, numbers, stored.float(), self.block, rounds=rounds, zeros=zeros)

    @property
    def compiles(self) -> bool:
        return True

    def prepare(self, dtype: torch.dtype) -> None:
        dtypes = [torch.bfloat16, dtype] if self.in_scale_dtype else [dtype]
        prepare_bytes(self.kind, *dtypes, has_zeros=self.zero_point)

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        if self.kind != "int8" or self.zero_point or (self.block.columns or columns) < columns:
            return None
        return IntegerGroups(8, columns, "weight", symmetric=True)

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        scale = self._of_rows(_scale_values(parts["scale"]), start, stop)
        return IntegerRows(parts["weight"][start:stop], scale.expand(stop - start, 1), None)

    def _of_rows(self, grid: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What belongs to these rows: [rows, blocks], or [1, blocks] if all rows are in one block."""
        if self.block.rows is None:
            return grid
        if self.block.rows == 1:
            return grid[start:stop]
        return grid[self.block.grid_rows(start, stop)].repeat_interleave(self.block.rows, 0)[: stop - start]

    def _of_columns(self, grid: torch.Tensor, columns: int, *, even: bool) -> torch.Tensor:
        if not even and self.block.columns is not None:
            grid = grid.repeat_interleave(self.block.columns, 1)[:, :columns]
        return grid.unsqueeze(-1)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        even = not (self.block.columns and columns % self.block.columns)
        of_rows = scratch_bytes(rows, columns, self.block.columns if even else 1)
        return of_rows + 8 * prod(self.block.grid(rows, columns))


def _scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales as floating-point numbers. Powers of two are in bfloat16."""
    return scale_values(scale).to(torch.bfloat16) if scale.dtype in EXPONENT_DTYPES else scale
