"""Makes a prompt into the input of an encoder, and into what its decoder begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hermes_async.config import format_bytes, format_count
from hermes_async.errors import CheckpointError, ContextLengthError, MemoryBudgetError, RequestError
from hermes_async.modeling.encoder_inputs import takes_audio
from hermes_async.serving.request import EncodedPrompt

if TYPE_CHECKING:
    from hermes_async.engine.opening import OpenedModel


def for_decoder(opened: OpenedModel, prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt as an encoder-decoder takes it. Its tokens become the encoder's input, unless it has one already.

    Raises:
        RequestError: The model takes audio, and the prompt is text; or a token is not in the vocabulary.
        ContextLengthError: The encoder has fewer positions.
        MemoryBudgetError: A sweep has no room for the input.
        CheckpointError: The checkpoint does not say what the decoder begins with.
    """
    skeleton = opened.skeleton
    name = type(skeleton.model).__name__
    if not prompt.num_encoder_positions:
        if takes_audio(skeleton.model):
            raise RequestError(f"{name} takes audio, not text; transcribe runs it")
        prompt = _with_encoder_ids(opened, prompt.token_ids)
    num_positions, most = prompt.num_encoder_positions, opened.plan.max_prompt_tokens
    num_tokens = num_positions + len(prompt.token_ids)
    if num_tokens > most:
        activations = opened.bounds.sweep(num_tokens, 1, opened.plan.kv_bytes)
        minimum = opened.plan.memory_budget + max(0, activations - opened.plan.workspace_bytes)
        raise MemoryBudgetError(
            f"the prompt has {format_count(num_positions, 'token')}; an encoder computes them in one sweep, whose "
            f"activations may take {format_bytes(activations)}. The plan has "
            f"{format_bytes(opened.plan.workspace_bytes)} for sweeps of {most} tokens. Shorten the prompt, or open the "
            f"engine with max_tokens_per_sweep={num_tokens} and a memory_budget of about {format_bytes(minimum)}",
            requested_bytes=activations,
            budget_bytes=opened.plan.workspace_bytes,
            minimum_bytes=minimum,
        )
    return prompt


def input_bytes(opened: OpenedModel, prompt: EncodedPrompt) -> int:
    """What the cache takes for the encoder's input; 0 where there is none."""
    layout = opened.probe.turns
    return 0 if layout is None else layout.input_token_bytes * prompt.num_encoder_positions


def _with_encoder_ids(opened: OpenedModel, token_ids: list[int]) -> EncodedPrompt:
    skeleton = opened.skeleton
    start, context = skeleton.generation.decoder_start_token_id, skeleton.input_length
    if start is None:
        raise CheckpointError(
            f"{opened.checkpoint.path}: neither generation_config.json nor config.json has a decoder_start_token_id or "
            "a bos_token_id",
            path=opened.checkpoint.path,
        )
    for token_id in token_ids:
        if not 0 <= token_id < skeleton.vocab_size:
            raise RequestError(f"token id {token_id} is not one of the {skeleton.vocab_size} tokens")
    if context is not None and len(token_ids) > context:
        raise ContextLengthError(
            f"the prompt has {format_count(len(token_ids), 'token')}; the encoder takes at most {context}. Shorten it",
            context_length=context,
            num_tokens=len(token_ids),
        )
    return EncodedPrompt(
        [start],
        model_inputs={"input_ids": torch.tensor([token_ids], dtype=torch.long)},
        encoder_ids=tuple(token_ids),
        num_encoder_positions=len(token_ids),
    )
