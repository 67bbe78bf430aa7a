"""Turns a user's prompt into token ids, and checks it. Synchronous: texts can be long, so a worker thread calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hermes_async.config import SamplingParams, StructuredOutputs, check_text, format_bytes, format_count
from hermes_async.engine.chat_messages import render
from hermes_async.engine.images import image_parts
from hermes_async.engine.text_length import check_could_fit
from hermes_async.errors import ContextLengthError, MemoryBudgetError, RequestError
from hermes_async.serving.request import EncodedPrompt, PreparedPrompt
from hermes_async.serving.speculation import AcceptanceRates, PromptLookup
from hermes_async.serving.text_stream import TextStream

if TYPE_CHECKING:  # imports torch
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.modeling.sampling import Sampler
    from hermes_async.serving.tokenizer import SharedTokenizer

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages, which may have images."""


def prepare(
    opened: OpenedModel, prompt: EncodedPrompt, params: SamplingParams, *, prompt_lookup: bool, prior: AcceptanceRates
) -> PreparedPrompt:
    """Checks a prompt, and `params`, against the model.

    Args:
        prompt_lookup: Draft tokens from the sequence itself.
        prior: How often the engine's drafts were right so far.

    Raises:
        RequestError: A token id is not in the vocabulary, or a parameter cannot be used with this model.
        ContextLengthError: The prompt fills the whole context, or has the checkpoint's most tokens already.
        MemoryBudgetError: The request needs more KV memory than the plan has for all requests together.
    """
    from hermes_async.engine.encoder_prompt import for_decoder, input_bytes
    from hermes_async.engine.image_prompt import check_images

    if not opened.skeleton.generates:
        name = type(opened.skeleton.model).__name__
        raise RequestError(f"{name} is no causal language model and does not generate; forward and embed run it")
    if opened.skeleton.is_encoder_decoder:
        prompt = for_decoder(opened, prompt)
    else:
        check_images(opened, prompt)
    token_ids, of_input = prompt.token_ids, input_bytes(opened, prompt)
    in_turns = bool(prompt.model_inputs) or not opened.probe.packs
    capacity = _capacity(opened, len(token_ids), params.max_tokens, input_bytes=of_input, in_turns=in_turns)
    sampler, may_stop_after = _sampler(opened, prompt, params, capacity)
    text_stream = None
    if opened.tokenizer is not None:
        text_stream = TextStream(
            opened.tokenizer,
            prompt_ids=token_ids,
            stop=tuple(params.stop),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens or 0,
            may_stop_after=may_stop_after,
        )
    elif params.stop:
        raise RequestError(f"stop texts need a tokenizer: {opened.tokenizer_error}")
    return PreparedPrompt(
        token_ids=token_ids,
        capacity=capacity,
        sampler=sampler,
        text_stream=text_stream,
        lookup=PromptLookup([*prompt.encoder_ids, *token_ids]) if prompt_lookup else None,
        acceptance=AcceptanceRates(prior),
        model_inputs=prompt.model_inputs,
        inputs_digest=prompt.inputs_digest,
        image_end=prompt.image_end,
        in_turns=in_turns,
        encoder_ids=prompt.encoder_ids,
        num_encoder_positions=prompt.num_encoder_positions,
        input_bytes=of_input,
    )


def _sampler(
    opened: OpenedModel, prompt: EncodedPrompt, params: SamplingParams, capacity: int
) -> tuple[Sampler, Callable[[str], bool] | None]:
    """The request's sampler, and for structured answers what says whether a stop text may follow a text."""
    from hermes_async.modeling.sampling import Sampler, end_token_ids
    from hermes_async.modeling.token_rules import TokenRules

    token_ids = prompt.token_ids
    generation, vocab_size = opened.skeleton.generation, opened.skeleton.num_choices
    grammar, may_stop_after = None, None
    asked = params.structured_outputs
    if asked is not None:
        assert isinstance(asked, StructuredOutputs)
        if opened.tokenizer is None:
            raise RequestError(f"structured_outputs needs a tokenizer: {opened.tokenizer_error}")
        grammar = opened.grammars.compile(asked, end_token_ids(params, generation.eos_token_ids, vocab_size))
        may_stop_after = opened.grammars.whole_text(asked) if params.stop else None
    rules = None if prompt.rules is None else prompt.rules(capacity)
    if rules is None and generation.has_token_rules:
        own_minimum = params.min_tokens is not None
        rules = TokenRules(
            generation,
            token_ids,
            max_length=capacity,
            vocab_size=vocab_size,
            own_minimum=own_minimum,
            encoder_ids=prompt.encoder_ids or None,
        )
    sampler = Sampler(
        params,
        token_ids,
        eos_token_ids=generation.eos_token_ids,
        vocab_size=vocab_size,
        grammar=grammar,
        rules=rules,
    )
    return sampler, may_stop_after


