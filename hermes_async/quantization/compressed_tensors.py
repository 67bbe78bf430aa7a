"""Checkpoints of the compressed-tensors library, as llm-compressor writes them.

Whether and how a matrix is quantized follows from the tensors that are there, and from the group of the configuration
that its module belongs to. Quantization of activations and of KV caches is not applied.

Source: the compressed-tensors library (vllm-project/compressed-tensors), which transformers calls. It rounds products
of numbers and scales to the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.block_scales import EXPONENT_DTYPES, BlockSize
from hermes_async.quantization.column_groups import without_groups_in_order
from hermes_async.quantization.derived import Bfloat16Values
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.mxfp4 import Mxfp4Encoding
from hermes_async.quantization.name_patterns import NamePatterns
from hermes_async.quantization.nvfp4 import nvfp4_matrix
from hermes_async.quantization.packed_integers import SCALE_DTYPES, WORD_BITS, PackedEncoding, check_dtype
from hermes_async.quantization.scaled_numbers import ScaledEncoding
from hermes_async.storage.tensor_spec import TensorSpec

_NVFP4, _MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mxfp8-quantized", _MXFP4, _NVFP4),
)
_STORED = (None, "compressed", "frozen")
"""The values of `quantization_status` of checkpoints whose weights are stored quantized. Older writers say "frozen"."""
_PACKED_BITS = (2, 4, 8)
_REGEX = "re:"
_EXPERTS = ".experts."
_INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
_NUMBERS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, slots=True)
class _Group:
    """How the weights of some modules are quantized.

    Attributes:
        targets: Names of modules, patterns of names ("re:..."), and names of classes.
        block: Rows and columns, of the strategy "block".
    """

    name: str
    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    strategy: str | None
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool


def compressed_tensors_matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> dict[str, StoredMatrix]:
    """The quantized matrices among the tensors of a checkpoint, by the names that their weights have unquantized.

    Raises:
        UnsupportedModelError: The configuration asks for something that is not built.
        CorruptShardError: A matrix lacks a part, or has one of another shape or dtype.
    """
    groups = _groups(_checked(settings, tensors), tensors)
    patterns = NamePatterns(next((spec.file.parent for spec in tensors.values()), None))
    found: dict[str, StoredMatrix] = {}
    for name, spec in tensors.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            found[f"{module}.weight"] = _packed_matrix(module, spec, _group_of(module, spec, groups, patterns), tensors)
        elif name.endswith(".weight") and (f"{name}_scale" in tensors or spec.dtype in _NUMBERS):
            module = name.removesuffix(".weight")
            found[name] = _scaled_matrix(module, spec, _group_of(module, spec, groups, patterns), tensors)
    return without_groups_in_order(found)


# --- the configuration ---


def _checked(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """The settings of the weights, after those that change what a weight is were looked at."""
    inner = settings.get("quantization_config")
    if isinstance(inner, dict):  # as older checkpoints have it, in `compression_config`
        settings = {"sparsity_config": settings.get("sparsity_config"), **inner}
    status = settings.get("quantization_status")
    if status not in _STORED:
        raise _unsupported(
            tensors, f"has the quantization_status {status!r}; only compressed weights can be read in place"
        )
    sparsity = settings.get("sparsity_config")
    sparse_format = sparsity.get("format") if isinstance(sparsity, dict) else None
    if sparse_format not in (None, "dense"):
        raise _unsupported(tensors, f"has weights in the sparse format {sparse_format!r}")
    transform = settings.get("transform_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        raise _unsupported(tensors, "transforms activations (transform_config), which hermes_async does not do")
    return settings


def _groups(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> list[_Group]:
    every = settings.get("config_groups")
    groups = []
    for name, group in (every if isinstance(every, dict) else {}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            if isinstance(group, dict):
                continue  # of activations alone
            raise _unsupported(tensors, f"has a group {name!r} that names a scheme instead of its settings")
        form = group.get("format") or settings.get("format")
        targets = group.get("targets")
        groups.append(
            _Group(
                name=name,
                targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
                format=str(form),
                bits=_whole(weights.get("num_bits", 8)),
                kind=str(weights.get("type", "int")),
                strategy=weights.get("strategy"),
                group_size=_whole(weights.get("group_size")) or None,
                block=_block(weights.get("block_structure")),
                symmetric=bool(weights.get("symmetric", True)),
            )
        )
    return groups


def _whole(value: object) -> int:
    """0 for what is no positive number."""
    return value if isinstance(value, int) and value > 0 else 0


def _block(value: object) -> tuple[int, int] | None:
    if isinstance(value, str):
        value = [int(size) for size in value.split("x") if size.isdecimal()]
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def _unsupported(tensors: Mapping[str, TensorSpec], what: str) -> UnsupportedModelError:
    path = next((spec.file.parent for spec in tensors.values()), None)
    return UnsupportedModelError(
        f"{path}: the checkpoint (compressed-tensors) {what}. Use the model that it was made from, or one that is "
        f"quantized as {', '.join(_FORMATS)}",
        path=path,
    )


def _group_of(module: str, spec: TensorSpec, groups: Sequence[_Group], patterns: NamePatterns) -> _Group:
    """The group of a module, by its name and then by its class; or the only one.

    Raises:
        CorruptShardError: There is none, although the module's weight is quantized.
        UnsupportedModelError: Its format is not read.
    """
    by_target = {target: group for group in groups for target in group.targets}
    in_order = sorted(by_target, key=lambda target: (target.startswith(_REGEX), target))
    of_class = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
    group = next(
        (by_target[target] for target in in_order if _names(target, module, patterns)),
        by_target.get(of_class, groups[0] if len(groups) == 1 else None),
    )
    if group is None:
        raise CorruptShardError(
            f"{spec.file}: tensor {spec.name!r} is quantized, but no group of config.json has {module!r} as a target",
            path=spec.file,
        )
    if group.format not in _FORMATS:
        raise UnsupportedModelError(
            f"{spec.file}: tensor {spec.name!r} is stored as {group.format} (compressed-tensors), which hermes_async "
            f"does not read; it reads {', '.join(_FORMATS)}. Use the model that this one was made from",
            path=spec.file,
        )
    return group


def _names(target: str, module: str, patterns: NamePatterns) -> bool:
    if target.startswith(_REGEX):
        return patterns.match(target.removeprefix(_REGEX), module)
    return target == module


# --- packed weights ---


def _packed_matrix(module: str, packed: TensorSpec, group: _Group, tensors: Mapping[str, TensorSpec]) -> StoredMatrix:
    if group.format in (_NVFP4, _MXFP4):
        return _fp4_matrix(module, packed, group, tensors)
    check_dtype(packed, (torch.int32,), "numbers")
    if group.format != "pack-quantized" or group.kind != "int" or group.bits not in _PACKED_BITS:
        raise UnsupportedModelError(
            f"{packed.file}: tensor {packed.name!r} has {group.bits}-bit {group.kind} numbers ({group.format}); of "
            f"packed weights, hermes_async reads whole numbers of {', '.join(map(str, _PACKED_BITS))} bits",
            path=packed.file,
        )
    parts = {"packed": packed, **dict(_parts(module, packed, group, tensors))}
    check_dtype(parts["scale"], SCALE_DTYPES, "scale")
    scale, zero_point = parts["scale"], parts.get("zero_point")
    if len(packed.shape) not in (2, 3) or len(scale.shape) != len(packed.shape):
        raise _misshapen(scale, packed)
    *stacked, rows, words = packed.shape
    size = group.group_size if group.strategy in ("group", None) else None
    columns = scale.shape[-1] * size if size else words * WORD_BITS // group.bits
    zeros = None
    if zero_point is not None:
        zeros = "packed" if zero_point.dtype == torch.int32 and not group.symmetric else "plain"
    encoding = PackedEncoding(group.bits, size, zeros, "g_idx" in parts)
    return StoredMatrix(encoding, (*stacked, rows, columns), parts)


def _fp4_matrix(module: str, packed: TensorSpec, group: _Group, tensors: Mapping[str, TensorSpec]) -> StoredMatrix:
    parts = dict(_parts(module, packed, group, tensors))
    if group.format == _NVFP4:
        matrix = nvfp4_matrix(packed, parts["scale"], _part(module, "global_scale", packed, tensors), divides=True)
        return replace(matrix, encoding=Bfloat16Values(matrix.encoding))
    for spec in (packed, parts["scale"]):
        check_dtype(spec, EXPONENT_DTYPES, "part")
    if len(packed.shape) not in (2, 3):
        raise _misshapen(packed, packed)
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    return StoredMatrix(Mxfp4Encoding(), shape, {"weight": packed, "scale": parts["scale"]})


def _part(module: str, part: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    name = f"{module}.weight_{part}"
    if name not in tensors:
        raise CorruptShardError(
            f"{spec.file}: tensor {spec.name!r} is quantized, and its {part} ({name!r}) is missing", path=spec.file
        )
    return tensors[name]


def _parts(
    module: str, spec: TensorSpec, group: _Group, tensors: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, TensorSpec]]:
    """The scale of a weight, and what else it has.

    Raises:
        CorruptShardError: It lacks its scale, or its zero point, or one has another dtype.
    """
    for part, needed in (("scale", True), ("zero_point", not group.symmetric), ("g_idx", False)):
        if needed or f"{module}.weight_{part}" in tensors:
            found = _part(module, part, spec, tensors)
            if part != "scale":
                check_dtype(found, _INTEGERS, part)
            yield part, found


# --- a number in each byte ---


def _scaled_matrix(module: str, weight: TensorSpec, group: _Group, tensors: Mapping[str, TensorSpec]) -> StoredMatrix:
    check_dtype(weight, tuple(_NUMBERS), "numbers")
    if group.format == "pack-quantized" or len(weight.shape) not in (2, 3):
        raise _misshapen(weight, weight, f"where {group.name} of config.json is {group.format}")
    parts = {"weight": weight, **dict(_parts(module, weight, group, tensors))}
    if "g_idx" in parts:
        raise _misshapen(parts["g_idx"], weight, "which is not packed, and has no order of columns")
    check_dtype(parts["scale"], SCALE_DTYPES + (EXPONENT_DTYPES if group.format == "mxfp8-quantized" else ()), "scale")
    num_stacked = len(weight.shape) - 2
    parts |= {part: _as_grid(parts[part], num_stacked) for part in ("scale", "zero_point") if part in parts}
    kind = _NUMBERS[weight.dtype]
    encoding = ScaledEncoding(
        kind,
        _block_of(group, parts["scale"].shape[num_stacked:]),
        zero_point="zero_point" in parts,
        # transformers multiplies experts in float32, and all other weights in the dtype of the scale.
        in_scale_dtype=not (kind == "fp8" and _EXPERTS in module),
    )
    return StoredMatrix(encoding, weight.shape, parts)


def _as_grid(spec: TensorSpec, num_stacked: int) -> TensorSpec:
    """With one row and column of blocks for each matrix; there may be just one scale, or one a row."""
    shape = spec.shape
    if len(shape) <= num_stacked or (not num_stacked and shape == (1,)):
        shape = (*shape[:num_stacked], 1, 1)
    elif len(shape) == num_stacked + 1:
        shape = (*shape, 1)
    return replace(spec, shape=shape)


def _block_of(group: _Group, grid: Sequence[int]) -> BlockSize:
    """The rows and columns that share a scale."""
    if group.strategy == "block" and group.block is not None:
        return BlockSize(*group.block)
    if group.strategy in ("group", "tensor_group") or (group.strategy is None and group.group_size):
        return BlockSize(1, group.group_size)
    per_tensor = group.strategy == "tensor" or (group.strategy is None and tuple(grid) == (1, 1))
    return BlockSize(None if per_tensor else 1, None)


def _misshapen(spec: TensorSpec, weight: TensorSpec, why: str = "") -> CorruptShardError:
    return CorruptShardError(
        f"{spec.file}: tensor {spec.name!r} of shape {list(spec.shape)} cannot be a part of the quantized weight "
        f"{weight.name!r} of shape {list(weight.shape)}" + (f", {why}" if why else ""),
        path=spec.file,
    )
