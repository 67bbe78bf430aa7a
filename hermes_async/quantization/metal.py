"""Whole numbers of 2, 4 or 8 bits in words of 32, with a scale and an offset for each group of columns.

transformers calls the method "metal", after the GPUs that it is made for.

Source: transformers' `MetalDequantize`, which computes `(code * scale + offset).to(dtype of the scale)` in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.byte_tables import byte_table, look_up
from hermes_async.quantization.encoding import Encoding, Parts, StoredMatrix
from hermes_async.quantization.pieces import piece_bytes, row_pieces
from hermes_async.storage.tensor_spec import TensorSpec

_WEIGHT = ".weight"
_BITS = (2, 4, 8)
_DEFAULT_BITS, _DEFAULT_GROUP = 4, 64


@dataclass(frozen=True)
class AffineWordsEncoding(Encoding):
    """Codes in the part "weight" [rows, words], the first in a word's lowest bits.

    Parts: "scales" and "qbiases" [rows, groups].
    """

    bits: int
    group: int

    @property
    def name(self) -> str:
        return f"metal int{self.bits}"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if columns % self.group:
            raise ValueError(f"{columns} columns are no whole number of groups of {self.group}")
        groups = columns // self.group
        return {"weight": (rows, columns * self.bits // 8), "scales": (rows, groups), "qbiases": (rows, groups)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        dtype = parts["scales"].dtype
        for begin, end in row_pieces(start, stop, out.shape[1]):
            numbers = torch.empty((end - begin, out.shape[1]), dtype=torch.float32)
            look_up(parts["weight"][begin:end].view(-1), _table(self.bits), numbers.view(-1))
            groups = numbers.view(end - begin, -1, self.group)
            groups *= parts["scales"][begin:end, :, None].float()
            groups += parts["qbiases"][begin:end, :, None].float()
            out[begin - start : end - start] = numbers if out.dtype == dtype else numbers.to(dtype)

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows

    @property
    def divisible(self) -> bool:
        return True

    def may_be_zero(self, part: str) -> bool:
        return True  # the least scale that is written, 1e-8, is zero in float16

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return piece_bytes(rows, columns, 10)


@cache
def _table(bits: int) -> torch.Tensor:
    return byte_table(range(1 << bits))


def metal_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The quantized matrices among the tensors of a checkpoint, by the names of their weights.

    Raises:
        CorruptShardError: A matrix lacks a part, or has one of another shape; or the settings name other bits.
    """
    found: dict[str, StoredMatrix] = {}
    bits, group = settings.get("bits", _DEFAULT_BITS), settings.get("group_size", _DEFAULT_GROUP)
    for name, spec in tensors.items():
        if spec.dtype != torch.uint32 or not name.endswith(_WEIGHT) or len(spec.shape) != 2:
            continue
        if bits not in _BITS or type(group) is not int or not 0 < group < 2**31 or group * bits % 32:
            raise CorruptShardError(
                f"{spec.file}: config.json says {bits!r} bits and groups of {group!r} for {name!r}; there are "
                f"{', '.join(map(str, _BITS))} bits, and a group has whole words of 32 bits",
                path=spec.file,
            )
        rows, words = spec.shape
        # The words are little-endian, so their bytes have the codes in order.
        parts = {"weight": replace(spec, dtype=torch.uint8, shape=(rows, words * 4))}
        for part in ("scales", "qbiases"):
            own = tensors.get(f"{name.removesuffix(_WEIGHT)}.{part}")
            if own is None or not own.dtype.is_floating_point:
                what = "is missing" if own is None else "has no floating-point numbers"
                raise CorruptShardError(
                    f"{spec.file}: tensor {name!r} is quantized, and its {part!r} {what}", path=spec.file
                )
            parts[part] = own
        found[name] = StoredMatrix(AffineWordsEncoding(bits, group), (rows, words * 32 // bits), parts)
    return found
