"""Finds the tensor of each parameter of a model: a tensor of the checkpoint, a part of one, or several joined.

Source: `transformers.core_model_loading`; its renamings and converters are used as they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hermes_async.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from hermes_async.modeling.gguf_tensors import gguf_parameters
from hermes_async.modeling.transformers_api import (
    conversion_mapping,
    names_that_may_be_missing,
    operation_of,
    tensor_order,
    tensor_renamer,
)
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.quantization_settings import quantization
from hermes_async.storage.tensor_spec import TensorSpec

Stored: TypeAlias = TensorSpec | StoredMatrix
"""A tensor that is used as it is stored, or a matrix that is not."""
_Found: TypeAlias = Stored | EncodedParameter


@dataclass(frozen=True, slots=True)
class ResolvedTensors:
    """What the parameters and persistent buffers of a model are read from.

    Attributes:
        plain: The tensor of each parameter that is used as it is stored, by the parameter's name; tied names included.
        encoded: The parameters that are computed from stored tensors, by name; tied names included.
    """

    plain: dict[str, TensorSpec]
    encoded: dict[str, EncodedParameter]

    @property
    def all(self) -> dict[str, TensorSpec]:
        """Every stored tensor: plain ones by their parameter's name, others by a name that begins with it."""
        return self.plain | {name: spec for one in self.encoded.values() for name, spec in one.specs()}


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of a checkpoint, and its quantized matrices by the names that their weights have unquantized.

    Raises:
        UnsupportedModelError: It was quantized in a way that is not known.
        CorruptShardError: A quantized matrix lacks a part, or has one of another shape.
    """
    found = quantization(checkpoint.path, checkpoint.config)
    if found is None:
        return dict(checkpoint.tensors)
    method, settings = found
    matrices = quantized_matrices(checkpoint.path, method, settings, checkpoint.tensors)
    parts = {spec.name for matrix in matrices.values() for spec in matrix.parts.values()}
    return {name: spec for name, spec in checkpoint.tensors.items() if name not in parts} | matrices


def resolve_tensors(model: PreTrainedModel, checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> ResolvedTensors:
    """Finds the tensor of every parameter and persistent buffer, by transformers' own renamings.

    Where transformers would split a tensor along its first dimension, or join several, the bytes are used in place.

    Args:
        stored: See `stored_tensors`.

    Raises:
        UnsupportedModelError: A tensor would have to be converted in another way.
        MissingTensorError: A parameter has no tensor, and is not tied to one that has.
        CheckpointError: A tensor's shape is not its parameter's, or tensors to be joined do not fit together.
    """
    expected = model.state_dict()
    found: dict[str, _Found] = {}
    found |= gguf_parameters(model, checkpoint) if checkpoint.gguf is not None else _renamed(model, checkpoint, stored)
    for name, resolved in found.items():
        if isinstance(resolved, StoredMatrix) and resolved.as_linear:
            found[name] = resolved = _oriented(model, name, resolved)
        _check_shape(model, name, resolved, tuple(expected[name].shape))
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
    plain, encoded = {}, {}
    for name, one in found.items():
        if isinstance(one, TensorSpec):
            plain[name] = one
        else:
            encoded[name] = _encoded(name, one, expected[name])
    return ResolvedTensors(plain, encoded)


def _renamed(model: PreTrainedModel, checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> dict[str, _Found]:
    """What is stored for each parameter, by the parameter's name."""
    expected = model.state_dict()
    renamings, converters = conversion_mapping(model)
    rename = tensor_renamer()
    prefix = model.base_model_prefix
    found: dict[str, _Found] = {}
    # Parameters that are joined: the converter, and the tensors of each of its source patterns.
    to_join: dict[str, tuple[Any, dict[str, list[Stored]]]] = {}
    for name in sorted(stored, key=tensor_order()):
        renamed, converted = rename(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, converted = rename(name, [], [], prefix, expected)
        if renamed not in expected:
            continue
        one = stored[name]
        if isinstance(one, TensorSpec):
            _check_dtype(one, expected[renamed])
        if converted is None:
            found[renamed] = one
            continue
        converter = _converter(converters, converted, renamed)
        if pieces := _pieces(renamed, one, converter):
            found.update(pieces)
        elif _joins(converter):
            _, sources = to_join.setdefault(renamed, (converter, {one: [] for one in converter.source_patterns}))
            sources[converted].append(one)
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name!r} would have to be converted to {renamed!r}; only tensors that are "
                "renamed, cut along their first dimension, or put one behind the other can be used in place",
                path=checkpoint.path,
            )
    for renamed, (converter, sources) in to_join.items():
        _check_all_there(renamed, sources, converter, expected[renamed])
        found[renamed] = _joined(renamed, sources, converter)
    return found


def _oriented(model: PreTrainedModel, name: str, matrix: StoredMatrix) -> StoredMatrix:
    """The matrix of an `nn.Linear`, as the module that has the parameter needs it."""
    module = model.get_submodule(name.rpartition(".")[0])
    return replace(matrix, transposed=True) if isinstance(module, Conv1D) else matrix


def _encoded(name: str, one: StoredMatrix | EncodedParameter, parameter: torch.Tensor) -> EncodedParameter:
    """The parameter `name`, of matrices. One that is no matrix, such as a norm, is dequantized when it is loaded."""
    if isinstance(one, EncodedParameter):
        return replace(one, name=name, dtype=parameter.dtype)
    shape = tuple(parameter.shape)
    whole = one.reshaped is not None or len(shape) not in (2, 3)
    return EncodedParameter(name, shape, parameter.dtype, tuple(one.matrices()), whole)


