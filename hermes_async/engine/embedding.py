"""Turns texts into sentence vectors: tokenizes them, groups them into forward passes, and pools the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import anyio
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.config import Pooling, format_count
from hermes_async.engine.encoding import Encoded, count_prompt_tokens, encode_texts, model_inputs, truncated
from hermes_async.engine.opening import OpenedModel
from hermes_async.engine.text_length import check_could_fit
from hermes_async.errors import CheckpointError, ContextLengthError, RequestError
from hermes_async.foreign_errors import ungrouped
from hermes_async.modeling.inputs import input_names
from hermes_async.modeling.pooling import PoolingConfig, pool
from hermes_async.modeling.sentence import SentenceSettings
from hermes_async.serving.forward_passes import prepare_forward
from hermes_async.serving.jobs import ForwardJob
from hermes_async.serving.loop import ServingLoop
from hermes_async.serving.tokenizer import SharedTokenizer

_MAX_LENGTH_RATIO = 1.25  # of the longest text of a batch to its shortest


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of about the same length, in one forward pass.

    Attributes:
        indices: The texts' indices.
        lengths: Their numbers of tokens.
        job: Its result is a float32 tensor: a row for each text.
    """

    indices: list[int]
    lengths: list[int]
    job: ForwardJob


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """The options of `Engine.embed`.

    Attributes:
        pooling: None takes the checkpoint's.
        normalize: None takes the checkpoint's setting.
        truncate: Truncates long texts. None truncates them if the checkpoint has sentence-transformers' files.
        prompt_name: One of the checkpoint's prompts; None takes its default.
        prompt: A prompt's text, instead of `prompt_name`.
        truncate_dim: The length of the vectors; None takes the checkpoint's.
        dimensions: As `truncate_dim`, but only where the checkpoint allows it, and for vectors of length 1.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    truncate: bool | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncate_dim: int | None = None
    dimensions: int | None = None

    def check(self) -> None:
        """Checks the options.

        Raises:
            RequestError: An option cannot be used.
        """
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            raise RequestError(f"pooling must be one of {', '.join(get_args(Pooling))} or None, not {self.pooling!r}")
        if self.truncate_dim is not None and (type(self.truncate_dim) is not int or self.truncate_dim < 1):
            raise RequestError(f"truncate_dim must be a whole number above 0 or None, not {self.truncate_dim!r}")
        for name, value in (("prompt", self.prompt), ("prompt_name", self.prompt_name)):
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{name} must be a text or None, not {type(value).__name__}")
        if self.prompt is not None and self.prompt_name is not None:
            raise RequestError("give a prompt or a prompt_name, not both")


@dataclass(frozen=True, slots=True)
class _TokenLimit:
    """How many tokens a text may have.

    Attributes:
        max_tokens: A text with more is refused; None sets no limit.
        truncate_to: A text with more is truncated; None does not truncate.
        source: What sets `max_tokens`, for messages.
    """

    max_tokens: int | None
    truncate_to: int | None
    source: str


def prepare_embedding(
    opened: OpenedModel, texts: Sequence[str] | Sequence[Sequence[int]], options: EmbeddingOptions
) -> list[TextBatch]:
    """Tokenizes texts, and puts texts of about the same length into one batch; for a worker thread.

    Args:
        texts: Texts, or token ids.

    Raises:
        RequestError: An item is no text, or the model takes no texts or gives no hidden states.
        ContextLengthError: A text is too long, and may not be truncated.
        CheckpointError: The checkpoint's pooling or sentence settings cannot be used.
        MemoryBudgetError: A text's activations would take more memory than the plan has for them.
    """
    tokenizer = opened.sentence_tokenizer
    if tokenizer is None:
        raise RequestError(f"texts need a tokenizer: {opened.tokenizer_error}")
    options.check()
    token_ids = _as_token_ids(texts)
    if isinstance(opened.sentences, CheckpointError):
        raise opened.sentences.with_traceback(None)
    pooling = _pooling_config(opened, options)
    prompt = opened.sentences.prompt(options.prompt_name) if options.prompt is None else options.prompt
    shortens = options.dimensions is not None and _shortens(opened, opened.sentences, pooling, options.dimensions)
    if not texts:
        return []
    limit = _token_limit(opened, opened.sentences, tokenizer, options.truncate)
    if token_ids is None:
        encoded = _encode(tokenizer, [f"{prompt}{text}" for text in texts], limit)
    else:
        prompt, encoded = "", [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in token_ids]
        _check_lengths(encoded, limit)
    pool_output = partial(
        _pool,
        model=opened.skeleton.model,
        pooling=pooling,
        num_prompt_tokens=(
            count_prompt_tokens(tokenizer, prompt, limit.truncate_to) if prompt and not pooling.include_prompt else 0
        ),
        truncate_dim=options.dimensions or options.truncate_dim or opened.sentences.truncate_dim,
        normalize=options.normalize is True or shortens,
    )
    names = input_names(opened.skeleton.text_encoder)
    batches = []
    lengths = [len(item["input_ids"]) for item in encoded]
    can_pad = tokenizer.pad_token_id is not None
    for indices in length_groups(lengths, opened.plan.max_tokens_per_sweep, can_pad=can_pad):
        inputs = batch_inputs(tokenizer, [encoded[idx] for idx in indices])
        then = partial(pool_output, attention_mask=inputs["attention_mask"])
        inputs = {name: inputs[name] for name in inputs if name in names}  # some tokenizers give more
        job = prepare_forward(opened, inputs, then, base=True)
        batches.append(TextBatch(indices, [lengths[idx] for idx in indices], job))
    return batches


def _pooling_config(opened: OpenedModel, options: EmbeddingOptions) -> PoolingConfig:
    own = opened.pooling
    if options.pooling is not None:
        pooling = PoolingConfig((options.pooling,), isinstance(own, CheckpointError) or own.include_prompt)
    elif isinstance(own, CheckpointError):
        raise own.with_traceback(None)
    else:
        pooling = own
    return replace(pooling, normalize=False) if options.normalize is False else pooling


def _token_limit(
    opened: OpenedModel, settings: SentenceSettings, tokenizer: SharedTokenizer, truncate: bool | None
) -> _TokenLimit:
    context, limit = opened.skeleton.context_length, settings.max_tokens
    if limit is None:  # as sentence-transformers chooses it
        positions = getattr(opened.skeleton.model.config, "max_position_embeddings", None)
        limits = [tokenizer.model_max_length, positions if isinstance(positions, int) and positions > 0 else None]
        limit = min((most for most in limits if most is not None), default=None)
    if limit is None or (context is not None and context < limit and truncate is not None):
        limit = context
    max_tokens = context if limit is None or (context is not None and context < limit) else limit
    source = "the model's context" if max_tokens == context else "the most that the checkpoint takes"
    truncates = settings.named if truncate is None else truncate
    return _TokenLimit(max_tokens, limit if truncates else None, source)


def _encode(tokenizer: SharedTokenizer, texts: Sequence[str], limit: _TokenLimit) -> list[Encoded]:
    if limit.truncate_to is None:
        for text in texts:
            check_could_fit(tokenizer, text, limit.max_tokens)
    encoded = encode_texts(tokenizer, texts)
    if limit.truncate_to is not None:
        encoded = [truncated(tokenizer, item, limit.truncate_to) for item in encoded]
    _check_lengths(encoded, limit)
    return encoded


def _check_lengths(encoded: Sequence[Encoded], limit: _TokenLimit) -> None:
    for idx, item in enumerate(encoded):
        length = len(item["input_ids"])
        if not length:
            raise RequestError(f"text {idx} has no tokens: the tokenizer puts none around it")
        if limit.max_tokens is not None and length > limit.max_tokens:
            raise ContextLengthError(
                f"text {idx} has {format_count(length, 'token')}; {limit.source} is {limit.max_tokens}. Shorten it, or "
                "ask for truncation",
                context_length=limit.max_tokens,
                num_tokens=length,
            )


def _as_token_ids(texts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]] | None:
    """The token ids; None for texts."""
    kind = str if not texts or isinstance(texts[0], str) else list
    for idx, text in enumerate(texts):
        if not isinstance(text, kind):
            raise RequestError(f"text {idx} is no {'text' if kind is str else 'list'} but {type(text).__name__}")
        if kind is list and not all(type(token_id) is int for token_id in text):
            raise RequestError(f"text {idx} is a list, but not of token ids")
    return None if kind is str else [list(text) for text in texts]  # type: ignore[arg-type]


def _shortens(opened: OpenedModel, settings: SentenceSettings, pooling: PoolingConfig, dimensions: int) -> bool:
    """Whether vectors of `dimensions` numbers are shorter than the checkpoint's own.

    Raises:
        RequestError: The checkpoint does not say that its vectors may have this length.
    """
    config = opened.skeleton.model.config
    hidden_size = getattr(config.get_text_config(), "hidden_size", None)
    whole = None if hidden_size is None else int(hidden_size) * len(pooling.poolings)
    whole = int(pooling.dense[-1].weight.shape[0]) if pooling.dense else whole
    own = settings.truncate_dim or whole
    if dimensions == own:
        return False
    trained = getattr(config, "matryoshka_dimensions", None)
    if isinstance(trained, Sequence) and trained:
        allowed, what = dimensions in trained, f"one of {', '.join(map(str, trained))}"
    else:
        shortened = settings.truncate_dim is not None or getattr(config, "is_matryoshka", None) is True
        allowed = shortened and own is not None and 1 <= dimensions < own
        what = (
            f"at most {own}" if shortened else "left out: the checkpoint does not say that shorter vectors are useful"
        )
    if not allowed:
        raise RequestError(f"dimensions must be {what}, not {dimensions}")
    return True


def batch_inputs(tokenizer: SharedTokenizer, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Tensors [texts, tokens] by name. Texts of different length are padded."""
    inputs = [model_inputs(item) for item in encoded]
    if tokenizer.pad_token_id is None:
        return {name: torch.tensor([item[name] for item in inputs]) for name in inputs[0]}
    # Padding on the right changes nothing before it, even with learned positions.
    return dict(tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))


