"""How a checkpoint makes sentence vectors of hidden states, by sentence-transformers' own files.

Source: `modules.json` and the folders it names, as sentence-transformers writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.config import Pooling
from hermes_async.errors import CheckpointError
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.storage.checkpoint import read_config, read_tensors
from hermes_async.storage.tensor_spec import TensorSpec

DENSE = "sentence_dense"
"""The module of a model that holds its Dense layers, beside what transformers makes."""

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.SiLU)
}


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer behind the pooling.

    Attributes:
        weight: [out, in].
        bias: [out], if there is one.
        activation: A class without parameters.
    """

    weight: TensorSpec
    bias: TensorSpec | None
    activation: type[nn.Module]


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """How vectors are made of hidden states.

    Attributes:
        dense: What the pooled vectors go through.
        normalize: To length 1, last of all.
    """

    pooling: Pooling = "mean"
    dense: tuple[Dense, ...] = ()
    normalize: bool = False


def pooling_config(path: Path) -> PoolingConfig:
    """What the checkpoint says; the mean where it says nothing.

    Raises:
        CheckpointError: The files cannot be read, or ask for what is not built.
    """
    file = path / "modules.json"
    if not file.is_file():
        return PoolingConfig()
    chosen = PoolingConfig()
    for module in read_config(file, list):
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "?"
        if kind == "Pooling":
            chosen = replace(chosen, pooling=_pooling_mode(_inside(path, module) / "config.json"))
        elif kind == "Dense" and not chosen.normalize:
            chosen = replace(chosen, dense=(*chosen.dense, _dense(_inside(path, module))))
        elif kind == "Normalize":
            chosen = replace(chosen, normalize=True)
        elif kind != "Transformer":
            last = "Normalize" if chosen.normalize else "Transformer"
            raise CheckpointError(
                f"{file} has a module of type {kind!r} behind its {last}; Pooling, Dense and Normalize are supported, "
                "in this order. Name a pooling to leave them out",
                path=file,
            )
    return chosen


def with_dense(skeleton: Skeleton, config: PoolingConfig) -> Skeleton:
    """Puts the Dense layers into the model, as a module that no forward pass calls: so their weights always stay.

    Raises:
        CheckpointError: The first does not take the model's hidden states.
    """
    if not config.dense:
        return skeleton
    hidden_size = getattr(skeleton.model.config.get_text_config(), "hidden_size", None)
    layers, tensors = nn.Sequential(), dict(skeleton.tensors)
    for dense in config.dense:
        out_features, in_features = dense.weight.shape
        if hidden_size not in (None, in_features):
            raise CheckpointError(
                f"{dense.weight.file} has a layer for vectors of {in_features}, but gets vectors of {hidden_size}",
                path=dense.weight.file,
            )
        hidden_size = out_features
        tensors[f"{DENSE}.{len(layers)}.weight"] = dense.weight
        if dense.bias is not None:
            tensors[f"{DENSE}.{len(layers)}.bias"] = dense.bias
        layers.append(nn.Linear(in_features, out_features, bias=dense.bias is not None, device="meta"))
        layers.append(dense.activation())
    skeleton.model.add_module(DENSE, layers.eval().requires_grad_(False))
    dtypes = {name: torch.float32 for name in tensors if name not in skeleton.tensors}
    return replace(skeleton, tensors=tensors, dtypes=skeleton.dtypes | dtypes)


def pool(model: nn.Module, config: PoolingConfig, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Vectors, float32 [texts, out], of hidden states [texts, tokens, hidden]; with the model's weights bound.

    Args:
        mask: [texts, tokens]; 0 where there is only padding.
    """
    hidden_states, mask = hidden_states.float(), mask[..., None].float()
    pools: dict[Pooling, Callable[[], torch.Tensor]] = {
        "mean": lambda: (hidden_states * mask).sum(1) / mask.sum(1),
        "max": lambda: hidden_states.masked_fill(mask == 0, -torch.inf).amax(1),
        "cls": lambda: hidden_states[:, 0],
        "last": lambda: hidden_states[torch.arange(len(mask)), mask[..., 0].cumsum(1).argmax(1)],
    }
    vectors = pools[config.pooling]()
    if config.dense:
        vectors = model.get_submodule(DENSE)(vectors)
    return F.normalize(vectors, dim=1) if config.normalize else vectors


def _pooling_mode(file: Path) -> Pooling:
    config = read_config(file, dict)
    modes: dict[str, Pooling] = {mode: mode for mode in get_args(Pooling)}
    modes |= {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "lasttoken": "last"}
    chosen = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    chosen = [name for name in chosen if f"pooling_mode_{name}" in config]
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise CheckpointError(
            f"{file} asks for pooling {' and '.join(chosen) or 'of no kind'}; one of {', '.join(get_args(Pooling))} is "
            "supported",
            path=file,
        )
    return modes[chosen[0]]


def _dense(folder: Path) -> Dense:
    file = folder / "config.json"
    config = read_config(file, dict)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    if not package.startswith("torch.nn") or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{file} asks for the activation {activation!r}; one of {', '.join(_ACTIVATIONS)} of torch.nn is supported",
            path=file,
        )
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise CheckpointError(
                f"{file} has {key}={config[key]!r}; only 'sentence_embedding' is supported", path=file
            )
    tensors = read_tensors(folder)
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or len(weight.shape) != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {name: list(spec.shape) for name, spec in tensors.items()}
        raise CheckpointError(
            f"{folder} must hold linear.weight [out, in] and perhaps linear.bias [out]; it has {shapes}", path=folder
        )
    for spec in (weight, bias):
        if spec is not None and not spec.dtype.is_floating_point:
            raise CheckpointError(f"{spec.file}: {spec.name} is in {spec.dtype}", path=spec.file)
    return Dense(weight, bias, _ACTIVATIONS[name])


def _inside(path: Path, module: Mapping[str, Any]) -> Path:
    folder = str(module.get("path", ""))
    inside = path / folder
    if not inside.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(
            f"{path / 'modules.json'} names {folder!r}, which is outside of the checkpoint", path=path
        )
    return inside
