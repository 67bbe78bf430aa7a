"""torchao's weights, as transformers saves them in safetensors: FP8, 8 and 4 bits.

The header's metadata describes each weight: its kind, and the tensors that it is made of. What torchao would do to
activations is not done.

Source: torchao's `flatten_tensor_state_dict`, and its `Float8Tensor`, `Int8Tensor`, `IntxUnpackedToInt8Tensor` and
`Int4Tensor`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.byte_tables import byte_table, look_up
from hermes_async.quantization.encoding import Encoding, Parts, StoredMatrix
from hermes_async.quantization.fp8 import fp8_matrix
from hermes_async.quantization.pieces import piece_bytes, row_pieces
from hermes_async.storage.checkpoint import read_metadata
from hermes_async.storage.tensor_spec import TensorSpec

_PLAIN = "Tensor"
_NAMES = "tensor_names"
_WHAT_WORKS = (
    "hermes_async reads torchao's Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig and "
    "Int4WeightOnlyConfig in its plain packing; or use the model that this one was made from"
)


@dataclass(frozen=True)
class IntBlocksEncoding(Encoding):
    """Whole numbers, the part "qdata" [rows, columns], less a zero point, times a scale.

    Parts: "scale" [rows or 1, blocks of columns]; "zero_point", of the same shape, if there is one.
    """

    scale_shape: tuple[int, int]
    has_zero: bool

    @property
    def name(self) -> str:
        return "torchao int8"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"qdata": (rows, columns), "scale": self.scale_shape}
        return shapes | ({"zero_point": self.scale_shape} if self.has_zero else {})

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        for begin, end in row_pieces(start, stop, out.shape[1]):
            by_row = slice(begin, end) if self.scale_shape[0] > 1 else slice(None)
            numbers = parts["qdata"][begin:end].float().view(end - begin, self.scale_shape[1], -1)
            if self.has_zero:
                zero = parts["zero_point"][by_row, :, None]
                numbers -= zero.float()
                if zero.is_floating_point():
                    numbers = numbers.to(out.dtype).float()  # torchao rounds the difference
            numbers *= parts["scale"][by_row, :, None].float()
            out[begin - start : end - start] = numbers.view(end - begin, -1)

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows if part == "qdata" or self.scale_shape[0] > 1 else None

    @property
    def divisible(self) -> bool:
        return True

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return piece_bytes(rows, columns, 12)


@dataclass(frozen=True)
class Int4GroupsEncoding(Encoding):
    """Whole numbers from -8 to 7, two a byte, the first in the low bits, times a scale, plus a zero point.

    Parts: "qdata" [rows, columns / 2]; "scale" and "zero_point" [groups, rows].
    """

    group: int

    @property
    def name(self) -> str:
        return "torchao int4"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if columns % self.group or columns % 2:
            raise ValueError(f"{columns} columns are no whole number of groups of {self.group}")
        groups = columns // self.group
        return {"qdata": (rows, columns // 2), "scale": (groups, rows), "zero_point": (groups, rows)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        for begin, end in row_pieces(start, stop, out.shape[1]):
            numbers = torch.empty((end - begin, out.shape[1]), dtype=torch.float32)
            look_up(parts["qdata"][begin:end].view(torch.uint8).view(-1), _table(), numbers.view(-1))
            groups = numbers.view(end - begin, -1, self.group)
            groups *= parts["scale"][:, begin:end].float().t()[:, :, None]
            groups += parts["zero_point"][:, begin:end].float().t()[:, :, None]
            out[begin - start : end - start] = numbers

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return piece_bytes(rows, columns, 10)


@cache
def _table() -> torch.Tensor:
    return byte_table([*range(8), *range(-8, 0)])


def torchao_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The quantized matrices among the tensors of a checkpoint, by the names of their weights.

    Reads the headers of the files again, for what they say about each weight.

    Raises:
        CorruptShardError: A matrix lacks a part, or has one of another dtype, or a header does not describe it.
        UnsupportedModelError: A matrix is of a kind that is not built.
    """
    found: dict[str, StoredMatrix] = {}
    for file in sorted({spec.file for spec in tensors.values()}):
        metadata = read_metadata(file)
        for name in _described_names(file, metadata):
            if name not in found:
                described = _Described.read(file, name, metadata.get(name, ""), tensors)
                if described.kind != _PLAIN:
                    found[name] = described.matrix()
    return found


def _described_names(file: Path, metadata: Mapping[str, str]) -> list[str]:
    """The weights that a header describes, those in other files too."""
    try:
        names = json.loads(metadata.get(_NAMES, ""))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptShardError(
            f"{file} was quantized by torchao, and its header does not say how ({_NAMES!r} is missing, or no list of "
            "names); save the model again with transformers, or use the model that it was made from",
            path=file,
        )
    return names


