"""Checkpoints in one processor's layout of 4-bit weights, as `hermes-async quantize --for-this-machine` writes them.

Their tensors are the parts of an `Int4Layout`, so torch's kernel multiplies with the bytes of the file. Only this
engine reads them, and only on a processor with the same layout. The settings are "quant_method", "block" (the rows that
the layout packs together) and "group_size".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hermes_async.errors import ConfigError, CorruptShardError, UnsupportedModelError
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.kernel_layouts import INT4_BLOCKS, INT4_GROUPS, Int4Layout, int4_block, packed_for_int4
from hermes_async.quantization.packed_integers import SCALE_DTYPES, check_dtype
from hermes_async.quantization.rounding import round_to_integers
from hermes_async.quantization.write import OutputFormat, PartLayout
from hermes_async.storage.tensor_spec import TensorSpec

METHOD = "hermes_async_int4"
_NUMBERS, _SCALES = ".weight_numbers", ".weight_scales"
_CHUNK_ELEMENTS = 1 << 21  # multiplied by one call of the kernel; with more, the gain is small
_ROUNDED_AT_ONCE = 1 << 18


def processor_layout_matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> dict[str, StoredMatrix]:
    """The quantized matrices among the tensors of a checkpoint, by the names that their weights have unquantized.

    Raises:
        UnsupportedModelError: This processor has another layout, or none.
        CorruptShardError: A matrix lacks a part, or has one of another shape or dtype; or the settings are wrong.
    """
    found: dict[str, StoredMatrix] = {}
    for name, spec in tensors.items():
        if not name.endswith(_NUMBERS):
            continue
        block, group = settings.get("block"), settings.get("group_size")
        if type(block) is not int or type(group) is not int or block not in INT4_BLOCKS or group not in INT4_GROUPS:
            raise CorruptShardError(
                f"{spec.file}: config.json says blocks of {block!r} rows and groups of {group!r} for {name!r}; there "
                f"are blocks of {_listed(INT4_BLOCKS)} and groups of {_listed(INT4_GROUPS)}",
                path=spec.file,
            )
        _check_processor(spec, block)
        module = name.removesuffix(_NUMBERS)
        scales = tensors.get(module + _SCALES)
        if scales is None or len(scales.shape) != 4 or len(spec.shape) != 2:
            raise CorruptShardError(
                f"{spec.file}: tensor {name!r} of shape {list(spec.shape)} needs a tensor {module + _SCALES!r} of four "
                f"dimensions, and {'there is none' if scales is None else f'that has the shape {list(scales.shape)}'}",
                path=spec.file,
            )
        check_dtype(spec, (torch.uint8,), "numbers")
        check_dtype(scales, SCALE_DTYPES, "scales")
        rows, half = spec.shape
        chunk = scales.shape[2]
        if chunk < 1 or chunk % block or rows % chunk:
            raise CorruptShardError(
                f"{scales.file}: tensor {scales.name!r} has chunks of {chunk} rows, which do not divide the {rows} "
                f"rows of {name!r}, or are no whole number of blocks of {block}",
                path=scales.file,
            )
        layout = Int4Layout(group, symmetric=True, block=block, chunk=chunk)
        found[f"{module}.weight"] = StoredMatrix(layout, (rows, 2 * half), {"numbers": spec, "scales": scales})
    return found


def _check_processor(spec: TensorSpec, block: int) -> None:
    own = int4_block()
    if own == block:
        return
    has = f"has that of {INT4_BLOCKS[own]}, which packs {own}" if own else "has no such layout"
    raise UnsupportedModelError(
        f"{spec.file.parent} was made with --for-this-machine, for processors with {INT4_BLOCKS[block]}, whose layout "
        f"packs {block} rows together. This processor {has}, so it cannot read it. Quantize the original model here, "
        "or without --for-this-machine, which works everywhere",
        path=spec.file.parent,
    )


def _listed(numbers: Sequence[int] | Mapping[int, str]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True)
class ProcessorInt4(OutputFormat):
    """Integers of 4 bits in the layout of this processor, and a scale for each group of a row.

    Attributes:
        block: The rows that the layout packs together.
    """

    group_size: int
    block: int

    @classmethod
    def for_this_machine(cls, group_size: int) -> ProcessorInt4:
        """The format for the processor that runs this.

        Raises:
            ConfigError: torch has no kernel with a known layout here.
        """
        block = int4_block()
        if block is None:
            raise ConfigError(
                "--for-this-machine: torch has no kernel for 4-bit weights on this processor whose layout is known; "
                "without this option, the format works everywhere"
            )
        return cls(group_size, block)

    @property
    def title(self) -> str:
        return f"int4, groups of {self.group_size}, laid out for processors with {INT4_BLOCKS[self.block]}"

    def takes(self, rows: int, columns: int) -> bool:
        return rows % self.block == 0

    def parts(self, rows: int, columns: int, scale_dtype: torch.dtype) -> dict[str, PartLayout]:
        layout = Int4Layout(self.group_size, symmetric=True, block=self.block, chunk=self.block_rows(rows, columns))
        shapes = layout.shapes(rows, columns)
        return {
            "weight_numbers": PartLayout(torch.uint8, shapes["numbers"]),
            "weight_scales": PartLayout(scale_dtype, shapes["scales"]),
        }

    def block_rows(self, rows: int, columns: int) -> int:
        """The rows of a chunk: they divide the matrix."""
        chunk = self.block
        while rows % (2 * chunk) == 0 and 2 * chunk * columns <= _CHUNK_ELEMENTS:
            chunk *= 2
        return chunk

    def quantize(self, rows: torch.Tensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        columns = rows.shape[1]
        numbers: list[torch.Tensor] = []
        scales: list[torch.Tensor] = []
        for piece in torch.split(rows, max(1, _ROUNDED_AT_ONCE // columns)):
            integers, own = round_to_integers(piece.view(len(piece), -1, self.group_size), 4, scale_dtype)
            numbers.append(integers.view(len(piece), columns) + 8)
            scales.append(own)
        by_group = torch.cat(scales).t()
        return {
            "weight_numbers": packed_for_int4(torch.cat(numbers)),
            "weight_scales": torch.stack([by_group, torch.zeros_like(by_group)], dim=-1),
        }

    def settings(self, ignored: Sequence[str]) -> Mapping[str, Any]:
        return {
            "quant_method": METHOD,
            "block": self.block,
            "group_size": self.group_size,
            "bits": 4,
            "ignore": list(ignored),
        }
