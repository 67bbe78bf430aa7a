"""The inputs of a model's own `forward`: checks them, makes tensors of them, and counts their tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hermes_async.errors import ContextLengthError, RequestError
from hermes_async.modeling.skeleton import Skeleton, num_choices, token_embedding
from hermes_async.modeling.transformers_api import KV_CACHE_ARGUMENTS

if TYPE_CHECKING:
    from hermes_async.modeling.probe import Probe

# Arguments that transformers accepts for every model, whether its forward names them or not.
_OF_ALL = frozenset({"output_attentions", "output_hidden_states", "return_dict"})
_FLAGS = _OF_ALL | {"interpolate_pos_encoding", "output_router_logits", "return_loss"}
_NOT_HERE = KV_CACHE_ARGUMENTS | {"use_cache", "cache_position", "encoder_outputs"}


def example_inputs(model: PreTrainedModel, num_tokens: int = 2) -> dict[str, torch.Tensor]:
    """Inputs to try a model with: some tokens, one image, or both."""
    config = model.config
    composite = hasattr(config, "text_config") and hasattr(config, "vision_config")
    inputs: dict[str, torch.Tensor] = {}
    if composite or model.main_input_name == "pixel_values":
        vision = config.vision_config if composite else config
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width, dtype=model.dtype)
    if composite or model.main_input_name == "input_ids":
        embedding = token_embedding(model)
        vocab_size = 1 if embedding is None else embedding.num_embeddings
        inputs["input_ids"] = torch.arange(num_tokens).flip(0)[None] % vocab_size  # unlike positions
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def example_token_ids(model: PreTrainedModel) -> list[int]:
    """Distinct token ids that show how a model maps ids to the rows of its embeddings.

    They are on both sides of the end of each table. They descend, as positions never do. Of an encoder-decoder, they
    are tokens of both sides.
    """
    embedding = token_embedding(model)
    assert embedding is not None
    num_rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    token_ids = {0, 1, *num_rows, *(rows - 1 for rows in num_rows)}
    most = embedding.num_embeddings
    if model.config.is_encoder_decoder:
        most = min(most, num_choices(model))
    return sorted((token_id for token_id in token_ids if token_id < most), reverse=True)


def input_names(model: PreTrainedModel) -> list[str]:
    """The names of the inputs that the model's forward takes, without KV caches."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [item.name for item in parameters if item.kind is not item.VAR_KEYWORD and item.name not in _NOT_HERE]


def num_values(inputs: Mapping[str, Any]) -> int:
    """How many numbers were made of images: pixels, or patches of them. Activations grow with it."""
    tensors = (value for value in inputs.values() if isinstance(value, torch.Tensor))
    return sum(value.numel() for value in tensors if value.is_floating_point())


