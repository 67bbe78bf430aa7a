"""Checkpoints in GPTQ's layout, as AutoGPTQ, GPTQModel, optimum and AutoRound write them.

Source: GPTQModel (ModelCloud/GPTQModel), `PackableQuantLinear.dequantize_weight` and `convert_gptq_v1_to_v2_format`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.column_groups import without_groups_in_order
from hermes_async.quantization.encoding import IntegerGroups, IntegerRows, Parts, StoredMatrix
from hermes_async.quantization.name_patterns import NamePatterns
from hermes_async.quantization.packed_integers import (
    SCALE_DTYPES,
    WORD_BITS,
    OrderedEncoding,
    check_dtype,
    num_groups,
    numbers_per_step,
    scratch_bytes,
    turned,
    unpacked,
    words_of,
    write_packed,
)
from hermes_async.storage.tensor_spec import TensorSpec

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": True, "gptq_v2": False}
"""By the name of the layout: whether zero points are stored less one."""
_NAMES = {"packed": "qweight", "zero_point": "qzeros", "scale": "scales", "g_idx": "g_idx"}


@dataclass(frozen=True)
class GptqEncoding(OrderedEncoding):
    """Numbers packed along columns, with the columns as the first dimension; a weight is (number - zero) * scale.

    Parts: "packed", int32 [words of a row, rows]; "zero_point", int32 [groups, words]; "scale" [groups, rows]; "g_idx"
    [columns] where there is one.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size, ordered: See `OrderedEncoding`.
        less_one: Whether zero points are stored less one.
    """

    bits: int
    group_size: int | None
    less_one: bool
    ordered: bool

    @property
    def name(self) -> str:
        return f"GPTQ int{self.bits}"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        step = numbers_per_step(self.bits)
        if columns % step or rows % step:
            raise ValueError(f"its {rows} rows and {columns} columns do not fill whole words of {self.bits} bits")
        groups = num_groups(columns, self.group_size)
        shapes: dict[str, tuple[int, ...]] = {
            "packed": (words_of(columns, self.bits), rows),
            "zero_point": (groups, words_of(rows, self.bits)),
            "scale": (groups, rows),
        }
        return shapes | {"g_idx": (columns,)} if self.ordered else shapes

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        scale, zero = parts["scale"][:, start:stop].t(), self._zero_point(parts["zero_point"], start, stop)
        words, g_idx = turned(parts["packed"][:, start:stop]), parts["g_idx"] if self.ordered else None
        write_packed(words, zero, scale, out, bits=self.bits, g_idx=g_idx)

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        if self.bits != 4 or self.ordered:
            return None
        return IntegerGroups(4, self.group_size or columns, "packed", symmetric=False)

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        packed = parts["packed"]
        numbers = unpacked(turned(packed[:, start:stop]), self.bits, WORD_BITS // self.bits * packed.shape[0])
        zero = self._zero_point(parts["zero_point"], start, stop)
        return IntegerRows(numbers, parts["scale"][:, start:stop].t(), zero)

    def _zero_point(self, stored: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """int8 [rows, groups], as `unpacked` gives them."""
        words = stored[:, words_of(start, self.bits) : words_of(stop, self.bits)].contiguous()
        if self.less_one and self.bits != 3:
            # As GPTQModel does: where a zero point of 0 was stored, the word borrowed from its neighbour.
            words = words + sum(1 << shift for shift in range(0, WORD_BITS, self.bits))
        zero = unpacked(words, self.bits, stop - start).t()
        if self.less_one and self.bits == 3:
            zero = (zero + 1).bitwise_and_(7)
        return zero

    @property
    def row_step(self) -> int:
        return numbers_per_step(self.bits)

    def unordered(self) -> Self:
        return replace(self, ordered=False)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        packed = 2 * rows * words_of(columns, self.bits) * 4
        return packed + scratch_bytes(rows, columns, self.group_size, ordered=self.ordered, bits=self.bits)


def gptq_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The GPTQ matrices among the tensors of a checkpoint, by the names that their weights have unquantized.

    Raises:
        UnsupportedModelError: The layout is another one, or its numbers have other bits.
        CorruptShardError: A matrix lacks a part, or has one of another shape or dtype.
    """
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if layout not in _FORMATS or settings.get("is_marlin_format"):
        raise UnsupportedModelError(
            f"{folder_of(tensors)} is a GPTQ checkpoint in the layout {layout!r}; hermes_async reads "
            f"{' and '.join(_FORMATS)}, which GPTQModel writes",
            path=folder_of(tensors),
        )
    dynamic = settings.get("dynamic")
    overrides = dynamic if isinstance(dynamic, dict) else {}
    return matrices_in_gptq_layout(settings, overrides, tensors, less_one=_FORMATS[layout])


