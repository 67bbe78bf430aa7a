"""What `generate` of transformers does around each call of the model: a part of `transformers_api.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hermes_async.modeling.transformers_api import ENCODER_OUTPUTS, needs


def new_generation_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, model_inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """What `generate` has before the first call of the model.

    Args:
        input_ids: [1, tokens] int64, the whole prompt or its first part. Of an encoder-decoder, its decoder's tokens.
        model_inputs: Further inputs of the model, such as pixel values. Of an encoder-decoder, those of its encoder,
            which runs here.

    Returns:
        The inputs that are carried from call to call, with an empty cache, and the positions of the tokens,
        [..., tokens]; None where the model takes none.
    """
    state: dict[str, Any] = {**model_inputs, "use_cache": True}
    if model.config.is_encoder_decoder:
        state = {ENCODER_OUTPUTS: model.get_encoder()(**model_inputs, return_dict=True), "use_cache": True}
    with needs("preparation of a cache for generation"):
        greedy = import_module("transformers.generation.utils").GenerationMode.GREEDY_SEARCH
        settings: Any = GenerationConfig(use_cache=True)  # type: ignore[no-untyped-call]
        generating: Any = model
        generating._prepare_cache_for_generation(settings, state, greedy, 1, input_ids.shape[1])
        positions = None
        if not model.config.is_encoder_decoder and "position_ids" in _forward_arguments(model):
            positions = generating._prepare_position_ids_for_generation(input_ids, state)
    return state, positions


def prepare_generation_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, state: Mapping[str, Any], *, past: int
) -> dict[str, Any]:
    """The arguments of one call of the model.

    Args:
        input_ids: [1, tokens] int64, the sequence up to the last token of this call.
        past: Tokens of it that the cache holds.
    """
    num_new = input_ids.shape[1] - past
    generating: Any = model
    inputs: dict[str, Any] = generating.prepare_inputs_for_generation(
        input_ids, next_sequence_length=num_new if past else None, is_first_iteration=past == 0, **state
    )
    return inputs


def cache_of_output(model: PreTrainedModel, output: Any) -> dict[str, Any]:
    """The cache in a model's output, by the name of the argument that takes it in the next call."""
    with needs("update of the inputs for generation"):
        generating: Any = model
        kept: dict[str, Any] = generating._update_model_kwargs_for_generation(
            output, {}, is_encoder_decoder=model.config.is_encoder_decoder
        )
    return kept


def generated_logits(
    model: PreTrainedModel, prompt: Sequence[int], num_steps: int, encoder_inputs: Mapping[str, Any]
) -> tuple[list[int], torch.Tensor]:
    """Lets `generate` choose greedily, whatever the model's generation settings are.

    Args:
        prompt: Of an encoder-decoder, what its decoder begins with.
        encoder_inputs: Of its encoder; empty for other models.

    Returns:
        The prompt and all tokens but the last, and the logits [num_steps, vocab] from the prompt's last token on.
    """
    settings: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        use_cache=True,
        max_new_tokens=num_steps,
        eos_token_id=None,
        pad_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    generating: Any = model
    generate: Any = generating.generate
    given: dict[str, Any] = {"inputs": torch.tensor([prompt])}
    if model.config.is_encoder_decoder:
        # Not the model's own method: Whisper's divides the audio and joins the texts.
        generate = partial(GenerationMixin.generate, generating)
        given = {**encoder_inputs, "decoder_input_ids": torch.tensor([prompt])}
        settings.decoder_start_token_id = prompt[0]
    own, generating.generation_config = generating.generation_config, settings
    try:
        output = generate(generation_config=settings, **given)
    finally:
        generating.generation_config = own
    return output.sequences[0, :-1].tolist(), torch.cat(output.logits)


def _forward_arguments(model: PreTrainedModel) -> Collection[str]:
    return _arguments_of(getattr(model.forward, "__func__", model.forward))


@cache
def _arguments_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
