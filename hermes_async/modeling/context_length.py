"""The most tokens of a sequence, by a model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_NAMES = (
    *("max_position_embeddings", "seq_length", "max_seq_len", "n_positions"),
    *("max_decoder_position_embeddings", "max_target_positions"),
)


def context_length_of(model: PreTrainedModel) -> int | None:
    """The context length as vLLM computes it, except for what depends on the longest sequence of a row.

    "longrope" and "dynamic" scaling do. Beyond the original context they change the frequencies of all positions, also
    those of other sequences in a packed row and of cached keys.
    """
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = any(isinstance(item, Mapping) for item in rope.values())
    several = [item for item in rope.values() if isinstance(item, Mapping)] if by_layer_type else [rope]
    own = _unscaled_context_length(model)
    limits = [_scaled(item, text, own, by_layer_type=by_layer_type) for item in several]
    if getattr(text, "attention_type", None) == "block_sparse":
        # BigBird attends to all tokens up to this length. Beyond it, a token's attention depends on the whole call.
        limits.append((5 + 2 * text.num_random_blocks) * text.block_size)
    return min((limit for limit in limits if limit is not None), default=own)


def _scaled(rope: Mapping[str, Any], text: PreTrainedConfig, own: int | None, *, by_layer_type: bool) -> int | None:
    """The context length by one set of RoPE parameters; `own` is the configuration's length without them."""
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope.get("rope_type") == "longrope":
        limits = [original, getattr(text, "original_max_position_embeddings", None), own]
        return min((limit for limit in limits if isinstance(limit, int)), default=None)
    if not isinstance(factor, (int, float)):
        return own
    if rope.get("rope_type") == "yarn" and isinstance(original, int):
        return int(original * factor)
    if rope.get("rope_type") == "linear" and own is not None and not by_layer_type:
        # Where layers differ (Gemma 3), `max_position_embeddings` already is the scaled length.
        return int(own * factor)
    return own


def _unscaled_context_length(model: PreTrainedModel) -> int | None:
    text = model.config.get_text_config()
    for name in _NAMES:
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length - _first_position(model)
    return None


def _first_position(model: PreTrainedModel) -> int:
    """The position of the first token: models based on RoBERTa count from the padding token's id."""
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            return positions.padding_idx + 1
    return 0