def _check_shape(model: PreTrainedModel, name: str, one: _Found, expected: tuple[int, ...]) -> None:
    shape, first = _shape_of(one), _first_of(one)
    if shape != expected:
        raise CheckpointError(
            f"{first.file}: tensor {first.name!r} has shape {list(shape)}, but {type(model).__name__} with this "
            f"configuration needs {list(expected)} for {name!r}",
            path=first.file,
        )


def _check_dtype(spec: TensorSpec, parameter: torch.Tensor) -> None:
    if spec.packed is None and spec.dtype.is_complex == parameter.dtype.is_complex:
        return
    raise UnsupportedModelError(
        f"{spec.file}: tensor {spec.name!r} is in {spec.dtype_name}; fp32, bf16 and fp16 checkpoints are supported",
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


def _joined(renamed: str, sources: Mapping[str, Sequence[Stored]], converter: Any) -> TensorSpec | EncodedParameter:
    """The parameter that consists of several tensors, one after another.

    Args:
        sources: The tensors of each source pattern of the converter, all in order.

    Raises:
        CheckpointError: They do not fit together.
    """
    every = list(itertools.chain(*sources.values()))
    stacked = operation_of(converter.operations[0])[0] == "MergeModulelist"
    groups = list(zip(*sources.values(), strict=False)) if stacked else [tuple(every)]
    in_order = list(itertools.chain(*groups))
    shapes = [[_shape_of(one) for one in group] for group in groups]
    fit = bool(shapes) and all(shape and shape[1:] == shapes[0][0][1:] for group in shapes for shape in group)
    specs = [one for one in in_order if isinstance(one, TensorSpec)]
    plain = len(specs) == len(in_order)
    fit = fit and (not plain or all(spec.dtype == specs[0].dtype for spec in specs))
    if not fit or any(group != shapes[0] for group in shapes) or len(in_order) != len(every):
        counts = " and ".join(f"{len(source)} of {pattern!r}" for pattern, source in sources.items())
        odd = _odd_one(list(sources.values()))
        raise CheckpointError(
            f"{odd.file}: the tensors that {renamed!r} is made of do not fit together: there are {counts}, "
            f"and they must be of one dtype and shape; {odd.name!r} is {odd.dtype_name} of shape {list(odd.shape)}",
            path=odd.file,
        )
    num_rows = sum(shape[0] for shape in shapes[0])
    shape = (len(groups), num_rows, *shapes[0][0][1:]) if stacked else (num_rows, *shapes[0][0][1:])
    if plain:
        return TensorSpec.joined(specs, shape)
    matrices = tuple(one if isinstance(one, StoredMatrix) else StoredMatrix.plain(one) for one in in_order)
    return EncodedParameter(renamed, shape, torch.float32, matrices)


def _check_all_there(
    renamed: str, sources: Mapping[str, Sequence[Stored]], converter: Any, parameter: torch.Tensor
) -> None:
    """Of experts that are stored one by one.

    Raises:
        MissingTensorError: One of them is missing.
    """
    if operation_of(converter.operations[0])[0] != "MergeModulelist":
        return
    for pattern, source in sources.items():
        number = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
        numbers = {int(match[1]) for one in source if (match := number.search(_first_of(one).name))}
        missing = [idx for idx in range(len(parameter)) if idx not in numbers]
        if missing and len(source) < len(parameter) and numbers:
            names = tuple(pattern.replace("*", str(idx)) for idx in missing)
            file = _first_of(source[0]).file
            raise MissingTensorError(
                f"{file}: {renamed!r} is made of {len(parameter)} tensors, and {names[0]!r} is in no file"
                + (f", nor are {len(names) - 1} others" if names[1:] else ""),
                path=file,
                names=names,
            )


def _odd_one(sources: Sequence[Sequence[Stored]]) -> TensorSpec:
    """Of tensors that do not fit together, one that differs from most of its kind, if there is one."""
    for source in sources:
        kinds = [(_shape_of(one), _first_of(one).dtype) for one in source]
        for one, kind in zip(source, kinds, strict=True):
            if kinds.count(kind) * 2 < len(kinds):
                return _first_of(one)
    return _first_of(next(one for source in sources for one in source))


def _shape_of(one: _Found) -> tuple[int, ...]:
    return one.parameter_shape if isinstance(one, StoredMatrix) else one.shape


def _first_of(one: _Found) -> TensorSpec:
    """The stored tensor that messages name."""
    if isinstance(one, EncodedParameter):
        one = one.matrices[0]
    return one.first if isinstance(one, StoredMatrix) else one


def _pieces(renamed: str, one: Stored, converter: Any) -> dict[str, Stored]:
    """The parameters that a tensor consists of, one after another, such as query, key and value; empty if it does not.

    Args:
        renamed: The first of these parameters.
        converter: The one that transformers would use.
    """
    operation, *others = converter.operations
    targets, shape = converter.target_patterns, _shape_of(one)
    cuts = operation_of(operation) == ("Chunk", 0) and not others and len(converter.source_patterns) == 1
    plainly = len(targets) > 1 and targets[0] in renamed and not any("\\" in target for target in targets)
    evenly = bool(shape) and shape[0] % len(targets) == 0
    if not (cuts and plainly and evenly):
        return {}
    rows = shape[0] // len(targets)
    if isinstance(one, StoredMatrix) and not one.can_give_rows(rows):
        return {}
    before, _, behind = renamed.partition(targets[0])
    return {f"{before}{name}{behind}": one.rows(rows * idx, rows * (idx + 1)) for idx, name in enumerate(targets)}


def weight_bytes(module_names: Iterable[str], tensors: Mapping[str, TensorSpec]) -> int:
    """Bytes of the tensors of these parameters; shared tensors count once."""
    return sum({(tensors[name].file, tensors[name].offset): tensors[name].nbytes for name in module_names}.values())