def checked_inputs(skeleton: Skeleton, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments for a call of the model: tensors instead of arrays and lists, floats in the model's dtype.

    Args:
        model: The skeleton's model, or the part of it that is called.

    Raises:
        RequestError: The model's forward does not take an input, an input cannot be made into a tensor, or a token id
            is out of the vocabulary.
        ContextLengthError: More tokens than the model has positions.
    """
    name, taken = type(model).__name__, input_names(model)
    if not inputs:
        raise RequestError(f"{name}.forward needs inputs; it takes {', '.join(taken)}")
    checked: dict[str, Any] = {}
    for key, value in inputs.items():
        if key == "use_cache" and value in (None, False) and isinstance(value, (bool, type(None))):
            continue
        if key == "encoder_outputs":
            raise RequestError("forward runs the encoder itself, and takes no encoder_outputs; give its inputs")
        if key in _NOT_HERE:
            raise RequestError(f"forward keeps no KV cache, and takes no {key}; generate does")
        if key not in taken and not _passed_on(model, key):
            raise RequestError(f"{name}.forward takes no {key!r}; it takes {', '.join(taken)}")
        if value is None:
            continue
        checked[key] = _checked(key, value, model.dtype)
    if not checked:
        raise RequestError(f"{name}.forward needs inputs; it takes {', '.join(taken)}")
    for key in embedded_inputs(skeleton, checked):
        _check_token_ids(skeleton, key, checked[key])
    if "use_cache" in inspect.signature(model.forward).parameters:
        checked["use_cache"] = False
    return checked


def _passed_on(model: PreTrainedModel, key: str) -> bool:
    """Whether the model's forward takes the input by `**kwargs`, and transformers or a part of the model uses it."""
    parameters = inspect.signature(model.forward).parameters
    if key in _OF_ALL:
        return True
    if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return False
    if key == "num_items_in_batch":
        return "labels" in parameters
    return key in _FLAGS and any(key in inspect.signature(module.forward).parameters for module in model.modules())


def _checked(key: str, value: Any, dtype: torch.dtype) -> Any:
    """Flags and numbers stay what they are, as a tensor of a number means something else; all others become tensors."""
    if key in _FLAGS:
        if not isinstance(value, (bool, int, np.bool_)):
            raise RequestError(f"{key} must be True or False, not {type(value).__name__}")
        return bool(value)
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else _tensor(key, value, dtype)


def _tensor(key: str, value: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(value, (str, bytes, Mapping)):
        raise RequestError(f"{key} must be a tensor, an array or numbers in lists, not {type(value).__name__}")
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"{key} cannot be made into a tensor: {error}") from error
    if tensor.device.type != "cpu":
        raise RequestError(f"{key} is on {tensor.device}; inputs must be in the CPU's memory")
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_token_ids(skeleton: Skeleton, key: str, input_ids: Any) -> None:
    if skeleton.embedding is None:
        return
    if not isinstance(input_ids, torch.Tensor):
        raise RequestError(f"{key} must be integers [batch, tokens], not {input_ids!r}")
    if input_ids.is_floating_point() or input_ids.dim() != 2 or not input_ids.numel():
        raise RequestError(f"{key} must be integers [batch, tokens], not {input_ids.dtype} {list(input_ids.shape)}")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= skeleton.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"token id {wrong} is out of the vocabulary, which has {skeleton.vocab_size}")
    context, num_tokens = skeleton.context_length, input_ids.shape[1]
    if context is not None and num_tokens > context:
        raise ContextLengthError(
            f"{num_tokens} tokens are more than the model's context of {context}; truncate the text",
            context_length=context,
            num_tokens=num_tokens,
        )


def embedded_inputs(skeleton: Skeleton, inputs: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that the model looks up in its input embedding."""
    return [name for name in skeleton.token_inputs if inputs.get(name) is not None]


def embedded_token_ids(skeleton: Skeleton, inputs: Mapping[str, Any]) -> list[int]:
    """The distinct token ids that the model looks up, sorted.

    A decoder behind an encoder may get the labels, or the encoder's input, behind a token of the configuration.
    """
    embedded = [inputs[key].flatten() for key in embedded_inputs(skeleton, inputs)]
    config = skeleton.model.config
    if config.is_encoder_decoder and embedded:
        labels = inputs.get("labels")
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            embedded.append(labels[labels >= 0])
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
        own = [getattr(config, name, None) for name in names]
        embedded.append(torch.tensor([one for one in own if isinstance(one, int) and one >= 0], dtype=torch.long))
    return torch.unique(torch.cat(embedded)).tolist() if embedded else []


def count_tokens(inputs: Mapping[str, Any], probe: Probe) -> tuple[int, int]:
    """The number of sequences or images, and the tokens of the longest."""
    sequences, tokens = 1, 1
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        if key == "pixel_values":
            images = value.shape[0]
            pixels = math.prod(value.shape[-2:])
            sequences = max(sequences, images)
            tokens = max(tokens, -(-probe.tokens_per_image * pixels // max(1, probe.pixels_per_image)))
        elif key.endswith(("input_ids", "inputs_embeds")) or key in ("encoder_hidden_states", "labels"):
            sequences, tokens = max(sequences, value.shape[0]), max(tokens, value.shape[1])
    return sequences, tokens
