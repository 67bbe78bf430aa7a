"""Writes matrices in fewer bits, as compressed-tensors stores them: what each becomes, and what `config.json` says.

Source: the format of the compressed-tensors library, which transformers and vLLM read: `pack-quantized` for integers,
`float-quantized` for FP8. Activations are not quantized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hermes_async.quantization.rounding import round_to_fp8, round_to_integers

GROUP_SIZES = (32, 64, 128)
_BLOCK_ELEMENTS = 1 << 18
_INT32_BITS = 32


@dataclass(frozen=True, slots=True)
class PartLayout:
    """The dtype and shape of one stored tensor. Its first dimension is the matrix's rows, unless it is `whole`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: bool = False


class OutputFormat(ABC):
    """How the rows of a matrix are quantized. A value: one object serves all matrices of a model."""

    @property
    @abstractmethod
    def title(self) -> str:
        """For people, such as "int4 in groups of 128"."""

    def takes(self, rows: int, columns: int) -> bool:
        """Whether matrices of this size can be stored so. Others stay as they are."""
        return True

    @abstractmethod
    def parts(self, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, PartLayout]:
        """The stored tensors of a matrix, by the ends of their names, such as "weight_packed".

        Raises:
            ValueError: No matrix of this size can be stored so; the text says why.
        """

    def block_rows(self, rows: int, columns: int) -> int:
        """How many rows of a matrix `quantize` takes at once; at the end of the matrix they may be fewer."""
        return max(1, _BLOCK_ELEMENTS // columns)

    @abstractmethod
    def quantize(self, rows: torch.Tensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What each part that is not `whole` has for a block of rows.

        Args:
            rows: [block rows, columns], float32 and finite.
        """

    def whole_parts(self, rows: int, columns: int) -> dict[str, torch.Tensor]:
        """The parts that do not depend on the weights."""
        return {}

    @abstractmethod
    def settings(self, ignored: Sequence[str]) -> Mapping[str, Any]:
        """The `quantization_config` of `config.json`.

        Args:
            ignored: The linear layers that are left as they are.
        """


class CompressedTensorsFormat(OutputFormat):
    """A format of the compressed-tensors library."""

    name: str
    """The name that it has there."""

    @abstractmethod
    def weight_settings(self) -> dict[str, Any]:
        """What the configuration says of the weights."""

    def settings(self, ignored: Sequence[str]) -> Mapping[str, Any]:
        weights = {
            **self.weight_settings(),
            "symmetric": True,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer_kwargs": {},
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": self.name,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


@dataclass(frozen=True)
class PackedIntegers(CompressedTensorsFormat):
    """Integers of 4 or 8 bits, packed into int32, and a scale for each group of a row.

    Column `c` of a row lies in bits `num_bits * (c % n)` and up of the int32 number `c // n`, where `n` integers fit
    into one. Half of their range is added to the integers.

    Attributes:
        group_size: Columns of a group; None for one scale a row.
    """

    num_bits: int
    group_size: int | None

    name = "pack-quantized"

    @property
    def title(self) -> str:
        each = "one scale a row" if self.group_size is None else f"groups of {self.group_size}"
        return f"int{self.num_bits}, {each}"

    def parts(self, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, PartLayout]:
        size = self.group_size or columns
        if columns % size:
            raise ValueError(f"groups of {size} do not divide its {columns} columns")
        packed = -(-columns * self.num_bits // _INT32_BITS)
        return {
            "weight_packed": PartLayout(torch.int32, (rows, packed)),
            "weight_scale": PartLayout(scale_dtype, (rows, columns // size)),
            "weight_shape": PartLayout(torch.int64, (2,), whole=True),
        }

    def quantize(self, rows: torch.Tensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        count, columns = rows.shape
        groups = rows.view(count, -1, self.group_size or columns)
        integers, scales = round_to_integers(groups, self.num_bits, scale_dtype)
        return {"weight_packed": _joined_integers(integers.view(count, columns), self.num_bits), "weight_scale": scales}

    def whole_parts(self, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {"weight_shape": torch.tensor([rows, columns], dtype=torch.int64)}

    def weight_settings(self) -> dict[str, Any]:
        return {
            "num_bits": self.num_bits,
            "type": "int",
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
        }


@dataclass(frozen=True)
class RowScaledFp8(CompressedTensorsFormat):
    """Numbers in e4m3, and a scale for each row."""

    name = "float-quantized"

    @property
    def title(self) -> str:
        return "fp8, one scale a row"

    def parts(self, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, PartLayout]:
        return {
            "weight": PartLayout(torch.float8_e4m3fn, (rows, columns)),
            "weight_scale": PartLayout(scale_dtype, (rows, 1)),
        }

    def quantize(self, rows: torch.Tensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        numbers, scales = round_to_fp8(rows, scale_dtype)
        return {"weight": numbers, "weight_scale": scales}

    def weight_settings(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}


def _joined_integers(integers: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int8 [rows, columns] to int32 [rows, packed]. What is left of the last number of a row is zero."""
    columns = integers.shape[1]
    per_number = _INT32_BITS // num_bits
    unsigned = integers.view(torch.uint8) + (1 << (num_bits - 1))  # modulo 256
    if columns % per_number:
        unsigned = F.pad(unsigned, (0, per_number - columns % per_number))
    if num_bits == 4:
        unsigned = unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)
