"""Finds what each parameter of a model is made of in a GGUF file.

llama.cpp's converter gives tensors other names, and changes some: it reorders rows, adds one to norms, stacks experts.
transformers has functions that undo this. Here they are tried on small arrays of running numbers, and the results show
what they do, so that it can be done block by block. What a result does not show is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.foreign_errors import is_foreign, reason_of
from hermes_async.modeling.gguf_api import gguf_conversions, gguf_names, has_conversions
from hermes_async.modeling.transformers_api import operation_of, tensor_renamer
from hermes_async.quantization.derived import ChangedNumbers, OrderedColumns
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import Encoding, PlainEncoding, StoredMatrix, has_compiler
from hermes_async.quantization.gguf_blocks import GGUF_TYPES, GgufEncoding
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.gguf import GgufHeader, block_of
from hermes_async.storage.tensor_spec import TensorSpec

logger = logging.getLogger(__name__)

_Array: TypeAlias = npt.NDArray[Any]

_FEW_COLUMNS = 3
"""Of the arrays that transformers' functions are tried on. Nearly all treat the numbers of a row alike."""
_MOST_NUMBERS = 2**26
"""Of an array with all columns."""
_MAX_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class _Change:
    """A step from a tensor as it is stored to what it is in the model.

    Attributes:
        shape: Of the tensor behind the step.
        apply: Does the step.
    """

    shape: tuple[int, ...]
    apply: Callable[[StoredMatrix], StoredMatrix]


@dataclass(frozen=True, slots=True)
class _Placed:
    """What a tensor of the file is in the model.

    Attributes:
        parameter: Its parameter.
        changes: What is to be done to it, in order.
        part, num_parts: Which of several blocks of the parameter's rows it is, such as gate or up.
    """

    parameter: str
    changes: tuple[_Change, ...] = ()
    part: int = 0
    num_parts: int = 1


