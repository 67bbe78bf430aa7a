"""Which tensor of a checkpoint each parameter of a model is.

Source: `transformers.core_model_loading`, whose renamings and converters are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from hermes_async.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from hermes_async.storage.checkpoint import Checkpoint, TensorSpec


def resolve_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Finds the tensor of every parameter and persistent buffer, by transformers' own renamings.

    Raises:
        UnsupportedModelError: A tensor would have to be converted, not only renamed.
        MissingTensorError: A parameter has no tensor and is not tied to one that has.
        CheckpointError: A tensor has another shape than its parameter.
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, TensorSpec] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        renamed, converted = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, converted = rename_source_key(name, [], [], prefix, expected)
        if renamed not in expected:
            continue
        if converted is None:
            found[renamed] = checkpoint.tensors[name]
            continue
        pieces = _pieces(renamed, checkpoint.tensors[name], converters, converted)
        if not pieces:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name!r} would have to be converted to {renamed!r}; only tensors that are "
                "renamed, or cut along their first dimension, can be used in place",
                path=checkpoint.path,
            )
        found.update(pieces)
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
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
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


def _pieces(renamed: str, spec: TensorSpec, converters: list[WeightConverter], pattern: str) -> dict[str, TensorSpec]:
    """The parameters that lie one after another in a tensor, such as query, key and value; none where it is otherwise.

    Args:
        renamed: The first of them.
        pattern: The source pattern of the converter that the tensor is for.
    """
    converter = next(one for one in converters if pattern in one.source_patterns)
    operation, *others = converter.operations
    targets = converter.target_patterns
    cuts = type(operation) is Chunk and operation.dim == 0 and not others and len(converter.source_patterns) == 1
    plainly = len(targets) > 1 and targets[0] in renamed and not any("\\" in target for target in targets)
    evenly = bool(spec.shape) and spec.shape[0] % len(targets) == 0
    if not (cuts and plainly and evenly):
        return {}
    before, _, behind = renamed.partition(targets[0])
    rows = spec.shape[0] // len(targets)
    return {f"{before}{name}{behind}": spec.rows(rows * idx, rows * (idx + 1)) for idx, name in enumerate(targets)}


def weight_bytes(module_names: Iterable[str], tensors: Mapping[str, TensorSpec]) -> int:
    """Bytes of the tensors of these parameters, shared ones counted once."""
    return sum({(tensors[name].file, tensors[name].offset): tensors[name].nbytes for name in module_names}.values())
