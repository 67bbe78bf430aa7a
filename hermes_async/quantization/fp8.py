"""FP8 (e4m3) weights with a scale for each block, each row, each column, or the whole matrix.

Experts of such checkpoints may be in FP4 instead, with a scale for each 32 numbers of a row.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3; transformers' `Fp8Dequantize`, which computes
`(weight.float() * scale.float()).to(dtype)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.block_scales import (
    BlockEncoding,
    BlockSize,
    ScaledBytes,
    bounds_of,
    can_compile,
    multiply_blocks,
    prepare_bytes,
    scale_values,
)
from hermes_async.quantization.encoding import CompiledRows, Parts, StoredMatrix
from hermes_async.quantization.mxfp4 import Mxfp4Encoding
from hermes_async.quantization.pieces import FLOAT16_ELEMENTS
from hermes_async.storage.tensor_spec import TensorSpec

_FP8 = torch.float8_e4m3fn
_OTHER_FP8 = (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_PACKED_FP4 = (torch.int8, torch.uint8)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
_NAN, _NEGATIVE_NAN = 0x7F, 0xFF
_LEAST_BLOCK_ROWS = 32  # with fewer, multiplying inputs takes as long as multiplying weights
_LARGEST_SCALE = 2.0**30  # of those that inputs are multiplied with: no product overflows


@dataclass(frozen=True)
class _Widening:
    """How the bits of an e4m3 number become those of a wider float, of which they are the same number times 2**-fold.

    The byte is extended by its sign, shifted to the place of the exponent's end, and masked. Numbers of the smallest
    exponent have no leading one in both formats, so they become right too. The byte of NaN does not.
    """

    integer: torch.dtype
    shift: int
    mask: int
    fold: int


_WIDENINGS = {
    torch.bfloat16: _Widening(torch.int16, 4, 0x87F0 - (1 << 16), 127 - 7),
    torch.float16: _Widening(torch.int16, 7, 0xBF80 - (1 << 16), 15 - 7),
    torch.float32: _Widening(torch.int32, 20, 0x87F00000 - (1 << 32), 127 - 7),
}


@dataclass(frozen=True)
class Fp8Encoding(BlockEncoding):
    """Numbers in e4m3, the part "weight" [rows, columns], times the numbers of their blocks, the part "scale".

    Attributes:
        block: Rows and columns of a block. The last block of a row or column of blocks may be smaller.
    """

    block: BlockSize

    @property
    def name(self) -> str:
        return "fp8"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        return {"weight": (rows, columns), "scale": self.block.grid(rows, columns)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        if can_compile(out.shape[1], self.block, out.dtype):
            scaled = self._scaled_bytes(parts, start, stop, out.dtype)
            scaled.dequantize(start - self.block.first_row(start), out)
            return
        num_rows, columns = out.shape
        scale = scale_values(parts["scale"][self.block.grid_rows(start, stop)])
        widening = _WIDENINGS[out.dtype]
        largest = 2.0 ** (127 - widening.fold)
        lowest, highest = bounds_of(scale)
        can_fold = -largest <= lowest <= highest <= largest
        folded_scale = scale * 2.0**widening.fold
        for rows in self.block.pieces(num_rows, columns, FLOAT16_ELEMENTS):
            weight, own = parts["weight"][start:stop][rows], out[rows]
            blocks = self.block.grid_rows(rows.start, rows.stop)
            if can_fold:
                _widen(weight, widening, own)
            if can_fold and not has_nan(weight):  # which is in the cache now
                multiply_blocks(own, folded_scale[blocks], self.block)
            else:
                numbers = weight.float()
                multiply_blocks(numbers, scale[blocks], self.block)
                own.copy_(numbers)

    def compiled_rows(self, parts: Parts, columns: int, dtype: torch.dtype) -> CompiledRows | None:
        if not can_compile(columns, self.block, dtype):
            return None
        return self._scaled_bytes(parts, 0, len(parts["weight"]), dtype).compiled_rows(columns)

    def _scaled_bytes(self, parts: Parts, start: int, stop: int, dtype: torch.dtype) -> ScaledBytes:
        """Some rows for compiled functions, from the first one of a block on."""
        numbers, scale = parts["weight"][self.block.first_row(start) : stop], parts["scale"]
        scale = scale_values(scale[self.block.grid_rows(start, stop)])
        return ScaledBytes("fp8", numbers, scale, self.block, rounds=dtype == torch.bfloat16)

    @property
    def compiles(self) -> bool:
        return True

    def prepare(self, dtype: torch.dtype) -> None:
        prepare_bytes("fp8", dtype)

    @property
    def scales_inputs(self) -> bool:
        return (self.block.rows is None or self.block.rows >= _LEAST_BLOCK_ROWS) and (
            self.block.columns is None or self.block.columns > 1
        )

    def scaled_product(self, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        weight, scale = parts["weight"], scale_values(parts["scale"])
        lowest, highest = bounds_of(scale)
        if not self.scales_inputs or not -_LARGEST_SCALE <= lowest <= highest <= _LARGEST_SCALE:
            return None
        rows, columns = weight.shape
        height, width = self.block.rows or rows, self.block.columns or columns
        out = torch.empty(rows, dtype=inputs.dtype)
        most = max(1, min(height, FLOAT16_ELEMENTS // columns))
        scratch = torch.empty((most, columns), dtype=inputs.dtype)
        # Numbers are folded by half before they are added, and by half afterwards, so that nothing overflows.
        half = 2.0 ** (_WIDENINGS[inputs.dtype].fold // 2)
        wide_inputs = inputs.float()
        for idx, factors in enumerate(scale * half):
            scaled = (wide_inputs * factors.repeat_interleave(width)[:columns]).to(inputs.dtype)
            end = min(rows, (idx + 1) * height)
            for start in range(idx * height, end, most):
                stop = min(end, start + most)
                if has_nan(weight[start:stop]):
                    return None
                block = scratch[: stop - start]
                _widen(weight[start:stop], _WIDENINGS[inputs.dtype], block)
                torch.mv(block, scaled, out=out[start:stop])
        return out.mul_(half)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        piece = max(columns, min(rows * columns, FLOAT16_ELEMENTS))
        return 4 * piece + 20 * prod(self.block.grid(rows, columns))


def has_nan(weight: torch.Tensor) -> bool:
    """Whether an e4m3 tensor has one of the two bytes that are not a number."""
    return int(weight.view(torch.int8).amax()) == _NAN or int(weight.view(torch.uint8).amax()) == _NEGATIVE_NAN


BFLOAT16_FOLD = 2.0 ** _WIDENINGS[torch.bfloat16].fold
"""What `folded` divides numbers by."""


def folded(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of e4m3 in bfloat16, divided by `BFLOAT16_FOLD`. It must not have NaN."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    _widen(weight, _WIDENINGS[torch.bfloat16], out)
    return out


def _widen(weight: torch.Tensor, widening: _Widening, out: torch.Tensor) -> None:
    bits = out.view(widening.integer)
    bits.copy_(weight.view(torch.int8))
    bits.mul_(1 << widening.shift)  # multiplied faster than shifted
    bits.bitwise_and_(widening.mask)


def e4m3_values(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of e4m3 in float32; much faster than torch's own conversion."""
    if has_nan(weight):
        return weight.float()
    widening, values = _WIDENINGS[torch.float32], torch.empty(weight.shape)
    _widen(weight, widening, values)
    return values.mul_(2.0**widening.fold)


