"""Layouts of whole numbers that torch's own kernels multiply with, without dequantizing them first.

A dequantized block of a weight is written, and read again by the product. A kernel that reads the numbers themselves
takes a fraction of that for few inputs. It needs them in a layout of its own. So weights that stay in memory are laid
out once, in place of their stored bytes.

These kernels compute weights and sums in float32, and round each result once. A dequantized weight is rounded to the
model's dtype first. So their results differ in rounding, and they are used only where `kernels="fastest"` asks for it.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import torch

from hermes_async.quantization.encoded_weight import SEPARATOR, EncodedParameter, PartOf
from hermes_async.quantization.encoding import IntegerRows, Parts, StoredMatrix
from hermes_async.quantization.kernel_layouts import (
    INT4_GROUPS,
    INT8_STEP,
    Int4Layout,
    Int8Layout,
    has_int8_kernel,
    int4_block,
    packed_for_int4,
)

_BLOCK_ELEMENTS = 1 << 18  # laid out at once


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
    if not _has_layout(encoded) or not _is_aligned(encoded, part_of):
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


def _is_aligned(encoded: EncodedParameter, part_of: PartOf) -> bool:
    """Whether kernels can read the numbers where they lie, which depends on where they are in the checkpoint's file."""
    for idx, matrix in enumerate(encoded.matrices):
        groups = matrix.encoding.integers(*matrix.shape)
        assert groups is not None
        place = part_of(f"{encoded.name}{SEPARATOR}{idx}{SEPARATOR}{groups.part}").data_ptr()
        if groups.bits == 8 and place % INT8_STEP:
            return False
    return True


def _layout_of(matrix: StoredMatrix) -> Int4Layout | Int8Layout | None:
    rows, columns = matrix.shape
    groups = matrix.encoding.integers(rows, columns)
    if groups is None:
        return None
    if groups.bits == 8:
        fits = groups.group == columns and groups.symmetric and columns % INT8_STEP == 0
        return Int8Layout() if fits and has_int8_kernel() else None
    block = int4_block()
    group = next((one for one in INT4_GROUPS if groups.group % one == 0), None)
    if groups.bits != 4 or block is None or group is None or rows % block:
        return None
    return Int4Layout(group, groups.symmetric, block, chunk=rows)


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
            numbers[start:stop] = packed_for_int4(block.numbers)
            scales[0, :, start:stop] = _scales_and_zeros(block, columns // layout.group)
        else:
            numbers[start:stop] = block.numbers
            scales[start:stop] = block.scales.view(-1)
    return numbers, scales


def _scales_and_zeros(block: IntegerRows, num_groups: int) -> torch.Tensor:
    """[groups, rows, 2]. Groups that are larger than the kernel's own count as several."""
    scales = block.scales.float()
    if block.minimums is not None:
        zeros = 8 * scales - block.minimums.float()
    else:
        zeros = torch.zeros_like(scales) if block.zeros is None else (8 - block.zeros.float()) * scales
    both = torch.stack([scales.t(), zeros.t()], dim=-1)
    return both.repeat_interleave(num_groups // len(both), dim=0)
