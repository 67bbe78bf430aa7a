"""Which tensors of a checkpoint are quantized: the linear layers within the model's transformer layers."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.checkpoint_tensors import stored_tensors
from hermes_async.modeling.model_config import load_config
from hermes_async.modeling.skeleton import Skeleton, build_skeleton, layers_of
from hermes_async.modeling.transformers_api import conversion_mapping, operation_of
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.file_kinds import exists, is_file
from hermes_async.storage.hub import names_gguf
from hermes_async.storage.quantization_settings import quantization
from hermes_async.storage.tensor_spec import Extent, TensorSpec

_WEIGHT = ".weight"
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """The weight of a linear layer: some rows of a tensor, if this is seen as one matrix.

    Attributes:
        base: The name that it has in the quantized checkpoint, up to and with the dot before "weight".
        first_row: Of the tensor's rows. A tensor [experts, rows, columns] has those of all experts, in order.
    """

    base: str
    first_row: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Targets:
    """What is quantized, and what is not.

    Attributes:
        weights: By the names of the tensors that are quantized, the linear layers that each is the weight of: one, or
            those of all experts.
        ignored: The linear layers that are left as they are, by their names in the model and in the checkpoint.
        dtype: What the model computes in.
        generates: Whether the model is a causal language model.
        context_length: The most tokens of a sequence; None without a limit.
    """

    weights: Mapping[str, tuple[LinearWeight, ...]]
    ignored: tuple[str, ...]
    dtype: torch.dtype
    generates: bool
    context_length: int | None

    def only(self, takes: Callable[[int, int], bool]) -> Targets:
        """The targets of which all matrices have a size that is taken, by their rows and columns."""
        kept = {
            name: weights
            for name, weights in self.weights.items()
            if all(takes(weight.rows, weight.columns) for weight in weights)
        }
        left = {weight.base.removesuffix(".") for name in self.weights.keys() - kept for weight in self.weights[name]}
        return replace(self, weights=kept, ignored=tuple(sorted({*self.ignored, *left})))


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint whose weights have few bits already.

    Raises:
        UnsupportedModelError: It was quantized, or its weights are not in safetensors.
    """
    found = quantization(checkpoint.path, checkpoint.config)
    others = {spec.file.suffix for spec in checkpoint.tensors.values()} - {".safetensors"}
    if found is None and not others:
        return
    method = found[0] if found is not None else others.pop().removeprefix(".").upper()
    raise UnsupportedModelError(_already(checkpoint.path, method), path=checkpoint.path)


def _already(path: Path, method: str) -> str:
    return (
        f"{path} is quantized already ({method}); quantizing it again would add to its loss. Give the model that it "
        "was made from: safetensors in fp32, bf16 or fp16"
    )


def check_no_gguf(source: str | os.PathLike[str]) -> None:
    """Refuses a GGUF file, whose weights have few bits already, or may have.

    Raises:
        UnsupportedModelError: It is one, here or on the hub.
    """
    path = Path(source)
    if (path.suffix == ".gguf" and is_file(path)) or (not exists(path) and names_gguf(os.fspath(source))):
        raise UnsupportedModelError(_already(path, "GGUF"), path=path)


def find_targets(checkpoint: Checkpoint) -> Targets:
    """Finds the linear layers by the structure of transformers' model, which is built without weights.

    Norms, embeddings, the output head, convolutions, routers of experts, and modules for images and audio are left as
    they are, and so is what transformers keeps in float32.

    Raises:
        UnsupportedModelError: transformers does not know the model, it is quantized already, or has no linear layers.
        CheckpointError: As `build_skeleton`.
    """
    check_not_quantized(checkpoint)
    skeleton = build_skeleton(checkpoint, load_config(checkpoint), stored_tensors(checkpoint), None)
    wanted = set(_wanted(skeleton))
    users = _users(checkpoint.tensors, skeleton.tensors)
    cuts = _cuts(skeleton.model)
    weights: dict[str, tuple[LinearWeight, ...]] = {}
    for name, spec in checkpoint.tensors.items():
        if spec.dtype in _DTYPES and users[name] and users[name] <= wanted:
            found = _linear_weights_in(name, spec.shape, cuts)
            if found:
                weights[name] = found
    if not weights:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {type(skeleton.model).__name__} has no linear layers (nn.Linear) in its transformer "
            "layers, so there is nothing to quantize",
            path=checkpoint.path,
        )
    quantized = {parameter for name in weights for parameter in users[name]}
    # Other engines take all other linear layers for quantized. Tensors may have other names than the parameters.
    linear = {name for name in (*_linear_parameters(skeleton.model), *wanted) if name not in quantized}
    left = (name for name, parameters in users.items() if parameters and parameters <= linear)
    ignored = {name.rpartition(".")[0] for name in (*linear, *left)}
    return Targets(
        weights=weights,
        ignored=tuple(sorted(ignored)),
        dtype=skeleton.dtype,
        generates=skeleton.generates and not skeleton.is_encoder_decoder,
        context_length=skeleton.context_length,
    )


