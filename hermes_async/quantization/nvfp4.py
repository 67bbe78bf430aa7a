"""NVFP4 weights: e2m1 numbers, a scale in e4m3 for each 16 of a row, and one scale in float32 for the matrix.

Source: the files that NVIDIA's ModelOpt and compressed-tensors (`nvfp4-pack-quantized`) write, and their own
dequantization: `weight.float() * (scale.float() * global_scale)`, rounded once. compressed-tensors divides by its
global scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.block_scales import SCRATCH_BYTES, BlockSize, multiply_blocks
from hermes_async.quantization.encoding import Encoding, Parts, StoredMatrix
from hermes_async.quantization.fp8 import e4m3_values, fp8_matrices
from hermes_async.quantization.mxfp4 import unpack_e2m1
from hermes_async.storage.tensor_spec import TensorSpec

_GROUP = 16  # numbers that share a scale
_BLOCK = BlockSize(1, _GROUP)
_CHANGES_INPUTS = (".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b")


@dataclass(frozen=True)
class Nvfp4Encoding(Encoding):
    """Numbers in e2m1 times a scale for each 16 of a row, times a scale for all.

    The parts are "weight" [rows, columns / 2], whose bytes have the first of two numbers in their lower half, "scale"
    [rows, columns / 16] in e4m3, and "global_scale" [1] in float32.

    Attributes:
        divides: Whether scales are divided by the global one, as compressed-tensors has it, instead of multiplied.
    """

    divides: bool

    @property
    def name(self) -> str:
        return "nvfp4"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if columns % _GROUP:
            raise ValueError(f"groups of {_GROUP} numbers do not divide rows of {columns}")
        return {"weight": (rows, columns // 2), "scale": (rows, columns // _GROUP), "global_scale": (1,)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        scale, of_all = e4m3_values(parts["scale"][start:stop]), parts["global_scale"]
        scale = scale.div_(of_all) if self.divides else scale.mul_(of_all)
        unpack_e2m1(parts["weight"][start:stop], out)
        multiply_blocks(out, scale, _BLOCK)

    def part_rows(self, part: str, rows: int) -> int | None:
        return None if part == "global_scale" else rows

    @property
    def divisible(self) -> bool:
        return True

    def may_be_zero(self, part: str) -> bool:
        return part == "scale"  # in FP8, that of a block of very small numbers is zero

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        unpacked = 2 * rows * columns if itemsize == 4 else 0  # in bfloat16 first
        return unpacked + SCRATCH_BYTES + 16 * rows * columns // _GROUP


def modelopt_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The matrices that ModelOpt has quantized, to NVFP4 or FP8, by the names that their weights have unquantized.

    Raises:
        CorruptShardError: A matrix lacks a scale, or has one of another shape or dtype.
        UnsupportedModelError: A matrix is quantized in another way.
    """
    found: dict[str, StoredMatrix] = {}
    for name, spec in tensors.items():
        if name.endswith(_CHANGES_INPUTS):
            raise UnsupportedModelError(
                f"{spec.file}: tensor {name!r} changes what a layer multiplies with (ModelOpt's AWQ or SVDQuant), "
                "which hermes_async does not do. Use the model that this one was made from, or its NVFP4 or FP8 files",
                path=spec.file,
            )
        if spec.dtype == torch.uint8 and len(spec.shape) > 1 and not name.endswith("_scale"):
            scale = tensors.get(f"{name}_scale")
            if scale is None or scale.dtype != torch.uint8:  # exponents alone are MXFP4's
                found[name] = _matrix(spec, scale, tensors.get(f"{name}_scale_2"))
    taken = {spec.name for matrix in found.values() for spec in matrix.parts.values()}
    return found | fp8_matrices(settings, {name: spec for name, spec in tensors.items() if name not in taken})


def _matrix(spec: TensorSpec, scale: TensorSpec | None, of_all: TensorSpec | None) -> StoredMatrix:
    name = spec.name
    if scale is None:
        raise CorruptShardError(
            f"{spec.file}: tensor {name!r} is packed, and its scale ({name + '_scale'!r}) is missing", path=spec.file
        )
    if scale.dtype != torch.float8_e4m3fn:
        raise UnsupportedModelError(
            f"{spec.file}: tensor {name!r} is packed, and its scales are in {scale.dtype_name}; of ModelOpt's "
            "formats, hermes_async reads NVFP4, whose scales are in float8_e4m3fn, MXFP4, and FP8. Use the model that "
            "this one was made from",
            path=spec.file,
        )
    if of_all is None:
        raise CorruptShardError(
            f"{spec.file}: tensor {name!r} is in NVFP4, and its second scale ({name + '_scale_2'!r}) is missing",
            path=spec.file,
        )
    return nvfp4_matrix(spec, scale, of_all, divides=False)


def nvfp4_matrix(packed: TensorSpec, scale: TensorSpec, of_all: TensorSpec, *, divides: bool) -> StoredMatrix:
    """The matrix, or the stack of them, that these three tensors store.

    Args:
        of_all: One number for each matrix.
        divides: See `Nvfp4Encoding`.

    Raises:
        CorruptShardError: One of them is not in the format's dtype, or has too few dimensions.
    """
    expected = ((packed, torch.uint8), (scale, torch.float8_e4m3fn), (of_all, torch.float32))
    for spec, dtype in expected:
        if spec.dtype != dtype or spec.packed:
            should_be = str(dtype).removeprefix("torch.")
            raise CorruptShardError(
                f"{spec.file}: tensor {spec.name!r} is in {spec.dtype_name}; NVFP4 has it in {should_be}",
                path=spec.file,
            )
    if len(packed.shape) not in (2, 3):
        raise CorruptShardError(
            f"{packed.file}: tensor {packed.name!r} has shape {list(packed.shape)}, which is no matrix of NVFP4",
            path=packed.file,
        )
    *stacked, rows, num_bytes = packed.shape
    one_each = (*stacked, 1)
    parts = {
        "weight": packed,
        "scale": scale,
        "global_scale": replace(of_all, shape=one_each) if of_all.shape in ((), tuple(stacked)) else of_all,
    }
    return StoredMatrix(Nvfp4Encoding(divides), (*stacked, rows, 2 * num_bytes), parts)
