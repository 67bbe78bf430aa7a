"""How a checkpoint makes sentence vectors from hidden states, as sentence-transformers' files say.

Source: `modules.json` and the folders it names, as sentence-transformers writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from hermes_async.storage.file_kinds import is_file
from hermes_async.storage.tensor_spec import TensorSpec

DENSE = "sentence_dense"
"""The name of the module that holds a model's Dense layers; transformers does not know it."""

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
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
    """How vectors are made from hidden states.

    Attributes:
        poolings: The results of several are concatenated.
        include_prompt: Whether a prompt's tokens are pooled too.
        dense: Applied to the pooled vectors, in this order.
        normalize: Whether vectors are scaled to length 1 in the end.
    """

    poolings: tuple[Pooling, ...] = ("mean",)
    include_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    normalize: bool = False


def pooling_config(path: Path, architectures: Sequence[str] = (), *, is_causal: bool = True) -> PoolingConfig:
    """Reads the checkpoint's pooling. The default is the last token of a causal language model, else the mean.

    Args:
        path: Where `modules.json` is.
        architectures: Those that `config.json` names.
        is_causal: False where `config.json` says that tokens attend to later tokens.

    Raises:
        CheckpointError: The files cannot be read, or ask for something that is not supported.
    """
    file = path / "modules.json"
    if not is_file(file):
        last = is_causal and bool(architectures) and architectures[0].endswith("ForCausalLM")
        return PoolingConfig(("last",) if last else ("mean",))
    chosen: PoolingConfig | None = None
    for idx, module in enumerate(read_config(file, list)):
        name = str(module.get("type", "")) if isinstance(module, dict) else "?"
        kind = name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name
        if kind == "Transformer" and idx == 0:
            continue
        if kind == "Pooling" and chosen is None and idx == 1:
            chosen = _pooling(_inside(path, module) / "config.json")
        elif kind == "Dense" and chosen is not None and not chosen.normalize:
            chosen = replace(chosen, dense=(*chosen.dense, _dense(_inside(path, module))))
        elif kind == "Normalize" and chosen is not None:
            config = _inside(path, module) / "config.json"
            _check_names(config, read_config(config, dict) if is_file(config) else {})
            chosen = replace(chosen, normalize=True)
        elif kind != "Dropout" or idx == 0:
            behind = "its beginning" if idx == 0 else "its Transformer"
            if chosen is not None:
                behind = "its Normalize" if chosen.normalize else "its Pooling"
            raise CheckpointError(
                f"{file} has a module of type {kind!r} behind {behind}; sentence-transformers' own Transformer, "
                "Pooling, Dense and Normalize are supported, in this order. Name a pooling to leave them out",
                path=file,
            )
    if chosen is None:
        raise CheckpointError(f"{file} names no Pooling; name one yourself", path=file)
    return chosen


def with_dense(skeleton: Skeleton, config: PoolingConfig) -> Skeleton:
    """Adds the Dense layers to the model. No forward pass calls them, so their weights are resident.

    Raises:
        CheckpointError: The size of a layer's input is not that of the vectors.
    """
    if not config.dense:
        return skeleton
    hidden_size = getattr(skeleton.model.config.get_text_config(), "hidden_size", None)
    hidden_size = None if hidden_size is None else hidden_size * len(config.poolings)
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


def pool(
    model: nn.Module,
    config: PoolingConfig,
    hidden_states: torch.Tensor,
    mask: torch.Tensor,
    num_prompt_tokens: int = 0,
) -> torch.Tensor:
    """Makes vectors, float32 [texts, out], from hidden states [texts, tokens, hidden]. The model's weights are bound.

    Args:
        mask: [texts, tokens]; 0 for padding, which comes after the text.
        num_prompt_tokens: Tokens of the prompt before each text, which are left out unless `include_prompt`.
    """
    hidden_states, mask = hidden_states.float(), mask.clone()
    if not config.include_prompt:
        mask[:, :num_prompt_tokens] = 0
    rows, weights = torch.arange(len(mask)), mask[..., None].float()
    places = torch.arange(1, mask.shape[1] + 1)[None, :, None] * weights

    def total(weights: torch.Tensor) -> torch.Tensor:
        return (hidden_states * weights).sum(1)

    pools: dict[Pooling, Callable[[], torch.Tensor]] = {
        "mean": lambda: total(weights) / weights.sum(1).clamp(min=1e-9),
        "max": lambda: hidden_states.masked_fill(weights == 0, -torch.inf).amax(1),
        "cls": lambda: hidden_states[rows, mask.argmax(1)],
        "last": lambda: (hidden_states * weights)[rows, mask.cumsum(1).argmax(1)],
        "weightedmean": lambda: total(places) / places.sum(1).clamp(min=1e-9),
        "mean_sqrt_len": lambda: total(weights) / weights.sum(1).clamp(min=1e-9).sqrt(),
    }
    vectors = torch.cat([pools[pooling]() for pooling in config.poolings], dim=1)
    if config.dense:
        vectors = model.get_submodule(DENSE)(vectors)
    return F.normalize(vectors, dim=1) if config.normalize else vectors


# Several modes are concatenated in this order.
_MODES: Mapping[str, Pooling] = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "last",
}
_NAMES: Mapping[str, Pooling] = {mode: mode for mode in get_args(Pooling)} | {
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}


def _pooling(file: Path) -> PoolingConfig:
    config = read_config(file, dict)
    named = config.get("pooling_mode")
    unknown = [
        key for key in config if key.startswith("pooling_mode_") and key.removeprefix("pooling_mode_") not in _MODES
    ]
    if named is not None:
        names = [named] if isinstance(named, str) else named
    else:
        names = [_MODES[mode] for mode in _MODES if config.get(f"pooling_mode_{mode}")]
        if not names and ("word_embedding_dimension" in config or "embedding_dimension" in config):
            names = ["mean"]
    if unknown or not isinstance(names, list) or not names or any(name not in _NAMES for name in names):
        asked = ", ".join(unknown) or (" and ".join(map(str, names)) if isinstance(names, list) else repr(names))
        raise CheckpointError(
            f"{file} asks for pooling {asked or 'of no kind'}; {', '.join(get_args(Pooling))} are supported", path=file
        )
    return PoolingConfig(tuple(_NAMES[name] for name in names), bool(config.get("include_prompt", True)))


def _check_names(file: Path, config: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise CheckpointError(
                f"{file} has {key}={config[key]!r}; only 'sentence_embedding' is supported", path=file
            )


def _dense(folder: Path) -> Dense:
    file = folder / "config.json"
    config = read_config(file, dict)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    if not package.startswith("torch.nn") or name not in ACTIVATIONS:
        raise CheckpointError(
            f"{file} asks for the activation {activation!r}; one of {', '.join(ACTIVATIONS)} of torch.nn is supported",
            path=file,
        )
    _check_names(file, config)
    if config.get("use_residual"):
        raise CheckpointError(f"{file} has use_residual, which is not supported", path=file)
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
    return Dense(weight, bias, ACTIVATIONS[name])


def _inside(path: Path, module: Mapping[str, Any]) -> Path:
    folder = str(module.get("path", ""))
    inside = path / folder
    if not inside.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(
            f"{path / 'modules.json'} names {folder!r}, which is outside of the checkpoint", path=path
        )
    return inside
