"""Weights of whole numbers in the layouts of torch's own kernels, which multiply without dequantizing them first.

These kernels compute weights and sums in float32, and round each result once. A dequantized weight is rounded to the
model's dtype first. So their results differ in rounding.

Every use of torch's functions for such weights is here. They are private, or may be missing: `int4_block` and
`has_int8_kernel` say what this torch and this processor have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hermes_async.quantization.encoding import Encoding, Parts
from hermes_async.quantization.packed_integers import scale_whole, whole_numbers_for

INT4_GROUPS = (256, 128, 64, 32)
"""The groups of columns that the kernel for 4 bits takes."""
INT4_BLOCKS: Mapping[int, str] = {64: "AVX-512", 32: "AVX2"}
"""The rows that its layout packs together, and the instructions of processors that do so."""
_INT4_INPUTS = 64  # of more, blocks are dequantized: their products use the matrix instructions of the processor
_INT8_INPUTS = 24
INT8_STEP = 16
"""Bytes: rows begin at multiples of it in memory. At other addresses, torch's kernel for 8 bits ends the process."""
_MIDDLE = 8

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Int4Layout(Encoding):
    """Numbers from 0 to 15 as torch's kernel for them takes them. A weight is `(number - 8) * scale + zero`.

    The parts are "numbers", uint8 [rows, columns / 2], and "scales" [rows / chunk, groups, chunk, 2], in the dtype that
    the model computes with: the scale and the zero of each row and group. Each chunk of rows is multiplied by a call.

    Attributes:
        group: Columns that share a scale and a zero.
        symmetric: All zeros are 0.
        block: Rows that are packed together: for each column one byte for each two rows, of which the first is in the
            first half of the block.
        chunk: A multiple of the block that divides the rows.
    """

    group: int
    symmetric: bool
    block: int
    chunk: int

    @property
    def name(self) -> str:
        return "int4 in the kernel's layout"

    def detail(self, rows: int, columns: int) -> str:
        return f"groups of {self.group}"

    @property
    def elements_per_second(self) -> float:
        return 5e9

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if columns % self.group or rows % self.chunk:
            raise ValueError(
                f"it is no whole number of groups of {self.group} columns and of chunks of {self.chunk} rows"
            )
        return {"numbers": (rows, columns // 2), "scales": (rows // self.chunk, columns // self.group, self.chunk, 2)}

    def product(self, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        numbers, scales = parts["numbers"], parts["scales"]
        if len(inputs) > _INT4_INPUTS or inputs.dtype != scales.dtype:
            return None
        if len(scales) == 1:
            return self._product(inputs, numbers, scales[0])
        out = torch.empty((len(inputs), len(numbers)), dtype=inputs.dtype)
        chunks = zip(torch.split(numbers, self.chunk), scales, torch.split(out, self.chunk, dim=1), strict=True)
        for own_numbers, own_scales, own_out in chunks:
            own_out.copy_(self._product(inputs, own_numbers, own_scales))
        return out

    def _product(self, inputs: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _aten._weight_int4pack_mm_for_cpu(inputs, numbers, self.group, scales)
        return product

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        columns, half = out.shape[1], self.block // 2
        packed = parts["numbers"].view(-1, columns, half)[start // self.block : stop // self.block]
        chunks = parts["scales"][start // self.chunk : -(-stop // self.chunk)]
        both = chunks.transpose(1, 2).reshape(-1, chunks.shape[1], 2)[start % self.chunk :][: len(out)]
        scales, zeros = both[..., 0], both[..., 1]
        whole = whole_numbers_for(scales, out) if self.symmetric else None
        lanes = torch.empty(
            (half // 2, columns), dtype=torch.int16
        )  # each has the bytes of two rows next to each other
        own = torch.empty((self.block, columns), dtype=torch.int16) if whole is None else None
        for idx, of_block in enumerate(packed):
            lanes.copy_(of_block.view(torch.int16).t())  # of two dimensions and one dtype, which torch does fast
            rows = slice(idx * self.block, (idx + 1) * self.block)
            numbers = out[rows].view(torch.int16) if own is None else own
            by_lane = numbers.view(2, half // 2, 2, columns)
            for shift in (0, 4, 8, 12):
                torch.bitwise_and(lanes >> shift, 15, out=by_lane[shift // 4 % 2, :, shift // 8])
            if whole is not None:
                numbers |= whole.bits
                scale_whole(out[rows], whole, _MIDDLE, scales[rows])
            else:
                values = numbers.float().view(self.block, -1, self.group)
                values.sub_(_MIDDLE).mul_(scales[rows, :, None].float())
                if not self.symmetric:
                    values.add_(zeros[rows, :, None].float())
                out[rows] = values.view(self.block, columns)

    @property
    def row_step(self) -> int:
        return self.block

    @property
    def cut_step(self) -> int:
        return self.chunk

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows // self.chunk if part == "scales" else rows

    @property
    def divisible(self) -> bool:
        return True

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return self.block * columns * 10 + (rows + self.chunk) * (columns // self.group) * 16

    def may_be_zero(self, part: str) -> bool:
        return True  # the zeros beside the scales


@dataclass(frozen=True)
class Int8Layout(Encoding):
    """Numbers from -128 to 127, and a scale for each row."""

    @property
    def name(self) -> str:
        return "int8 in the kernel's layout"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        return {"numbers": (rows, columns), "scales": (rows,)}

    def product(self, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        if len(inputs) > _INT8_INPUTS or inputs.dtype != parts["scales"].dtype:
            return None
        product: torch.Tensor = torch._weight_int8pack_mm(inputs, parts["numbers"], parts["scales"])
        return product

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        values = parts["numbers"][start:stop].float()
        out.copy_(values.mul_(parts["scales"][start:stop, None].float()))

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns * 4


def packed_for_int4(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 15, int8 [rows, columns], as the part "numbers" of an `Int4Layout`.

    The layout depends on the processor. Each block of rows is packed by itself.
    """
    packed: torch.Tensor = _aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    return packed


@cache
def int4_block() -> int | None:
    """The rows that this processor's layout packs together; None if there is no kernel, or it has another layout."""
    columns = 2
    for block in INT4_BLOCKS:
        numbers = (torch.arange(2 * block * columns, dtype=torch.int32) * 7 % 16).view(2 * block, columns)
        layout = Int4Layout(columns, symmetric=True, block=block, chunk=2 * block)
        try:
            parts = {"numbers": packed_for_int4(numbers), "scales": torch.ones(1, 1, 2 * block, 2)}
        except (AttributeError, RuntimeError):
            return None
        values = torch.empty(2 * block, columns)
        layout.dequantize(parts, 0, 2 * block, values)
        if torch.equal(values, numbers - 8.0):
            return block
    return None


def has_int8_kernel() -> bool:
    """Whether this torch has the kernel for `Int8Layout`."""
    return hasattr(torch, "_weight_int8pack_mm")
