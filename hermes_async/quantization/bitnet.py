"""BitNet: numbers of -1, 0 and 1 in two bits, with one scale for a matrix.

The layers that transformers makes of such a file also round their inputs to 8 bits. That is not done: the products are
those of the weights with the inputs as they are.

Source: BitNet b1.58 (arXiv 2402.17764), section 2; transformers' `unpack_weights`, `BitLinear` and `AutoBitLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.encoding import Encoding, Parts, StoredMatrix
from hermes_async.quantization.pieces import piece_bytes, row_pieces
from hermes_async.storage.tensor_spec import TensorSpec

_WEIGHT = ".weight"
_IN_A_BYTE = 4
_WHAT_WORKS = "use a file of the model with packed weights (quantization_mode 'offline'), in GGUF, or not quantized"


@dataclass(frozen=True)
class TernaryEncoding(Encoding):
    """Codes of two bits, one more than their numbers, in the part "weight" [rows / 4, columns].

    A byte has numbers of four rows, one of each quarter of the rows; the lowest bits have that of the first quarter.
    The part "scale" [1] is for all.

    Attributes:
        divides: Whether numbers are divided by the scale, and not multiplied with it.
    """

    divides: bool

    @property
    def name(self) -> str:
        return "bitnet"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if rows % _IN_A_BYTE:
            raise ValueError(f"its {rows} rows do not fill whole bytes")
        return {"weight": (rows // _IN_A_BYTE, columns), "scale": (1,)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        packed, scale = parts["weight"], parts["scale"].float()
        quarter = len(packed)
        for place in range(_IN_A_BYTE):
            before = place * quarter
            first, last = max(start, before), min(stop, before + quarter)
            for begin, end in row_pieces(first, last, out.shape[1]):
                numbers = ((packed[begin - before : end - before] >> 2 * place) & 3).float()
                numbers -= 1
                numbers = numbers.div_(scale) if self.divides else numbers.mul_(scale)
                out[begin - start : end - start] = numbers

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return piece_bytes(rows, columns, 10) + 64


def bitnet_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The matrices of packed numbers among the tensors of a checkpoint, by the names of their weights.

    Raises:
        UnsupportedModelError: The layers also normalize their inputs, or weights are not packed.
        CorruptShardError: A matrix has no scale, or one of another shape or dtype.
    """
    found: dict[str, StoredMatrix] = {}
    multiplies = settings.get("linear_class") == "autobitlinear"
    for name, spec in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if not name.endswith(_WEIGHT) or len(spec.shape) != 2 or (spec.dtype != torch.uint8 and scale is None):
            continue
        if settings.get("use_rms_norm") or spec.dtype != torch.uint8:
            what = "has layers that normalize their inputs" if spec.dtype == torch.uint8 else "is not packed"
            raise UnsupportedModelError(f"{spec.file}: {name!r}, of BitNet, {what}; {_WHAT_WORKS}", path=spec.file)
        if scale is None or not scale.dtype.is_floating_point:
            what = "is missing" if scale is None else "has no floating-point number"
            raise CorruptShardError(
                f"{spec.file}: tensor {name!r} is packed, and its scale ({f'{name}_scale'!r}) {what}", path=spec.file
            )
        shape = (spec.shape[0] * _IN_A_BYTE, spec.shape[1])
        found[name] = StoredMatrix(TernaryEncoding(not multiplies), shape, {"weight": spec, "scale": scale})
    return found