def gguf_parameters(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> dict[str, TensorSpec | StoredMatrix | EncodedParameter]:
    """What the parameters of a model are made of, by name. Parameters without a tensor are left out.

    Raises:
        UnsupportedModelError: transformers does not know the tensors of the architecture, or it is not known how a
            tensor becomes a parameter, or a tensor's type cannot be read.
        CheckpointError: Tensors that make up a parameter do not fit together.
    """
    header = checkpoint.gguf
    assert header is not None
    expected = model.state_dict()
    place = _converted(header, model, expected) if has_conversions(header) else _processed(header, model)
    pieces: dict[str, list[tuple[_Placed, StoredMatrix]]] = {}
    unused = []
    for name, spec in checkpoint.tensors.items():
        placed = place(name, _numbers_shape(spec))
        if placed is None or placed.parameter not in expected:
            unused.append(name)
            continue
        matrix = _stored(spec)
        for change in placed.changes:
            matrix = change.apply(matrix)
        pieces.setdefault(placed.parameter, []).append((placed, matrix))
    if unused:
        shown = ", ".join(unused[:_MAX_SHOWN]) + (" and more" if len(unused) > _MAX_SHOWN else "")
        logger.warning("%s: %d tensors have no use in transformers' model: %s", checkpoint.path, len(unused), shown)
    return {name: _parameter(name, several, expected[name]) for name, several in pieces.items()}


# --- a tensor as it is stored ---


def _numbers_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a tensor's numbers."""
    if spec.packed is None:
        return spec.shape
    block, nbytes = block_of(spec.packed)
    return (*spec.shape[:-1], spec.shape[-1] // nbytes * block)


def _stored(spec: TensorSpec) -> StoredMatrix:
    """A tensor as a matrix or a stack of them. One of another form is a matrix whose rows are its last dimension."""
    encoding: Encoding = PlainEncoding()
    if spec.packed is not None:
        if spec.packed not in GGUF_TYPES:
            raise UnsupportedModelError(
                f"{spec.file}: tensor {spec.name!r} is of GGUF's type {spec.packed}, which hermes_async does not read; "
                f"it reads {', '.join(sorted(GGUF_TYPES))}",
                path=spec.file,
            )
        encoding = GgufEncoding(spec.packed)
        if encoding.needs_compiler and not has_compiler():
            raise UnsupportedModelError(
                f"{spec.file}: tensor {spec.name!r} is of GGUF's type {spec.packed}, which needs the package numba; "
                "install it with: pip install 'hermes-async[gguf]'",
                path=spec.file,
            )
    shape = _numbers_shape(spec)
    if len(shape) == 2 or (len(shape) == 3 and shape[1] > 1):
        matrix = StoredMatrix(encoding, shape, {"weight": spec})
    else:
        lines = prod(shape[:-1])
        flat = replace(spec, shape=(lines, spec.shape[-1] if shape else 1))
        matrix = StoredMatrix(encoding, (lines, shape[-1] if shape else 1), {"weight": flat}, reshaped=shape)
    matrix.check()
    return matrix


# --- what is done to it ---


def _reshaped(matrix: StoredMatrix, shape: tuple[int, ...]) -> StoredMatrix:
    return replace(matrix, reshaped=None if shape == matrix.shape else shape)


def _with_rows(matrix: StoredMatrix, order: tuple[int, ...]) -> StoredMatrix:
    if len(matrix.parameter_shape) == 1 and matrix.first.packed is None:  # a vector: its numbers are the rows
        spec = replace(matrix.first, shape=(len(order), 1))
        shape = matrix.parameter_shape
        matrix = replace(matrix, shape=(len(order), 1), parts={"weight": spec}, reshaped=shape)
    if len(matrix.shape) != 2 or matrix.shape[0] != len(order) or matrix.row_order is not None:
        raise _cannot(matrix, "its rows would have to be reordered")
    return replace(matrix, row_order=order)


def _with_columns(matrix: StoredMatrix, order: tuple[int, ...]) -> StoredMatrix:
    return replace(matrix, encoding=OrderedColumns(matrix.encoding, order))


def _with_numbers(matrix: StoredMatrix, how: str) -> StoredMatrix:
    # Small parameters of any shape, so they are computed once, when they are loaded.
    return replace(matrix, encoding=ChangedNumbers(matrix.encoding, how), reshaped=matrix.parameter_shape)


def _transposed(matrix: StoredMatrix) -> StoredMatrix:
    if matrix.reshaped is not None:
        raise _cannot(matrix, "it would have to be transposed")
    return replace(matrix, transposed=not matrix.transposed)


def _cannot(matrix: StoredMatrix, what: str) -> UnsupportedModelError:
    spec = matrix.first
    shape = list(matrix.parameter_shape)
    return UnsupportedModelError(f"{spec.file}: tensor {spec.name!r} of shape {shape}: {what}", path=spec.file)


def _changes(before: _Array, after: _Array, shape: tuple[int, ...]) -> tuple[_Change, ...] | None:
    """What was done to `before`, an array of running numbers; () for nothing, None for something unknown.

    Args:
        shape: Of the tensor that `before` stands for; it may have more columns.
    """
    if after.shape == before.shape:
        if np.array_equal(after, before):
            return ()
        step = _same_shape(before, after)
        return None if step is None else (_Change(shape, step),)
    if before.ndim == 2 and after.shape == before.shape[::-1] and np.array_equal(after, before.T):
        return (_Change(shape[::-1], _transposed),)
    if after.shape[-1:] == before.shape[-1:] and np.array_equal(after.ravel(), before.ravel()):
        new_shape = (*after.shape[:-1], shape[-1])
        return (_Change(new_shape, partial(_reshaped, shape=new_shape)),)
    return None


def _same_shape(before: _Array, after: _Array) -> Callable[[StoredMatrix], StoredMatrix] | None:
    if np.array_equal(after, before - 1):
        return partial(_with_numbers, how="minus one")
    if np.allclose(after, np.log(-before), rtol=1e-6, atol=0):
        return partial(_with_numbers, how="log of the negative")
    if before.ndim > 2:
        return None
    rows = _order(before.reshape(before.shape[0], -1)[:, 0], after.reshape(before.shape[0], -1)[:, 0])
    if rows is not None and np.array_equal(after, before[list(rows)]):
        return partial(_with_rows, order=rows)
    columns = _order(before[0], after[0]) if before.ndim == 2 else None
    if columns is not None and np.array_equal(after, before[:, list(columns)]):
        return partial(_with_columns, order=columns)
    return None


def _order(before: _Array, after: _Array) -> tuple[int, ...] | None:
    """For each number of `after`, where it is in `before`, whose numbers fall."""
    found = np.searchsorted(-before, -after)
    if found.max(initial=0) >= len(before) or not np.array_equal(before[found], after):
        return None
    return tuple(found.tolist())


def _tried(shape: tuple[int, ...], function: Callable[[_Array], Any]) -> tuple[_Array, Any]:
    """A small array of running numbers for a tensor of this shape, and what a function makes of it.

    The array has all columns if the function needs them.
    """
    few = (*shape[:-1], min(shape[-1], _FEW_COLUMNS)) if len(shape) > 1 else shape
    try:
        before = _running(few)
        return before, function(before)
    except (ValueError, IndexError, RuntimeError):
        if few == shape or prod(shape) > _MOST_NUMBERS:
            raise
    before = _running(shape)
    return before, function(before)


def _running(shape: tuple[int, ...]) -> _Array:
    """The numbers -1, -2, and so on, exact in their dtype, and with a logarithm of their negatives."""
    count = prod(shape)
    return np.arange(-1, -count - 1, -1, dtype=np.float32 if count < 2**24 else np.float64).reshape(shape)


def _unknown(header: GgufHeader, name: str, reason: str) -> UnsupportedModelError:
    path = header.files[0]
    return UnsupportedModelError(
        f"{path}: it is not known how tensor {name!r} of GGUF's architecture {header.architecture!r} becomes a "
        f"parameter of transformers' model: {reason}. Use the model's safetensors",
        path=path,
    )


@dataclass(frozen=True, slots=True)
class _Failed:
    """What transformers' function raised."""

    reason: str


def _attempt(shape: tuple[int, ...], function: Callable[[_Array], Any]) -> tuple[_Array, Any]:
    try:
        return _tried(shape, function)
    except BaseException as error:
        if not is_foreign(error):
            raise
        return np.empty(0), _Failed(reason_of(error))


# --- architectures with a class that undoes what the converter did ---


def _processed(header: GgufHeader, model: PreTrainedModel) -> Callable[[str, tuple[int, ...]], _Placed | None]:
    names, process = gguf_names(header, model)
    # Changes that were found, by the tensor's name without its layer's number, and its shape.
    known: dict[tuple[str, tuple[int, ...]], tuple[_Change, ...]] = {}

    def place(name: str, shape: tuple[int, ...]) -> _Placed | None:
        kind = (re.sub(r"\d+", "#", name), shape)
        if name in names and kind in known:
            return _Placed(names[name], known[kind])
        direct: dict[str, Any] = {}

        def function(weights: _Array) -> Any:
            direct.clear()
            return process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": direct})

        before, result = _attempt(shape, function)
        if isinstance(result, _Failed):
            raise _unknown(header, name, result.reason)
        if direct:
            ((parameter, tensor),) = direct.items()
            placed = _part_of(before, tensor.numpy(), shape)
            if len(direct) > 1 or placed is None:
                raise _unknown(header, name, "transformers changes it")
            return replace(placed, parameter=parameter)
        if result.name not in names:
            return None
        changes = _changes(before, np.asarray(result.weights), shape)
        if changes is None:
            raise _unknown(header, name, "transformers changes it")
        if result.name == name:
            known[kind] = changes
        return _Placed(names[result.name], changes)

    return place


def _part_of(before: _Array, after: _Array, shape: tuple[int, ...]) -> _Placed | None:
    """Where the rows of `before` are in `after`, whose other rows are zero."""
    changes = _changes(before, after, shape)
    if changes is not None:
        return _Placed("", changes)
    if before.ndim < 2 or after.ndim != before.ndim or after.shape[-2] % before.shape[-2]:
        return None
    rows = before.shape[-2]
    num_parts = after.shape[-2] // rows
    for part in range(num_parts):
        put = np.zeros_like(after)
        place = put[..., part * rows : (part + 1) * rows, :]
        if place.shape == before.shape:
            place[...] = before
            if np.array_equal(put, after):
                return _Placed("", (), part, num_parts)
    return None


# --- architectures with a table of conversions ---


def _converted(
    header: GgufHeader, model: PreTrainedModel, expected: Mapping[str, Any]
) -> Callable[[str, tuple[int, ...]], _Placed | None]:
    renamings, converters = gguf_conversions(header, model.config)
    rename = tensor_renamer()
    prefix = model.base_model_prefix

    def place(name: str, shape: tuple[int, ...]) -> _Placed | None:
        renamed, pattern = rename(name, renamings, converters, prefix, expected)
        if pattern is None or renamed not in expected:
            return _Placed(renamed)
        converter = next(one for one in converters if pattern in one.source_patterns)
        sources = list(converter.source_patterns)
        changes: list[_Change] = []
        part = 0
        for operation in converter.operations:
            if operation_of(operation)[0].startswith("Concatenate") and operation_of(operation)[1] == len(shape) - 2:
                part = sources.index(pattern)
                continue
            found = _changes_of(operation, pattern, converter, shape)
            if isinstance(found, _Failed):
                raise _unknown(header, name, found.reason)
            changes += found
            for change in found:
                shape = change.shape
        if len(sources) > 1 and not any(operation_of(one)[0].startswith("Concatenate") for one in converter.operations):
            raise _unknown(header, name, "it would have to be joined with others")
        return _Placed(renamed, tuple(changes), part, len(sources))

    return place


def _changes_of(operation: Any, pattern: str, converter: Any, shape: tuple[int, ...]) -> tuple[_Change, ...] | _Failed:
    def function(weights: _Array) -> _Array:
        tensors = {pattern: torch.from_numpy(weights)}
        targets = list(converter.target_patterns)
        (result,) = operation.convert(tensors, source_patterns=[pattern], target_patterns=targets).values()
        return np.asarray(result)

    before, after = _attempt(shape, function)
    if isinstance(after, _Failed):
        return after
    changes = _changes(before, after, shape)
    return _Failed(f"transformers changes it ({operation_of(operation)[0]})") if changes is None else changes


# --- parameters ---


def _parameter(
    name: str, pieces: Sequence[tuple[_Placed, StoredMatrix]], parameter: torch.Tensor
) -> TensorSpec | StoredMatrix | EncodedParameter:
    """One parameter: a tensor as it is, or what it is computed from."""
    in_order = sorted(pieces, key=lambda piece: piece[0].part)
    matrices = [matrix for _, matrix in in_order]
    parts = [placed.part for placed, _ in in_order]
    first = matrices[0].first
    if parts != list(range(in_order[0][0].num_parts)):
        raise CheckpointError(
            f"{first.file}: {name!r} is made of {in_order[0][0].num_parts} tensors, and the file has "
            f"{', '.join(repr(matrix.first.name) for matrix in matrices)}",
            path=first.file,
        )
    if len(matrices) == 1:
        return _simplest(matrices[0], parameter)
    shapes = {matrix.shape for matrix in matrices}
    if len(shapes) > 1 or any(matrix.reshaped is not None or matrix.transposed for matrix in matrices):
        raise CheckpointError(
            f"{first.file}: the tensors that {name!r} is made of do not fit together: "
            + ", ".join(f"{matrix.first.name!r} has shape {list(matrix.parameter_shape)}" for matrix in matrices),
            path=first.file,
        )
    *stacked, rows, columns = matrices[0].shape
    shape = (*stacked, rows * len(matrices), columns)
    every = tuple(_interleaved([matrix.matrices() for matrix in matrices]))
    if all(_is_plain(matrix, parameter) for matrix in every):
        return TensorSpec.joined([matrix.first for matrix in every], shape)
    return EncodedParameter(name, shape, parameter.dtype, every)


def _interleaved(matrices: Sequence[Sequence[StoredMatrix]]) -> Iterator[StoredMatrix]:
    for group in zip(*matrices, strict=True):
        yield from group


def _is_plain(matrix: StoredMatrix, parameter: torch.Tensor) -> bool:
    """Whether the stored bytes are the parameter's. Small ones are cast when they are loaded."""
    as_stored = isinstance(matrix.encoding, PlainEncoding) and matrix.row_order is None and not matrix.transposed
    return as_stored and (matrix.first.dtype == parameter.dtype or parameter.dim() < 2)


def _simplest(matrix: StoredMatrix, parameter: torch.Tensor) -> TensorSpec | StoredMatrix:
    if not _is_plain(matrix, parameter):
        return matrix
    return replace(matrix.first, shape=matrix.parameter_shape)
