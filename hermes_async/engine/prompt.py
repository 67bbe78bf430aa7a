"""Turns a user's prompt into token ids, and checks it. Synchronous: texts can be long, so a worker thread calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hermes_async.config import SamplingParams, check_text, format_bytes
from hermes_async.engine.chat_messages import render
from hermes_async.engine.text_length import check_could_fit
from hermes_async.errors import ContextLengthError, MemoryBudgetError, RequestError
from hermes_async.serving.request import PreparedPrompt
from hermes_async.serving.speculation import AcceptanceRates, PromptLookup
from hermes_async.serving.text_stream import TextStream

if TYPE_CHECKING:  # imports torch
    from hermes_async.engine.opening import OpenedModel

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages."""


def prepare(
    opened: OpenedModel, token_ids: list[int], params: SamplingParams, *, prompt_lookup: bool, prior: AcceptanceRates
) -> PreparedPrompt:
    """Checks a prompt, and `params`, against the model.

    Args:
        prompt_lookup: Draft tokens from the sequence itself.
        prior: How often the engine's drafts were right so far.

    Raises:
        RequestError: A token id is not in the vocabulary, or a parameter cannot be used with this model.
        ContextLengthError: The prompt fills the whole context.
        MemoryBudgetError: The request needs more KV memory than the plan has for all requests together.
    """
    if not opened.skeleton.generates:
        name = type(opened.skeleton.model).__name__
        raise RequestError(f"{name} is no causal language model and does not generate; forward and embed run it")
    from hermes_async.modeling.sampling import Sampler

    sampler = Sampler(
        params, token_ids, eos_token_ids=opened.skeleton.eos_token_ids, vocab_size=opened.skeleton.vocab_size
    )
    text_stream = None
    if opened.tokenizer is not None:
        text_stream = TextStream(
            opened.tokenizer,
            prompt_ids=token_ids,
            stop=tuple(params.stop),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
    elif params.stop:
        raise RequestError(f"stop texts need a tokenizer: {opened.tokenizer_error}")
    return PreparedPrompt(
        token_ids=token_ids,
        capacity=_capacity(opened, len(token_ids), params.max_tokens),
        sampler=sampler,
        text_stream=text_stream,
        lookup=PromptLookup(token_ids) if prompt_lookup else None,
        acceptance=AcceptanceRates(prior),
    )


def encode(opened: OpenedModel, prompt: Prompt) -> list[int]:
    """The prompt's token ids, at least one.

    Raises:
        RequestError: The prompt has no tokens or the wrong type, or needs a tokenizer or chat template that the
            checkpoint lacks.
    """
    if isinstance(prompt, str):
        return _tokenize(opened, prompt, add_special_tokens=True)
    if isinstance(prompt, np.ndarray) or hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise RequestError(f"a prompt is text, token ids or chat messages, not {type(prompt).__name__}")
    if not prompt:
        raise RequestError("the prompt is empty")
    if all(isinstance(message, Mapping) for message in prompt):
        return _tokenize(opened, _render_chat(opened, prompt), add_special_tokens=False)
    if all(isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool) for token_id in prompt):
        return [int(token_id) for token_id in prompt]  # type: ignore[arg-type]
    raise RequestError("a prompt is text, a sequence of int token ids, or a sequence of chat messages")


def continue_text(opened: OpenedModel, text: str) -> list[int]:
    """The token ids of a text that continues other tokens, without special tokens.

    Raises:
        RequestError: The text is empty, or there is no tokenizer.
    """
    if not text:
        raise RequestError("the prompt is empty")
    return _tokenize(opened, text, add_special_tokens=False)


def has_chat_template(opened: OpenedModel) -> bool:
    """Whether a prompt can be chat messages."""
    return bool(getattr(opened.tokenizer, "chat_template", None))


def _tokenize(opened: OpenedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    if opened.tokenizer is None:
        raise RequestError(f"a text prompt needs a tokenizer: {opened.tokenizer_error}")
    check_text("the prompt", text)
    check_could_fit(opened.tokenizer, text, opened.skeleton.context_length)
    token_ids: list[int] = opened.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    if not token_ids:
        what = "has no tokens" if text else "is empty"
        raise RequestError(f"the prompt {what}, and the tokenizer adds none; give at least one token")
    return token_ids


def _render_chat(opened: OpenedModel, messages: Sequence[Any]) -> str:
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"chat messages need a tokenizer: {opened.tokenizer_error}")
    if not has_chat_template(opened):
        raise RequestError("chat messages need a chat template, and the checkpoint's tokenizer has none; give text")
    return render(tokenizer, messages)


def _capacity(opened: OpenedModel, num_prompt_tokens: int, max_tokens: int | None) -> int:
    """The most tokens that the request's sequence may have.

    The context limits it. Without `max_tokens`, the KV memory limits it too.
    """
    context = opened.skeleton.context_length
    if context is not None and num_prompt_tokens >= context:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens; the model's context is {context}, and one token must be left "
            "to generate",
            context_length=context,
            num_tokens=num_prompt_tokens,
        )
    kv, plan = opened.probe.kv, opened.plan
    if max_tokens is None:
        from hermes_async.modeling.kv_cache import BLOCK_TOKENS

        affordable = plan.kv_bytes // kv.block_bytes * BLOCK_TOKENS
        capacity = affordable if context is None else min(context, affordable)
        capacity = max(capacity, num_prompt_tokens + 1)
    else:
        capacity = num_prompt_tokens + max_tokens
        capacity = capacity if context is None else min(context, capacity)
    needed = kv.nbytes(capacity)
    if needed > plan.kv_bytes:
        kv_budget, minimum = opened.budgets_for_kv(needed)
        minimum = max(minimum, plan.memory_budget)
        raise MemoryBudgetError(
            f"{capacity} tokens need {format_bytes(needed)} of KV memory; the plan has "
            f"{format_bytes(plan.kv_bytes)} for KV caches ({plan.kv_bytes // kv.bytes_per_token} tokens). Request "
            f"fewer tokens, or give the engine kv_budget={kv_budget} in a memory_budget of {minimum} bytes "
            f"({format_bytes(minimum)}) or more",
            requested_bytes=needed,
            budget_bytes=plan.kv_bytes,
            minimum_bytes=minimum,
        )
    return capacity
