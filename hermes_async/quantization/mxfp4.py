"""FP4 (e2m1) weights, two numbers in a byte, with a scale for each block: MXFP4, as gpt-oss has it.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 5.4; transformers'
`convert_moe_packed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.block_scales import (
    E8M0_BIAS,
    EXPONENT_DTYPES,
    SCRATCH_BYTES,
    BlockEncoding,
    BlockSize,
    multiply_blocks,
    scale_values,
)
from hermes_async.quantization.encoding import Parts, StoredMatrix
from hermes_async.storage.tensor_spec import TensorSpec

_GROUP = 32  # numbers that share a scale
_BLOCK = BlockSize(1, _GROUP)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class _Layout:
    """A float of 16 bits: how far the exponents of e2m1's numbers, -1 to 2, can be lowered and raised in it."""

    mantissa_bits: int
    lowering: int
    raising: int


_LAYOUTS = {torch.bfloat16: _Layout(7, 125, 125), torch.float16: _Layout(10, 13, 13)}


@dataclass(frozen=True)
class Mxfp4Encoding(BlockEncoding):
    """Numbers in e2m1, the part "weight" [rows, columns / 2], times the numbers of their blocks, the part "scale".

    The first of two numbers is in the lower half of its byte.

    Attributes:
        block: Rows and columns of a block.
    """

    block: BlockSize = _BLOCK

    @property
    def name(self) -> str:
        return "mxfp4"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if columns % 4:
            raise ValueError(f"rows of {columns} numbers do not end with a pair of bytes")
        return {"weight": (rows, columns // 2), "scale": self.block.grid(rows, columns)}

    @property
    def elements_per_second(self) -> float:
        return 1.5e9

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        packed, scale = parts["weight"][start:stop], parts["scale"][self.block.grid_rows(start, stop)]
        if self.block != _BLOCK or not _raise_exponents(packed, scale, out):
            unpack_e2m1(packed, out)
            multiply_blocks(out, scale_values(scale), self.block)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        unpacked = 2 * rows * columns if itemsize == 4 else 0  # in bfloat16 first
        return unpacked + SCRATCH_BYTES + 16 * prod(self.block.grid(rows, columns))


@cache
def _quadruples(dtype: torch.dtype) -> torch.Tensor:
    """For each pair of bytes, its four numbers in a dtype of 16 bits, as one integer [65536].

    The last bit of each number that is not zero is set: it would be 0. So an exponent can be added to just these.
    """
    numbers = torch.tensor([sign * magnitude for sign in (1, -1) for magnitude in _MAGNITUDES], dtype=dtype)
    bits = numbers.view(torch.int16) | (numbers != 0).to(torch.int16)
    pair = torch.arange(1 << 16)
    halves = torch.stack([bits[pair >> shift & 0xF] for shift in (0, 4, 8, 12)], dim=1)
    return halves.contiguous().view(torch.int64).view(-1)


def _unpack_marked(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes numbers whose last bit is set where they are not zero. Returns `out` as integers."""
    table, pairs = _quadruples(out.dtype), packed.view(torch.uint16).view(-1)
    quadruples = out.view(torch.int64).view(-1)
    indices = torch.empty(min(len(pairs), SCRATCH_BYTES // 4), dtype=torch.int32)
    step = len(indices) or 1
    for some, those in zip(torch.split(pairs, step), torch.split(quadruples, step), strict=True):
        torch.index_select(table, 0, indices[: len(some)].copy_(some), out=those)
    return out.view(torch.int16)


def _raise_exponents(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> bool:
    """Writes numbers times the powers of two that are the scales of each 32, without a multiplication of floats.

    Returns:
        False if it wrote nothing: a scale is no power of two, or a number would leave the exponents of `out`'s dtype.
    """
    layout = _LAYOUTS.get(out.dtype)
    if layout is None or scale.dtype not in EXPONENT_DTYPES:
        return False
    exponents = scale.view(torch.uint8).to(torch.int16).sub_(E8M0_BIAS)
    lowest, highest = torch.aminmax(exponents)
    if int(lowest) < -layout.lowering or int(highest) > layout.raising:
        return False
    groups = _unpack_marked(packed, out).view(-1, _GROUP)
    exponents.bitwise_left_shift_(layout.mantissa_bits).sub_(1)  # takes the mark away again
    marks = torch.empty(min(len(groups), SCRATCH_BYTES // (2 * _GROUP)), _GROUP, dtype=torch.int16)
    step = len(marks) or 1
    each = torch.split(exponents.view(-1, 1), step)
    for some, added in zip(torch.split(groups, step), each, strict=True):
        some.addcmul_(torch.bitwise_and(some, 1, out=marks[: len(some)]), added)
    return True


def unpack_e2m1(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the numbers [rows, columns] that bytes [rows, columns / 2] hold, the lower half of each byte first.

    Args:
        packed: Contiguous, of any dtype of one byte; `columns` is a multiple of 4.
        out: Contiguous.
    """
    if out.dtype is torch.float32:
        numbers = torch.empty(out.shape, dtype=torch.bfloat16)
        unpack_e2m1(packed, numbers)
        out.copy_(numbers)
    else:
        _unpack_marked(packed, out).bitwise_and_(~1)


def mxfp4_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The experts of gpt-oss, by the names of the parameters that they are.

    Raises:
        CorruptShardError: A tensor of blocks or of scales has no other, or has another shape or dtype.
    """
    found: dict[str, StoredMatrix] = {}
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        weight = name.removesuffix(_BLOCKS)
        scales = tensors.get(weight + _SCALES)
        if scales is None:
            raise CorruptShardError(
                f"{blocks.file}: tensor {name!r} is in MXFP4, and its scales ({weight + _SCALES!r}) are missing",
                path=blocks.file,
            )
        found[weight] = _experts(blocks, scales)
    return found


def _experts(blocks: TensorSpec, scales: TensorSpec) -> StoredMatrix:
    for spec in (blocks, scales):
        if spec.dtype != torch.uint8 or spec.packed:
            raise CorruptShardError(
                f"{spec.file}: tensor {spec.name!r} is in {spec.dtype_name}; MXFP4 is stored as uint8", path=spec.file
            )
    match blocks.shape:
        case (int(num_experts), int(rows), int(num_groups), num_bytes) if num_bytes == _GROUP // 2:
            packed = replace(blocks, shape=(num_experts, rows, num_groups * num_bytes))
            shape = (num_experts, rows, num_groups * _GROUP)
            return StoredMatrix(Mxfp4Encoding(), shape, {"weight": packed, "scale": scales}, transposed=True)
    raise CorruptShardError(
        f"{blocks.file}: tensor {blocks.name!r} has shape {list(blocks.shape)}; blocks of MXFP4 have the shape "
        f"[experts, rows, groups, {_GROUP // 2}]",
        path=blocks.file,
    )
