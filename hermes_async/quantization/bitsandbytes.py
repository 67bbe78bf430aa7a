"""bitsandbytes: 4 bits a number (NF4 and FP4), and 8 bits with a scale for each row.

Source: QLoRA (arXiv 2305.14314), section 3 and appendix E, for NF4 and for scales that are quantized themselves;
LLM.int8() (arXiv 2208.07339) for 8 bits; bitsandbytes' `dequantize_4bit`, `dequantize_blockwise` and
`int8_vectorwise_dequant`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.byte_tables import byte_table, look_up
from hermes_async.quantization.encoding import Encoding, Parts, StoredMatrix
from hermes_async.quantization.pieces import FLOAT32_ELEMENTS, piece_bytes, row_pieces
from hermes_async.storage.tensor_bytes import read_small_tensor
from hermes_async.storage.tensor_spec import TensorSpec

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_SIZES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_CODES = {"nf4": _NF4, "fp4": (*_FP4_SIZES, *(-size for size in _FP4_SIZES))}
"""The number of each code. The libraries' kernels use these, and not the `quant_map` that the files repeat."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK_SIZES = tuple(1 << power for power in range(5, 13))
_ONE_127TH = 7.874015718698502e-3  # as bitsandbytes has it
_ROW_FORMAT = b"\0"  # `weight_format`: the rows lie one after another
_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class Bits4Encoding(Encoding):
    """Codes of 4 bits, the part "weight", times their block's number. The blocks run over the matrix row by row.

    Parts: "weight" [bytes], two codes a byte, the first in the high bits; "absmax" [blocks], in float32. If the scales
    are quantized themselves ("nested"), "absmax" has bytes, whose numbers are in "nested_map" [256]; these are
    multiplied with "nested_absmax", one for each `nested_block`, and `offset` is added.

    Attributes:
        kind: Which numbers the codes stand for: "nf4" or "fp4".
        block: Codes of a block.
        dtype: That the weight had before; products are rounded to it first, as bitsandbytes rounds them.
        columns: Of the matrix.
        nested_block: Scales of a block of scales; 0 if they are plain.
    """

    kind: str
    block: int
    dtype: torch.dtype
    columns: int
    nested_block: int = 0
    offset: float = 0.0

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind}"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        blocks = -(-rows * columns // self.block)
        plain = {"weight": (-(-rows * columns // 2),), "absmax": (blocks,)}
        if not self.nested_block:
            return plain
        return plain | {"nested_absmax": (-(-blocks // self.nested_block),), "nested_map": (256,)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        first, last = start * out.shape[1], stop * out.shape[1]
        scales = self._scales(parts, first // self.block, -(-last // self.block))
        codes = parts["weight"][first // 2 : -(-last // 2)]
        values, table = out.view(-1), _table(self.kind)
        scratch = torch.empty(min(FLOAT32_ELEMENTS, last - first + 1), dtype=torch.float32)
        for begin in range(0, last - first, FLOAT32_ELEMENTS):
            end = min(last - first, begin + FLOAT32_ELEMENTS)
            some = codes[begin // 2 : -(-end // 2)]
            numbers = scratch[: 2 * len(some)]
            look_up(some, table, numbers)
            own = scales[begin // self.block : -(-end // self.block)]
            whole = (end - begin) // self.block
            blocks = numbers[: whole * self.block].view(whole, self.block)
            blocks *= own[:whole, None]
            if whole < len(own):
                numbers[whole * self.block :] *= own[whole]
            numbers = numbers[: end - begin]
            values[begin:end] = numbers if out.dtype == self.dtype else numbers.to(self.dtype)

    def _scales(self, parts: Parts, first: int, last: int) -> torch.Tensor:
        """Of these blocks, in float32."""
        absmax = parts["absmax"][first:last]
        if not self.nested_block:
            return absmax
        outer, last_outer = first // self.nested_block, -(-last // self.nested_block)
        of_blocks = parts["nested_absmax"][outer:last_outer, None].expand(-1, self.nested_block).reshape(-1)
        skipped = first - outer * self.nested_block
        scales = torch.index_select(parts["nested_map"], 0, absmax.int())
        scales *= of_blocks[skipped : skipped + len(scales)]
        scales += self.offset
        return scales

    @property
    def row_step(self) -> int:
        return self.block // math.gcd(self.block, self.columns)

    def part_rows(self, part: str, rows: int) -> int | None:
        if self.nested_block:
            return None
        return -(-rows * self.columns // (2 if part == "weight" else self.block))

    @property
    def divisible(self) -> bool:
        return not self.nested_block  # a block of scales would belong to several rows

    def is_scale(self, part: str) -> bool:
        return part in ("nested_absmax", "nested_map") or (part == "absmax" and not self.nested_block)

    def may_be_zero(self, part: str) -> bool:
        return True  # the largest number of a block of zeros is zero

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        elements = rows * columns
        scales = -(-elements // self.block) * (4 + (16 if self.nested_block else 0))
        return min(elements, FLOAT32_ELEMENTS) * 10 + scales


@cache
def _table(kind: str) -> torch.Tensor:
    return byte_table(_CODES[kind], high_bits_first=True)


@dataclass(frozen=True)
class Int8RowsEncoding(Encoding):
    """Whole numbers, the part "weight" [rows, columns], times the largest number of their row, "SCB", over 127."""

    @property
    def name(self) -> str:
        return "bitsandbytes int8"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        return {"weight": (rows, columns), "SCB": (rows,)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        for begin, end in row_pieces(start, stop, out.shape[1]):
            numbers = parts["weight"][begin:end].float()
            numbers *= parts["SCB"][begin:end, None]
            numbers *= _ONE_127TH
            out[begin - start : end - start] = numbers

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows

    @property
    def divisible(self) -> bool:
        return True

    def is_scale(self, part: str) -> bool:
        return part == "SCB"

    def may_be_zero(self, part: str) -> bool:
        return True  # the largest number of a row of zeros is zero

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return piece_bytes(rows, columns, 8) + 64


def bitsandbytes_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The matrices of 4 or 8 bits among the tensors of a checkpoint, by the names of their weights.

    Reads the description of each matrix of 4 bits, some 200 bytes.

    Raises:
        CorruptShardError: A matrix lacks a part, or has one of another dtype or shape, or its description is wrong.
        UnsupportedModelError: A matrix is stored in a way that is not built.
    """
    found: dict[str, StoredMatrix] = {}
    for name, spec in tensors.items():
        weight, separator, kind = name.partition(_STATE)
        if separator:
            found[weight] = _bits4_matrix(weight, kind, spec, tensors)
        elif spec.dtype == torch.int8 and len(spec.shape) == 2:
            found[name] = _int8_matrix(name, spec, tensors)
    for name, spec in tensors.items():
        if name not in found and f"{name}.absmax" in tensors:
            raise CorruptShardError(
                f"{spec.file}: tensor {name!r} is quantized by bitsandbytes, and its description "
                f"({name + _STATE + 'nf4'!r}) is missing",
                path=spec.file,
            )
    return found


def _bits4_matrix(name: str, kind: str, description: TensorSpec, tensors: Mapping[str, TensorSpec]) -> StoredMatrix:
    state = _State.read(description, kind)
    weight = _part(name, None, description, tensors)
    # Some files store the bytes in another dtype, for training.
    parts = {"weight": replace(weight, dtype=torch.uint8, shape=(weight.nbytes,))}
    absmax_dtype = torch.uint8 if state.nested_block else torch.float32
    parts["absmax"] = _part(f"{name}.absmax", absmax_dtype, description, tensors)
    if state.nested_block:
        parts["nested_absmax"] = _part(f"{name}.nested_absmax", torch.float32, description, tensors)
        parts["nested_map"] = _part(f"{name}.nested_quant_map", torch.float32, description, tensors)
    rows, columns = state.shape
    encoding = Bits4Encoding(
        kind, state.block, state.dtype, columns, nested_block=state.nested_block, offset=state.offset
    )
    return StoredMatrix(encoding, (rows, columns), parts, as_linear=True)


def _int8_matrix(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> StoredMatrix:
    base = name.removesuffix("weight")
    scales = _part(f"{base}SCB", torch.float32, spec, tensors)
    stored_as = tensors.get(f"{base}weight_format")
    if stored_as is not None and read_small_tensor(stored_as, 8)[:1] != _ROW_FORMAT:
        raise UnsupportedModelError(
            f"{spec.file}: tensor {name!r} is in an order for one kind of GPU (weight_format), which hermes_async does "
            "not read; load the checkpoint with transformers and bitsandbytes, and save it again",
            path=spec.file,
        )
    return StoredMatrix(Int8RowsEncoding(), spec.shape, {"weight": spec, "SCB": scales}, as_linear=True)


def _part(name: str, dtype: torch.dtype | None, user: TensorSpec, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    """The tensor `name`, which the tensor `user` needs. Any dtype is right where `dtype` is None."""
    spec = tensors.get(name)
    if spec is None:
        raise CorruptShardError(f"{user.file}: tensor {user.name!r} needs {name!r}, which is missing", path=user.file)
    if dtype is not None and spec.dtype != dtype:
        raise CorruptShardError(
            f"{spec.file}: tensor {name!r} is in {spec.dtype_name}, and {user.name!r} needs it in "
            f"{str(dtype).removeprefix('torch.')}",
            path=spec.file,
        )
    return spec


@dataclass(frozen=True, slots=True)
class _State:
    """What the description of a matrix says; see `Bits4Encoding`."""

    shape: tuple[int, int]
    block: int
    dtype: torch.dtype
    nested_block: int
    offset: float

    @classmethod
    def read(cls, spec: TensorSpec, kind: str) -> _State:
        """Reads the tensor, which is the text of a JSON object.

        Raises:
            CorruptShardError: It is not what bitsandbytes writes.
        """
        try:
            state = json.loads(read_small_tensor(spec, _MAX_STATE_BYTES))
        except (ValueError, RecursionError) as error:
            raise _bad_state(spec, f"no JSON: {error!s:.200}") from error
        match state:
            case {"quant_type": quant_type, "blocksize": block, "dtype": dtype, "shape": [rows, columns]}:
                pass
            case _:
                raise _bad_state(spec, "it lacks one of `quant_type`, `blocksize`, `dtype` and a `shape` of two sizes")
        if kind not in _CODES or quant_type != kind:
            raise _bad_state(spec, f"quant_type is {quant_type!r}; known are {', '.join(_CODES)}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise _bad_state(spec, f"dtype is {dtype!r}; known are {', '.join(_DTYPES)}")
        if not all(type(size) is int and 0 < size < 2**31 for size in (rows, columns)):
            raise _bad_state(spec, f"shape is {[rows, columns]!r}")
        is_nested = "nested_blocksize" in state
        nested_block, offset = state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
        for size in (block, nested_block) if is_nested else (block,):
            if type(size) is not int or size not in _BLOCK_SIZES:
                raise _bad_state(spec, f"a block size is {size!r}; known are {', '.join(map(str, _BLOCK_SIZES))}")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise _bad_state(spec, f"nested_offset is {offset!r}, which is no finite number")
        if is_nested and state.get("nested_dtype") != "float32":
            raise _bad_state(spec, f"nested_dtype is {state.get('nested_dtype')!r}, and must be 'float32'")
        return cls((rows, columns), block, _DTYPES[dtype], nested_block, float(offset))


def _bad_state(spec: TensorSpec, message: str) -> CorruptShardError:
    return CorruptShardError(
        f"{spec.file}: tensor {spec.name!r} does not describe a matrix of bitsandbytes: {message:.500}", path=spec.file
    )
