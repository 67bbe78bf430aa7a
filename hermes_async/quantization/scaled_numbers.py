"""Numbers of one byte each, int8 or FP8, that are multiplied with a scale of their tensor, row, group or block.

Source: `int-quantized`, `float-quantized` and `naive-quantized` in compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hermes_async.quantization.encoding import Encoding, IntegerGroups, IntegerRows, Parts
from hermes_async.quantization.packed_integers import INT8_ELEMENTS, pieces, scratch_bytes, write_scaled

_FP8_SIGN_AND_NUMBER = 0x87F0 - (1 << 16)
"""Where an e4m3 number lies in the bits of bfloat16: there it is 2**-120 times itself."""
_FP8_FOLD = 2.0**120
_LARGE_SCALE = 2.0**7
_NAN, _NEGATIVE_NAN = 0x7F, 0xFF
_E8M0_BIAS = 127


@dataclass(frozen=True)
class ScaledEncoding(Encoding):
    """Parts: "weight" [rows, columns] and "scale" [blocks of rows, blocks of columns]; "zero_point" as "scale".

    Attributes:
        kind: Of the numbers: "int8" or "fp8" (e4m3).
        block_rows, block_columns: Of a block. The last ones may be smaller. None if all rows, or columns, are in one.
        zero_point: Whether there are zero points. A weight is then (number - zero) * scale.
        in_scale_dtype: Products are rounded to the dtype of the scales, and then to that of the weight.
    """

    kind: str
    block_rows: int | None
    block_columns: int | None
    zero_point: bool = False
    in_scale_dtype: bool = True

    @property
    def name(self) -> str:
        return self.kind

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        grid = (_num_blocks(rows, self.block_rows), _num_blocks(columns, self.block_columns))
        shapes = {"weight": (rows, columns), "scale": grid}
        return shapes | {"zero_point": grid} if self.zero_point else shapes

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        rows, columns = out.shape
        numbers, stored = parts["weight"][start:stop], _scale_values(parts["scale"])
        scale = self._of_rows(stored, start, stop)
        even = columns % scale.shape[1] == 0 and columns // scale.shape[1] == (self.block_columns or columns)
        scale = self._of_columns(scale, columns, even=even)
        zero = None
        if self.zero_point:
            zero = self._of_columns(self._of_rows(parts["zero_point"], start, stop), columns, even=even)
        fold = self.kind == "fp8" and _can_be_folded(numbers, scale)
        if fold:
            scale = (scale.float() if scale.dtype == torch.float16 else scale) * _FP8_FOLD
        rounded_to = stored.dtype if self.in_scale_dtype else None
        for begin, end in pieces(rows, columns, INT8_ELEMENTS // 2):
            piece = numbers[begin:end]
            if self.kind == "fp8":
                piece = _folded(piece) if fold else piece.to(torch.bfloat16)
            own = slice(None) if self.block_rows is None else slice(begin, end)
            blocks = piece.view(end - begin, scale.shape[1], -1)
            own_zero = 0 if zero is None else zero[own]
            write_scaled(blocks, own_zero, scale[own], out[begin:end], rounded_to=rounded_to)

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        if self.kind != "int8" or self.zero_point or (self.block_columns or columns) < columns:
            return None
        return IntegerGroups(8, columns, "weight", symmetric=True)

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        scale = self._of_rows(_scale_values(parts["scale"]), start, stop)
        return IntegerRows(parts["weight"][start:stop], scale.expand(stop - start, 1), None)

    def _of_rows(self, grid: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What belongs to these rows: [rows, blocks], or [1, blocks] if all rows are in one block."""
        if self.block_rows is None:
            return grid
        if self.block_rows == 1:
            return grid[start:stop]
        first, last = start // self.block_rows, -(-stop // self.block_rows)
        return grid[first:last].repeat_interleave(self.block_rows, 0)[: stop - start]

    def _of_columns(self, grid: torch.Tensor, columns: int, *, even: bool) -> torch.Tensor:
        if not even and self.block_columns is not None:
            grid = grid.repeat_interleave(self.block_columns, 1)[:, :columns]
        return grid.unsqueeze(-1)

    @property
    def row_step(self) -> int:
        return self.block_rows or 1

    def part_rows(self, part: str, rows: int) -> int | None:
        if part == "weight":
            return rows
        return None if self.block_rows is None else _num_blocks(rows, self.block_rows)

    @property
    def divisible(self) -> bool:
        return True

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        even = not (self.block_columns and columns % self.block_columns)
        of_rows = scratch_bytes(rows, columns, self.block_columns if even else 1)
        return of_rows + 8 * _num_blocks(rows, self.block_rows) * _num_blocks(columns, self.block_columns)


def _num_blocks(size: int, block: int | None) -> int:
    return 1 if block is None else -(-size // block)


def _can_be_folded(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether all e4m3 numbers are numbers, and scales are small enough for a factor of `_FP8_FOLD`."""
    has_nan = int(weight.view(torch.int8).amax()) == _NAN or int(weight.view(torch.uint8).amax()) == _NEGATIVE_NAN
    return not has_nan and float(scale.abs().amax()) < _LARGE_SCALE


def _folded(weight: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers in bfloat16, divided by `_FP8_FOLD`."""
    bits = weight.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(_FP8_SIGN_AND_NUMBER)
    return bits.view(torch.bfloat16)


def _scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales as floating-point numbers. Bytes are exponents of two (E8M0)."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.exp2(scale.view(torch.uint8).float() - _E8M0_BIAS).to(torch.bfloat16)
    return scale
