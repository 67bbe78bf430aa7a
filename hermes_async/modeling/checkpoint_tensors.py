"""Finds the tensor of each parameter of a model: a tensor of the checkpoint, a part of one, or several joined.

Source: `transformers.core_model_loading`; its renamings and converters are used as they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hermes_async.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from hermes_async.modeling.transformers_api import (
    conversion_mapping,
    names_that_may_be_missing,
    operation_of,
    tensor_order,
    tensor_renamer,
)
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.tensor_spec import TensorSpec


def resolve_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Finds the tensor of every parameter and persistent buffer, by transformers' own renamings.

    Where transformers would split a tensor along its first dimension, or join several, the bytes are used in place.

    Raises:
        UnsupportedModelError: A tensor would have to be converted in another way.
        MissingTensorError: A parameter has no tensor, and is not tied to one that has.
        CheckpointError: A tensor's shape is not its parameter's, or tensors to be joined do not fit together.
    """
    expected = model.state_dict()
    renamings, converters = conversion_mapping(model)
    rename = tensor_renamer()
    prefix = model.base_model_prefix
    found: dict[str, TensorSpec] = {}
    # Parameters that are joined: the converter, and the tensors of each of its source patterns.
    to_join: dict[str, tuple[Any, dict[str, list[TensorSpec]]]] = {}
    for name in sorted(checkpoint.tensors, key=tensor_order()):
        renamed, converted = rename(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, converted = rename(name, [], [], prefix, expected)
        if renamed not in expected:
            continue
        _check_dtype(checkpoint.tensors[name], expected[renamed])
        if converted is None:
            found[renamed] = checkpoint.tensors[name]
            continue
        converter = _converter(converters, converted, renamed)
        if pieces := _pieces(renamed, checkpoint.tensors[name], converter):
            found.update(pieces)
        elif _joins(converter):
            _, sources = to_join.setdefault(renamed, (converter, {one: [] for one in converter.source_patterns}))
            sources[converted].append(checkpoint.tensors[name])
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name!r} would have to be converted to {renamed!r}; only tensors that are "
                "renamed, cut along their first dimension, or put one behind the other can be used in place",
                path=checkpoint.path,
            )
    for renamed, (converter, sources) in to_join.items():
        found[renamed] = _joined(renamed, sources, converter)
    for name, spec in found.items():
        shape = tuple(expected[name].shape)
        if spec.shape != shape:
            raise CheckpointError(
                f"{spec.file}: tensor {spec.name!r} has shape {list(spec.shape)}, but {type(model).__name__} with this "
                f"config.json needs {list(shape)} for {name!r}",
                path=spec.file,
            )
    for first, second in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        for target, source in ((first, second), (second, first)):
            if target not in found and source in found:
                found[target] = found[source]
    ignored = [re.compile(pattern) for pattern in names_that_may_be_missing(model)]
    missing = tuple(
        name for name in expected if name not in found and not any(pattern.search(name) for pattern in ignored)
    )
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise MissingTensorError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(expected)} tensors of {type(model).__name__}: {shown}",
            path=checkpoint.path,
            names=missing,
        )
    return found


def _check_dtype(spec: TensorSpec, parameter: torch.Tensor) -> None:
    if spec.packed is None and spec.dtype.is_complex == parameter.dtype.is_complex:
        return
    dtype = spec.packed or str(spec.dtype).removeprefix("torch.")
    raise UnsupportedModelError(
        f"{spec.file}: tensor {spec.name!r} is in {dtype}; fp32, bf16 and fp16 checkpoints are supported",
        path=spec.file,
    )


def _converter(converters: Sequence[Any], pattern: str, renamed: str) -> Any:
    """The converter with this source pattern that makes `renamed`, or several parameters, with `renamed` first."""
    of_pattern = [one for one in converters if pattern in one.source_patterns]
    return next((one for one in of_pattern if one.target_patterns[0] in renamed), of_pattern[0])


def _joins(converter: Any) -> bool:
    """Whether the parameter is just the converter's tensors, one after another in memory."""
    if len(converter.target_patterns) > 1:
        return False
    match [operation_of(operation) for operation in converter.operations]:
        case [("MergeModulelist", 0)]:  # the experts of a layer
            return len(converter.source_patterns) == 1
        case [("MergeModulelist", 0), ("Concatenate", 1)]:  # gate and up of each
            return True
        case [("Concatenate", 0)]:  # several parameters, or the numbered parts of one
            return len(converter.source_patterns) > 1 or "*" in converter.source_patterns[0]
    return False


def _joined(renamed: str, sources: Mapping[str, Sequence[TensorSpec]], converter: Any) -> TensorSpec:
    """The parameter that consists of several tensors, one after another.

    Args:
        sources: The tensors of each source pattern of the converter, all in order.

    Raises:
        CheckpointError: They do not fit together.
    """
    every = list(itertools.chain(*sources.values()))
    first, rest = every[0], every[0].shape[1:]
    stacked = operation_of(converter.operations[0])[0] == "MergeModulelist"
    groups = list(zip(*sources.values(), strict=False)) if stacked else [tuple(every)]
    num_rows = sum(spec.shape[0] for spec in groups[0] if spec.shape) if groups else 0
    specs = list(itertools.chain(*groups))
    fit = all(spec.dtype == first.dtype and spec.shape and spec.shape[1:] == rest for spec in specs)
    alike = all([spec.shape for spec in group] == [spec.shape for spec in groups[0]] for group in groups)
    if not fit or not alike or len(specs) != len(every):
        counts = " and ".join(f"{len(source)} of {pattern!r}" for pattern, source in sources.items())
        raise CheckpointError(
            f"{first.file}: the tensors that {renamed!r} is made of do not fit together: there are {counts}, "
            "and they must be of one dtype and shape",
            path=first.file,
        )
    return TensorSpec.joined(specs, (len(groups), num_rows, *rest) if stacked else (num_rows, *rest))


def _pieces(renamed: str, spec: TensorSpec, converter: Any) -> dict[str, TensorSpec]:
    """The parameters that a tensor consists of, one after another, such as query, key and value; empty if it does not.

    Args:
        renamed: The first of these parameters.
        converter: The one that transformers would use.
    """
    operation, *others = converter.operations
    targets = converter.target_patterns
    cuts = operation_of(operation) == ("Chunk", 0) and not others and len(converter.source_patterns) == 1
    plainly = len(targets) > 1 and targets[0] in renamed and not any("\\" in target for target in targets)
    evenly = bool(spec.shape) and spec.shape[0] % len(targets) == 0
    if not (cuts and plainly and evenly):
        return {}
    before, _, behind = renamed.partition(targets[0])
    rows = spec.shape[0] // len(targets)
    return {f"{before}{name}{behind}": spec.rows(rows * idx, rows * (idx + 1)) for idx, name in enumerate(targets)}


def weight_bytes(module_names: Iterable[str], tensors: Mapping[str, TensorSpec]) -> int:
    """Bytes of the tensors of these parameters; shared tensors count once."""
    return sum({(tensors[name].file, tensors[name].offset): tensors[name].nbytes for name in module_names}.values())