def fp8_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The FP8 matrices among the tensors of a checkpoint, by the names that their weights have unquantized.

    Which modules were left out is seen from the tensors: their weights are not in FP8.

    Raises:
        CorruptShardError: A matrix has no scale, one of another shape, or one whose dtype is not the format's.
        UnsupportedModelError: A matrix is in another kind of FP8.
    """
    block = _block_of(settings)
    found: dict[str, StoredMatrix] = {}
    for name, spec in tensors.items():
        scale = next((tensors[one] for one in _scale_names(name) if one in tensors), None)
        if not _is_quantized(name, spec, has_scale=scale is not None):
            continue
        if scale is None:
            raise CorruptShardError(
                f"{spec.file}: tensor {name!r} is quantized ({spec.dtype_name}), and its scale "
                f"({next(_scale_names(name))!r}) is missing",
                path=spec.file,
            )
        if spec.dtype in _OTHER_FP8:
            raise UnsupportedModelError(
                f"{spec.file}: tensor {name!r} is in {spec.dtype_name}; of FP8 numbers, hermes_async reads e4m3fn. "
                "Use the model that this one was made from",
                path=spec.file,
            )
        if scale.dtype not in _SCALE_DTYPES or len(spec.shape) not in (2, 3):
            raise CorruptShardError(
                f"{scale.file}: tensor {scale.name!r} ({scale.dtype_name}, shape {list(scale.shape)}) cannot be the "
                f"scale of {name!r} ({spec.dtype_name}, shape {list(spec.shape)})",
                path=scale.file,
            )
        found[name] = fp8_matrix(spec, scale, block)
    return found


def fbgemm_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """As `fp8_matrices`, for `fbgemm_fp8`: stacked experts have a scale for each column, in a shape of either form."""
    return fp8_matrices(settings, {name: _of_columns(spec, tensors) for name, spec in tensors.items()})


def _of_columns(scale: TensorSpec, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    weight = tensors.get(scale.name.removesuffix("_scale"))
    if weight is None or weight.dtype != _FP8 or len(weight.shape) != 3:
        return scale
    num_experts, _, columns = weight.shape
    return replace(scale, shape=(num_experts, 1, columns)) if scale.shape == (num_experts, columns, 1) else scale


def _block_of(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of blocks that the configuration names."""
    match settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _scale_names(name: str) -> Iterator[str]:
    """The names that the scale of a weight may have."""
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if name.endswith(".weight"):
        module = name.removesuffix(".weight")
        yield f"{module}.scale"
        yield f"{module}.qscale_weight"


