"""Layouts of whole numbers that torch's own kernels multiply with, without dequantizing them first.

A dequantized block of a weight is written, and read again by the product. A kernel that reads the numbers themselves
takes a fraction of that for few inputs. It needs them in a layout of its own. So weights that stay in memory are laid
out once, in place of their stored bytes.

These kernels compute weights and sums in float32, and round each result once. A dequantized weight is rounded to the
model's dtype first. So their results differ in rounding, and they are used only where `kernels="fastest"` asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import lcm

import torch

from hermes_async.modeling.transformers_api import int4_product, int8_product, packed_for_int4
from hermes_async.quantization.encoded_weight import SEPARATOR, EncodedParameter, PartOf
from hermes_async.quantization.encoding import Encoding, IntegerRows, Parts, StoredMatrix

_INT4_GROUPS = (256, 128, 64, 32)  # that the kernel takes
_INT4_BLOCKS = (64, 32)  # rows that are packed together, on processors with AVX-512 and with AVX2
_INT4_INPUTS = 64  # of more, blocks are dequantized: their products use the matrix instructions of the processor
_INT8_INPUTS = 24
_BLOCK_ELEMENTS = 1 << 18  # laid out at once


@dataclass(frozen=True)
class Int4Layout(Encoding):
    """Numbers from 0 to 15 as torch's kernel for them takes them. A weight is `(number - 8) * scale + zero`.

    Attributes:
        group: Columns that share a scale and a zero.
        symmetric: All zeros are 0.
        block: Rows that are packed together: for each column one byte for each two rows, of which the first is in the
            first half of the block.
    """

    group: int
    symmetric: bool
    block: int

    @property
    def name(self) -> str:
        return "int4 in the kernel's layout"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        return {"numbers": (rows, columns // 2), "scales": (columns // self.group, rows, 2)}

    def product(self, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        if len(inputs) > _INT4_INPUTS or inputs.dtype != parts["scales"].dtype:
            return None
        return int4_product(inputs, parts["numbers"], self.group, parts["scales"])

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        columns, half = out.shape[1], self.block // 2
        packed = parts["numbers"].view(-1, columns, half)[start // self.block : stop // self.block]
        octets = torch.empty((len(packed), half, columns), dtype=torch.uint8)
        for of_block, own in zip(packed, octets, strict=True):
            own.copy_(of_block.t())  # of two dimensions and one dtype, which torch does fast
        values = torch.empty(out.shape, dtype=torch.float32)
        blocks = values.view(-1, 2, half, columns)
        blocks[:, 0] = octets & 15
        blocks[:, 1] = octets >> 4
        scales, zeros = parts["scales"][:, start:stop].float().permute(2, 1, 0).unsqueeze(-1)
        groups = values.view(len(out), -1, self.group)
        groups.sub_(8).mul_(scales)
        if not self.symmetric:
            groups.add_(zeros)
        out.copy_(values)

    @property
    def row_step(self) -> int:
        return self.block

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns * 5 + rows * columns // self.group * 8


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
        return int8_product(inputs, parts["numbers"], parts["scales"])

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        values = parts["numbers"][start:stop].float()
        out.copy_(values.mul_(parts["scales"][start:stop, None].float()))

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns * 4


def layout_bytes(encoded: EncodedParameter) -> int:
    """The bytes that the layout of a parameter takes in addition to its stored tensors; 0 if it has none."""
    return sum(_added_bytes(matrix, encoded.dtype) for matrix in encoded.matrices) if _has_layout(encoded) else 0


def laying_out_bytes(encoded: EncodedParameter) -> int:
    """The bytes that laying out a parameter takes meanwhile."""
    if not _has_layout(encoded):
        return 0
    matrices = [rows * columns for rows, columns in (matrix.shape for matrix in encoded.matrices)]
    return max(matrices) + 16 * _BLOCK_ELEMENTS


def lay_out(encoded: EncodedParameter, part_of: PartOf) -> tuple[EncodedParameter, dict[str, torch.Tensor]] | None:
    """Writes the matrices of a parameter in a kernel's layout, over its stored numbers.

    Returns:
        The parameter as it is stored now, and its tensors; None, and nothing is changed, if no kernel takes it.
    """
    if not _has_layout(encoded):
        return None
    matrices: list[StoredMatrix] = []
    tensors: dict[str, torch.Tensor] = {}
    for idx, matrix in enumerate(encoded.matrices):
        prefix = f"{encoded.name}{SEPARATOR}{idx}{SEPARATOR}"
        layout = _layout_of(matrix)
        groups = matrix.encoding.integers(*matrix.shape)
        assert layout is not None and groups is not None
        parts = {part: part_of(prefix + part) for part in matrix.parts}
        numbers, scales = _laid_out(layout, matrix, parts, encoded.dtype)
        # In memory they lie where the stored numbers lay, which nothing reads from here on.
        place = parts[groups.part].view(-1).view(numbers.dtype)[: numbers.numel()].view(numbers.shape)
        place.copy_(numbers)
        tensors |= {f"{prefix}numbers": place, f"{prefix}scales": scales}
        spec = matrix.parts[groups.part]
        matrices.append(replace(matrix, encoding=layout, parts={"numbers": spec, "scales": spec}))
    return replace(encoded, matrices=tuple(matrices)), tensors


def _has_layout(encoded: EncodedParameter) -> bool:
    if encoded.dtype != torch.bfloat16 or encoded.whole:  # of other dtypes, dequantized weights are faster
        return False
    return all(_layout_of(matrix) is not None for matrix in encoded.matrices)


def _layout_of(matrix: StoredMatrix) -> Int4Layout | Int8Layout | None:
    rows, columns = matrix.shape
    groups = matrix.encoding.integers(rows, columns)
    if groups is None:
        return None
    if groups.bits == 8:
        return Int8Layout() if groups.group == columns and groups.symmetric else None
    block = _int4_block()
    group = next((one for one in _INT4_GROUPS if groups.group % one == 0), None)
    if groups.bits != 4 or block is None or group is None or rows % block:
        return None
    return Int4Layout(group, groups.symmetric, block)


@cache
def _int4_block() -> int | None:
    """The rows that this processor's layout packs together; None if the layout is not one that is known."""
    columns = 2
    for block in _INT4_BLOCKS:
        numbers = (torch.arange(2 * block * columns, dtype=torch.int32) * 7 % 16).view(2 * block, columns)
        layout = Int4Layout(columns, symmetric=True, block=block)
        parts = {"numbers": packed_for_int4(numbers), "scales": torch.ones(1, 2 * block, 2)}
        values = torch.empty(2 * block, columns)
        layout.dequantize(parts, 0, 2 * block, values)
        if torch.equal(values, numbers - 8.0):
            return block
    return None


