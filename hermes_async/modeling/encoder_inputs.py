"""The inputs of an encoder-decoder's encoder: token ids, or the features of audio of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

FEATURES = "input_features"

PROMPT_OF_AUDIO = 8
"""Every sweep of a model that takes audio has room for a piece of audio and so many tokens."""


def takes_audio(model: PreTrainedModel) -> bool:
    """Whether the encoder's input is the features of audio, as Whisper's."""
    return bool(model.main_input_name == FEATURES)


def positions_of_audio(model: PreTrainedModel) -> int:
    """The positions that audio becomes in the encoder, whatever its length is; 0 where the input is tokens."""
    return int(model.config.max_source_positions) if takes_audio(model) else 0


def example_encoder_inputs(
    model: PreTrainedModel, token_ids: Sequence[int], *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs to try an encoder with; empty for a model without one.

    Args:
        token_ids: The tokens, where the encoder takes tokens.
        seed: Of the features, where it takes audio.
    """
    if not model.config.is_encoder_decoder:
        return {}
    if not takes_audio(model):
        return {"input_ids": torch.tensor([list(token_ids)], dtype=torch.long)}
    # Convolutions halve the length of the features.
    shape = (1, int(model.config.num_mel_bins), 2 * positions_of_audio(model))
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {FEATURES: features.to(model.dtype)}