async def embed_batches(serving: ServingLoop, batches: Sequence[TextBatch]) -> npt.NDArray[np.float32]:
    """Runs the batches, several in one sweep if memory allows; returns vectors [texts, out] in the order of the texts.

    Raises:
        RequestError, ReadError: As `ServingLoop.forward`.

    Cancellation: all passes end before their next stage.
    """
    vectors: dict[int, npt.NDArray[np.float32]] = {}

    async def run(batch: TextBatch) -> None:
        result = await serving.forward(batch.job)
        vectors.update(zip(batch.indices, result.numpy(), strict=True))

    with ungrouped():
        async with anyio.create_task_group() as group:
            for batch in batches:
                group.start_soon(run, batch)
    return np.array([vectors[idx] for idx in sorted(vectors)], np.float32)


def length_groups(lengths: Sequence[int], max_tokens: int, *, can_pad: bool) -> Iterator[list[int]]:
    """Indices of texts for one pass each: of similar length, or equal length without padding.

    Each group has at most `max_tokens`, including padding. A longer text is a group of its own.
    """
    group: list[int] = []
    for idx in sorted(range(len(lengths)), key=lambda idx: lengths[idx]):
        length = lengths[idx]
        longest = lengths[group[0]] * (_MAX_LENGTH_RATIO if can_pad else 1) if group else 0
        if group and (length > longest or (len(group) + 1) * length > max_tokens):
            yield group
            group = []
        group.append(idx)
    if group:
        yield group


def _pool(
    output: Any,
    *,
    model: nn.Module,
    pooling: PoolingConfig,
    attention_mask: torch.Tensor,
    num_prompt_tokens: int,
    truncate_dim: int | None,
    normalize: bool,
) -> torch.Tensor:
    """Pools hidden states [texts, tokens, hidden] to vectors [texts, out], without padding."""
    hidden_states = getattr(output, "last_hidden_state", None)
    if hidden_states is None:
        raise RequestError(f"the model gives no hidden states to pool, but a {type(output).__name__}")
    vectors = pool(model, pooling, hidden_states, attention_mask, num_prompt_tokens)[:, :truncate_dim]
    return F.normalize(vectors, dim=1) if normalize else vectors