def matrices_in_gptq_layout(
    settings: Mapping[str, Any], overrides: Mapping[str, Any], tensors: Mapping[str, TensorSpec], *, less_one: bool
) -> dict[str, StoredMatrix]:
    """As `gptq_matrices`.

    Args:
        settings: With "bits" and "group_size".
        overrides: Other settings of some modules, by a name or a pattern of names.
    """
    found: dict[str, StoredMatrix] = {}
    patterns = NamePatterns(folder_of(tensors))
    for name, spec in tensors.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        own = {**settings, **_override(module, overrides, patterns)}
        found[f"{module}.weight"] = _matrix(module, spec, own, tensors, less_one=less_one)
    return without_groups_in_order(found)


def _override(module: str, overrides: Mapping[str, Any], patterns: NamePatterns) -> Mapping[str, Any]:
    """The settings of the first pattern that matches a module. It may have "+:" before it."""
    for pattern, settings in overrides.items():
        if not isinstance(settings, Mapping) or pattern.startswith("-:"):
            continue
        expression = pattern.removeprefix("+:")
        if expression == module or patterns.match(expression, module):
            return settings
    return {}


def _matrix(
    module: str, packed: TensorSpec, settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec], *, less_one: bool
) -> StoredMatrix:
    bits = bits_of(settings, _BITS, packed)
    parts = named_parts(module, packed, _NAMES, tensors, optional=("g_idx",))
    if len(packed.shape) != 2:
        raise misshapen(packed, "which is no matrix of words")
    words, rows = packed.shape
    columns = parts["g_idx"].shape[0] if parts.get("g_idx") and parts["g_idx"].shape else words * WORD_BITS // bits
    encoding = GptqEncoding(bits, group_size_of(settings, packed), less_one, "g_idx" in parts)
    return StoredMatrix(encoding, (rows, columns), parts, as_linear=True)


# --- what AWQ's layout has in common with this one ---


def folder_of(tensors: Mapping[str, TensorSpec]) -> Any:
    """The checkpoint, for messages."""
    return next((spec.file.parent for spec in tensors.values()), None)


def bits_of(settings: Mapping[str, Any], allowed: Iterable[int], spec: TensorSpec) -> int:
    """The bits of each number.

    Raises:
        UnsupportedModelError: There are no such layouts.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    if isinstance(bits, bool) or bits not in allowed:
        raise UnsupportedModelError(
            f"{spec.file}: the numbers of tensor {spec.name!r} have {bits!r} bits, as config.json says; hermes_async "
            f"reads {', '.join(map(str, allowed))}",
            path=spec.file,
        )
    assert isinstance(bits, int)
    return bits


def group_size_of(settings: Mapping[str, Any], spec: TensorSpec) -> int | None:
    """The columns of a group; None if a row is one.

    Raises:
        CorruptShardError: The configuration names no size that a group can have.
    """
    size = settings.get("group_size", settings.get("q_group_size", 128))
    if size in (-1, None):
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CorruptShardError(
            f"{spec.file}: tensor {spec.name!r} has groups of {size!r} columns, as config.json says", path=spec.file
        )
    return size


def named_parts(
    module: str,
    packed: TensorSpec,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    *,
    optional: Iterable[str] = (),
) -> dict[str, TensorSpec]:
    """The tensors of a module, by their role; all of them have been checked for their dtype.

    Args:
        names: Their names in the module, by role.

    Raises:
        CorruptShardError: One is missing, or has another dtype. The message names it and its file.
    """
    dtypes = {"scale": SCALE_DTYPES, "g_idx": (torch.int32, torch.int64)}
    parts = {}
    for part, leaf in names.items():
        spec = tensors.get(f"{module}.{leaf}")
        if spec is not None:
            check_dtype(spec, dtypes.get(part, (torch.int32,)), part)
            parts[part] = spec
        elif part not in optional:
            raise CorruptShardError(
                f"{packed.file}: tensor {packed.name!r} is quantized, and its {part} is missing: "
                f"{f'{module}.{leaf}'!r}",
                path=packed.file,
            )
    return parts


def misshapen(spec: TensorSpec, why: str) -> CorruptShardError:
    """The error of a part whose shape alone says that it is none."""
    return CorruptShardError(f"{spec.file}: tensor {spec.name!r} has shape {list(spec.shape)}, {why}", path=spec.file)