def _is_quantized(name: str, spec: TensorSpec, *, has_scale: bool) -> bool:
    if spec.dtype in (_FP8, *_OTHER_FP8):
        return has_scale or len(spec.shape) > 1
    is_packed = spec.dtype in _PACKED_FP4 and spec.packed is None and len(spec.shape) > 1
    return is_packed and (has_scale or name.endswith(".weight"))


def fp8_matrix(spec: TensorSpec, scale: TensorSpec, block: tuple[int, int] | None = None) -> StoredMatrix:
    """The matrix, or stacked matrices, of numbers in FP8 or packed FP4, and their scales.

    Args:
        block: Rows and columns of a block, if the configuration names them.

    Raises:
        CorruptShardError: The scales do not divide it into blocks.
    """
    is_fp4 = spec.dtype in _PACKED_FP4
    *stacked, rows, stored_columns = spec.shape
    columns = 2 * stored_columns if is_fp4 else stored_columns
    grid = _grid(scale.shape, len(stacked))
    size = None if len(grid) != len(spec.shape) else _block_size((rows, columns), grid[-2:], block)
    if size is None:
        raise CorruptShardError(
            f"{scale.file}: tensor {scale.name!r} has shape {list(scale.shape)}, which does not divide the "
            f"{'FP4' if is_fp4 else 'FP8'} matrix {spec.name!r} of shape {[*stacked, rows, columns]} into blocks"
            + (f" of {block[0]} by {block[1]} or of another size" if block else ""),
            path=scale.file,
        )
    encoding = Mxfp4Encoding(size) if is_fp4 else Fp8Encoding(size)
    return StoredMatrix(encoding, (*stacked, rows, columns), {"weight": spec, "scale": replace(scale, shape=grid)})


def _grid(shape: Sequence[int], num_stacked: int) -> tuple[int, ...]:
    """A scale's shape with a row and a column of each matrix: there may be one a matrix, or one a row."""
    if len(shape) <= num_stacked:
        return (*shape, *(1 for _ in range(num_stacked + 2 - len(shape))))
    return (*shape, 1) if len(shape) == num_stacked + 1 else tuple(shape)


def _block_size(shape: tuple[int, int], grid: Sequence[int], block: tuple[int, int] | None) -> BlockSize | None:
    """The blocks that a grid of scales makes of a matrix. Those of the configuration may be cut at the end."""
    if block is not None and tuple(grid) == BlockSize(*block).grid(*shape):
        return BlockSize(*block)
    if not all(grid) or any(size % count for size, count in zip(shape, grid, strict=True)):
        return None
    rows, columns = (None if count == 1 else size // count for size, count in zip(shape, grid, strict=True))
    return BlockSize(rows, columns)