def _wanted(skeleton: Skeleton) -> Iterator[str]:
    """The parameters that are weights of linear layers, or of those of all experts of a layer."""
    model = skeleton.model
    within = {module for part in _text_parts(model) for layer in layers_of(part) for module in layer.modules()}
    head = _head(model)
    for name, module in model.named_modules():
        if module not in within or module is head or _is_router(name):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            linear = type(module) is nn.Linear and own == "weight"
            if (linear or parameter.dim() == 3) and skeleton.dtypes.get(full) == skeleton.dtype:
                yield full


def _cuts(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """How the weights of all experts of a layer are cut into those of each, by the end of their name.

    A tensor "experts.gate_up_proj" [experts, rows, columns] becomes "experts.0.gate_proj.weight",
    "experts.0.up_proj.weight", "experts.1.gate_proj.weight" and so on: the names from which transformers joins it.
    """
    cuts = {}
    for converter in conversion_mapping(model)[1]:
        operations = [operation_of(operation) for operation in converter.operations]
        if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            sources = tuple(converter.source_patterns)
            if len(converter.target_patterns) == 1 and all(one.endswith(_WEIGHT) and "*" in one for one in sources):
                cuts[converter.target_patterns[0]] = sources
    return cuts


def _linear_weights_in(
    name: str, shape: tuple[int, ...], cuts: Mapping[str, tuple[str, ...]]
) -> tuple[LinearWeight, ...]:
    """The linear layers that a tensor has the weights of; empty if it is none of the forms that are known."""
    if len(shape) == 2 and name.endswith(_WEIGHT):
        return (LinearWeight(name.removesuffix("weight"), 0, *shape),)
    end = next((one for one in cuts if name.endswith(one)), None)
    if len(shape) != 3 or end is None or shape[1] % len(cuts[end]):
        return ()
    num_experts, all_rows, columns = shape
    rows = all_rows // len(cuts[end])
    return tuple(
        LinearWeight(
            name.removesuffix(end) + source.replace("*", str(expert)).removesuffix("weight"),
            expert * all_rows + idx * rows,
            rows,
            columns,
        )
        for expert in range(num_experts)
        for idx, source in enumerate(cuts[end])
    )


def _linear_parameters(model: PreTrainedModel) -> Iterator[str]:
    """The weights that other engines may take for those of linear layers."""
    head = _head(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or module is head or (_is_router(name) and not list(module.children())):
            yield f"{name}{_WEIGHT}"


def _text_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules for text of a model that also takes images or audio; the whole model otherwise."""
    text = model.config.get_text_config()
    if text is model.config:
        return [model]
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type == text.model_type
    ]


def _head(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _is_router(name: str) -> bool:
    """Whether a module chooses experts. Such a module is small, and an error in it sends tokens to other experts."""
    return name.rpartition(".")[2] in _ROUTERS or ".router." in name


def _users(tensors: Mapping[str, TensorSpec], parameters: Mapping[str, TensorSpec]) -> dict[str, set[str]]:
    """The parameters that each tensor of a checkpoint is a part of. A tensor of several parameters has all of them."""
    by_file: dict[Path, list[TensorSpec]] = defaultdict(list)
    for spec in tensors.values():
        by_file[spec.file].append(spec)
    starts = {file: [spec.offset for spec in specs] for file, specs in by_file.items()}
    users: dict[str, set[str]] = defaultdict(set)
    for name, parameter in parameters.items():
        for extent in _extents(parameter):
            specs = by_file[extent.file]
            idx = max(0, bisect_right(starts[extent.file], extent.offset) - 1)
            while idx < len(specs) and specs[idx].offset < extent.offset + extent.nbytes:
                if specs[idx].offset + specs[idx].nbytes > extent.offset:
                    users[specs[idx].name].add(name)
                idx += 1
    return users


def _extents(spec: TensorSpec) -> Iterable[Extent]:
    return spec.pieces or (Extent(spec.file, spec.offset, spec.nbytes),)