def _added_bytes(matrix: StoredMatrix, dtype: torch.dtype) -> int:
    rows, columns = matrix.shape
    layout = _layout_of(matrix)
    return 0 if layout is None else torch.Size(layout.shapes(rows, columns)["scales"]).numel() * dtype.itemsize


def _laid_out(
    layout: Int4Layout | Int8Layout, matrix: StoredMatrix, parts: Parts, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers and the scales of a matrix in the layout."""
    rows, columns = matrix.shape
    shapes = layout.shapes(rows, columns)
    numbers = torch.empty(shapes["numbers"], dtype=torch.uint8 if isinstance(layout, Int4Layout) else torch.int8)
    scales = torch.empty(shapes["scales"], dtype=dtype)
    step = lcm(matrix.encoding.row_step, layout.row_step)
    block_rows = max(step, _BLOCK_ELEMENTS // columns // step * step)
    for start in range(0, rows, block_rows):
        stop = min(rows, start + block_rows)
        block = matrix.encoding.integer_rows(parts, start, stop)
        if isinstance(layout, Int4Layout):
            numbers[start:stop] = packed_for_int4(block.numbers.int())
            scales[:, start:stop] = _scales_and_zeros(block, columns // layout.group)
        else:
            numbers[start:stop] = block.numbers
            scales[start:stop] = block.scales.view(-1)
    return numbers, scales


def _scales_and_zeros(block: IntegerRows, num_groups: int) -> torch.Tensor:
    """[groups, rows, 2]. Groups that are larger than the kernel's own count as several."""
    scales = block.scales.float()
    zeros = torch.zeros_like(scales) if block.zeros is None else (8 - block.zeros.float()) * scales
    both = torch.stack([scales.t(), zeros.t()], dim=-1)
    return both.repeat_interleave(num_groups // len(both), dim=0)