def encode(
    opened: OpenedModel,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedPrompt:
    """The prompt's token ids, at least one, and what the model takes beside them.

    Args:
        tools: For the chat template: functions that the model may call.
        chat_template_kwargs: Other variables of the chat template.

    Raises:
        RequestError: The prompt has no tokens or the wrong type, or needs a tokenizer or chat template that the
            checkpoint lacks; or tools or variables are not valid, or the prompt is not chat messages; or an image
            cannot be used, or the model takes none.
        CheckpointError: The checkpoint does not say how images are prepared.
    """
    prompt = _as_list(prompt)
    if not _are_messages(prompt):
        check_no_template_input(tools, chat_template_kwargs)
    if isinstance(prompt, str):
        return EncodedPrompt(_tokenize(opened, prompt, add_special_tokens=True))
    if not prompt:
        raise RequestError("the prompt is empty")
    if _are_messages(prompt):
        if _have_images(prompt):
            from hermes_async.engine.image_prompt import encode_with_images

            return encode_with_images(opened, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
        rendered = _render_chat(opened, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
        return EncodedPrompt(_tokenize(opened, rendered, add_special_tokens=False))
    if (token_ids := _as_token_ids(prompt)) is not None:
        return EncodedPrompt(token_ids)
    raise RequestError("a prompt is text, a sequence of int token ids, or a sequence of chat messages")


def check_no_template_input(
    tools: Sequence[Mapping[str, Any]] | None, chat_template_kwargs: Mapping[str, Any] | None
) -> None:
    """Raises `RequestError` if there is input for a chat template, which a text or token ids do not go through."""
    if tools or chat_template_kwargs:
        name = "tools" if tools else "chat_template_kwargs"
        raise RequestError(f"{name} need a prompt of chat messages; other prompts do not go through a chat template")


def prompt_text(
    opened: OpenedModel,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that a prompt stands for, special tokens included; arguments and errors as those of `encode`."""
    prompt = _as_list(prompt)
    if isinstance(prompt, str):
        return prompt
    if _are_messages(prompt):
        return _render_chat(opened, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
    return detokenize(opened, prompt)  # type: ignore[arg-type]


def tokenize(
    opened: OpenedModel,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_special_tokens: bool = True,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a text, or of chat messages; a text may have none. `Engine.tokenize` documents the arguments.

    Raises:
        RequestError: As `encode`.
        ContextLengthError: The text is far longer than the model's context.
    """
    for name, flag in (("add_special_tokens", add_special_tokens), ("add_generation_prompt", add_generation_prompt)):
        if not isinstance(flag, bool):
            raise RequestError(f"{name} must be True or False, not {flag!r}")
    if isinstance(prompt, str):
        check_no_template_input(tools, chat_template_kwargs)
        return _token_ids_of(opened, prompt, add_special_tokens=add_special_tokens)
    messages = _as_list(prompt)
    if not _are_messages(messages):
        raise RequestError("tokenize takes a text, or chat messages")
    if _have_images(messages):
        from hermes_async.engine.image_prompt import encode_with_images

        return encode_with_images(
            opened,
            messages,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
        ).token_ids
    rendered = _render_chat(
        opened,
        messages,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
        add_generation_prompt=add_generation_prompt,
    )
    return _token_ids_of(opened, rendered, add_special_tokens=False)


def detokenize(opened: OpenedModel, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids.

    Raises:
        RequestError: A token id is not in the vocabulary, or there is no tokenizer.
    """
    if not isinstance(skip_special_tokens, bool):
        raise RequestError(f"skip_special_tokens must be True or False, not {skip_special_tokens!r}")
    tokenizer, checked = _tokenizer_of(opened, token_ids)
    return tokenizer.decode(checked, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def token_strings(opened: OpenedModel, token_ids: Sequence[int]) -> list[str]:
    """The vocabulary's own strings of token ids; "" for a token id that has none.

    Raises:
        RequestError: A token id is not in the vocabulary, or there is no tokenizer.
    """
    tokenizer, checked = _tokenizer_of(opened, token_ids)
    return [string or "" for string in tokenizer.convert_ids_to_tokens(checked)]


def _tokenizer_of(opened: OpenedModel, token_ids: Sequence[int]) -> tuple[SharedTokenizer, list[int]]:
    """The tokenizer, and token ids of its vocabulary."""
    if opened.tokenizer is None:
        raise RequestError(f"to decode token ids, the engine needs a tokenizer: {opened.tokenizer_error}")
    checked = None if isinstance(token_ids, str) else _as_token_ids(_as_list(token_ids))
    if checked is None:
        raise RequestError("token ids are a sequence of int")
    for token_id in checked:
        if not 0 <= token_id < opened.skeleton.vocab_size:
            raise RequestError(f"token id {token_id} is not one of the {opened.skeleton.vocab_size} tokens")
    return opened.tokenizer, checked


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


def _as_list(prompt: Any) -> Any:
    """Arrays and tensors as lists; raises `RequestError` for what is no sequence."""
    if isinstance(prompt, np.ndarray) or hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise RequestError(f"a prompt is text, token ids or chat messages, not {type(prompt).__name__}")
    return prompt


def _are_messages(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and all(isinstance(message, Mapping) for message in prompt)


def _have_images(messages: Sequence[Any]) -> bool:
    return next(image_parts(messages), None) is not None


def _as_token_ids(prompt: Sequence[Any]) -> list[int] | None:
    """The items as ints; None if one is no int."""
    if all(isinstance(token_id, (int, np.integer)) and not isinstance(token_id, bool) for token_id in prompt):
        return [int(token_id) for token_id in prompt]
    return None


def _tokenize(opened: OpenedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    token_ids = _token_ids_of(opened, text, add_special_tokens=add_special_tokens)
    if not token_ids:
        what = "has no tokens" if text else "is empty"
        raise RequestError(f"the prompt {what}, and the tokenizer adds none; give at least one token")
    return token_ids


def _token_ids_of(opened: OpenedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    if opened.tokenizer is None:
        raise RequestError(f"a text prompt needs a tokenizer: {opened.tokenizer_error}")
    check_text("the prompt", text)
    check_could_fit(opened.tokenizer, text, opened.skeleton.context_length)
    token_ids: list[int] = opened.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return token_ids


def _render_chat(opened: OpenedModel, messages: Sequence[Any], **template_input: Any) -> str:
    """Renders messages; `template_input` are the keywords of `render`."""
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"chat messages need a tokenizer: {opened.tokenizer_error}")
    if not has_chat_template(opened):
        raise RequestError("chat messages need a chat template, and the checkpoint's tokenizer has none; give text")
    return render(tokenizer, messages, **template_input)


def _capacity(
    opened: OpenedModel, num_prompt_tokens: int, max_tokens: int | None, *, input_bytes: int, in_turns: bool
) -> int:
    """The most tokens that the request's sequence may have.

    The context limits it. Without `max_tokens`, the checkpoint's own limit and the KV memory limit it too.

    Args:
        input_bytes: What the cache takes for an encoder's input.
    """
    context = opened.skeleton.context_length
    if context is not None and num_prompt_tokens >= context:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens; the model's context is {context}, and one token must be left "
            "to generate",
            context_length=context,
            num_tokens=num_prompt_tokens,
        )
    turns, plan = opened.probe.turns if in_turns else None, opened.plan
    kv = opened.probe.kv if turns is None else turns
    if max_tokens is None:
        affordable = kv.tokens_within(plan.kv_bytes - input_bytes)
        if turns is not None and not turns.traits.keeps:
            affordable = min(affordable, plan.max_prompt_tokens + 1)
        capacity = affordable if context is None else min(context, affordable)
        capacity = max(capacity, num_prompt_tokens + 1)
        limit = opened.skeleton.generation.limit(num_prompt_tokens)
        if limit is not None and num_prompt_tokens >= limit:
            raise ContextLengthError(
                f"the prompt has {num_prompt_tokens} tokens; the checkpoint's generation_config.json has a max_length "
                f"of {limit} for prompt and answer. Give max_tokens",
                context_length=limit,
                num_tokens=num_prompt_tokens,
            )
        capacity = capacity if limit is None else min(capacity, limit)
    else:
        capacity = num_prompt_tokens + max_tokens
        capacity = capacity if context is None else min(context, capacity)
    needed = kv.nbytes(capacity) + input_bytes
    if needed > plan.kv_bytes:
        kv_budget, minimum = opened.budgets_for_kv(needed)
        minimum = max(minimum, plan.memory_budget)
        raise MemoryBudgetError(
            f"{capacity} tokens{' and the input' if input_bytes else ''} need {format_bytes(needed)} of KV memory; the "
            f"plan has "
            f"{format_bytes(plan.kv_bytes)} for KV caches ({kv.tokens_within(plan.kv_bytes)} tokens). Request "
            f"fewer tokens, or give the engine kv_budget={kv_budget} in a memory_budget of {minimum} bytes "
            f"({format_bytes(minimum)}) or more",
            requested_bytes=needed,
            budget_bytes=plan.kv_bytes,
            minimum_bytes=minimum,
        )
    if turns is not None and not turns.traits.chunks:
        _check_one_call(opened, capacity - 1 if not turns.traits.keeps else num_prompt_tokens)
    return capacity


def _check_one_call(opened: OpenedModel, longest: int) -> None:
    """Raises `MemoryBudgetError` if `longest` tokens, which the model computes in one call, do not fit into a sweep."""
    plan = opened.plan
    if longest <= plan.max_prompt_tokens:
        return
    nbytes = opened.bounds.sweep(longest, 1, plan.kv_bytes)
    minimum = plan.memory_budget + max(0, nbytes - plan.workspace_bytes)
    raise MemoryBudgetError(
        f"{format_count(longest, 'token')} may take {format_bytes(nbytes)} of activations, and this architecture "
        f"computes them in one call; the plan has {format_bytes(plan.workspace_bytes)} for "
        f"{format_count(plan.max_prompt_tokens, 'token')}. Request fewer tokens, or open the engine with "
        f"max_tokens_per_sweep={longest} and a memory_budget of about {format_bytes(minimum)}",
        requested_bytes=nbytes,
        budget_bytes=plan.workspace_bytes,
        minimum_bytes=minimum,
    )