@dataclass(frozen=True, slots=True)
class _Described:
    """A weight, as a header describes it.

    Attributes:
        kind: The class of torchao.
        attributes: What the class needs beside tensors.
        parts: Its tensors.
    """

    file: Path
    name: str
    kind: str
    attributes: Mapping[str, Any]
    parts: Mapping[str, TensorSpec]

    @classmethod
    def read(cls, file: Path, name: str, text: str, tensors: Mapping[str, TensorSpec]) -> _Described:
        try:
            described = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _corrupt(file, name, f"it is no JSON: {error!s:.200}") from error
        match described:
            case {"_type": "Tensor"}:
                return cls(file, name, _PLAIN, {}, {})
            case {"_type": str(kind), "_data": dict(attributes), "_tensor_data_names": list(part_names)}:
                pass
            case _:
                raise _corrupt(file, name, "it lacks one of `_type`, `_data` and `_tensor_data_names`")
        module, _, leaf = name.rpartition(".")
        parts = {}
        for part in part_names:
            spec = tensors.get(f"{module}._{leaf}_{part}")
            if spec is None:
                raise CorruptShardError(
                    f"{file}: the weight {name!r} ({kind}) lacks its tensor {f'{module}._{leaf}_{part}'!r}", path=file
                )
            parts[str(part)] = spec
        return cls(file, name, kind, attributes, parts)

    def matrix(self) -> StoredMatrix:
        if "act_pre_scale" in self.parts:
            raise self._unsupported("inputs that are scaled first (act_pre_scale)")
        match self.kind:
            case "Float8Tensor":
                return fp8_matrix(self._part("qdata", torch.float8_e4m3fn), self._part("scale"))
            case "Int8Tensor" | "IntxUnpackedToInt8Tensor":
                return self._int8_matrix()
            case "Int4Tensor":
                return self._int4_matrix()
        raise self._unsupported(f"{self.kind:.100}")

    def _int8_matrix(self) -> StoredMatrix:
        qdata, scale = self._part("qdata", torch.int8), self._part("scale")
        block = self._block(len(qdata.shape))
        rows = qdata.shape[-2]
        grid = tuple(size // max(1, length) for size, length in zip(qdata.shape, block, strict=True))
        even = all(number * length == size for number, length, size in zip(grid, block, qdata.shape, strict=True))
        if not even or any(length != 1 for length in block[:-2]) or grid[-2] not in (1, rows) or not grid[-1]:
            raise _corrupt(self.file, self.name, f"blocks of {list(block)} do not divide its shape {list(qdata.shape)}")
        parts = {"qdata": qdata, "scale": scale}
        if "zero_point" in self.parts:
            parts["zero_point"] = self._part("zero_point")
        return StoredMatrix(IntBlocksEncoding((grid[-2], grid[-1]), "zero_point" in parts), qdata.shape, parts)

    def _int4_matrix(self) -> StoredMatrix:
        qdata = self._part("qdata", torch.int8)
        group = self._block(len(qdata.shape))[-1]
        shape = (*qdata.shape[:-1], qdata.shape[-1] * 2)
        parts = {"qdata": qdata, "scale": self._part("scale"), "zero_point": self._part("zero_point")}
        return StoredMatrix(Int4GroupsEncoding(group), shape, parts)

    def _part(self, part: str, dtype: torch.dtype | None = None) -> TensorSpec:
        spec = self.parts.get(part)
        if spec is None:
            raise _corrupt(self.file, self.name, f"a {self.kind} needs {part!r}")
        fits = spec.dtype == dtype if dtype is not None else part != "scale" or spec.dtype.is_floating_point
        if not fits or (part == "qdata" and len(spec.shape) not in (2, 3)):
            raise CorruptShardError(
                f"{spec.file}: tensor {spec.name!r} is in {str(spec.dtype).removeprefix('torch.')} of shape "
                f"{list(spec.shape)}, which no {self.kind} that hermes_async reads has",
                path=spec.file,
            )
        return spec

    def _block(self, num_dims: int) -> tuple[int, ...]:
        match self.attributes.get("block_size"):
            case [*sizes] if len(sizes) == num_dims and all(type(size) is int and 0 < size < 2**31 for size in sizes):
                return tuple(sizes)
            case other:
                raise _corrupt(self.file, self.name, f"block_size is {other!r}, not {num_dims} sizes")

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.file}: the weight {self.name!r} has {what}; {_WHAT_WORKS}", path=self.file)


def _corrupt(file: Path, name: str, message: str) -> CorruptShardError:
    return CorruptShardError(f"{file}: the header describes the weight {name!r} wrongly: {message:.500}", path=file)
