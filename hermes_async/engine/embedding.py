"""Texts to sentence vectors: which texts go into one forward pass."""

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
from hermes_async.engine.encoding import Encoded, count_prompt_tokens, cut, encode_texts, features
from hermes_async.engine.opening import OpenedModel
from hermes_async.engine.text_length import check_could_fit
from hermes_async.errors import CheckpointError, ContextLengthError, RequestError
from hermes_async.foreign_errors import ungrouped
from hermes_async.modeling.inputs import input_names
from hermes_async.modeling.pooling import PoolingConfig, pool
from hermes_async.modeling.sentence import SentenceSettings
from hermes_async.serving.forward import Forwarding, ForwardRequest, prepare_forward
from hermes_async.serving.tokenizer import SharedTokenizer

_SLACK = 1.25  # the longest text of a pass may be so much longer than its shortest


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of about the same length, in one forward pass.

    Attributes:
        indices: Which of the texts they are.
        request: Its result is float32 [texts, out].
    """

    indices: list[int]
    request: ForwardRequest


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """What a user asks for, beside the texts.

    Attributes:
        pooling: None as the checkpoint says.
        normalize: None as the checkpoint says.
        truncate: Cut long texts; None cuts those of a checkpoint with sentence-transformers' files.
        prompt_name: One of the checkpoint's prompts; None is its default.
        prompt: Itself; not together with a name.
        truncate_dim: Cut vectors; None as the checkpoint says.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    truncate: bool | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncate_dim: int | None = None

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            RequestError: Says what and why.
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


def prepare_embedding(opened: OpenedModel, texts: Sequence[str], options: EmbeddingOptions) -> list[TextBatch]:
    """Tokenizes texts and puts those of about one length together; for a worker thread.

    Raises:
        RequestError: Something is no text, or the model does not take texts, or gives no hidden states.
        ContextLengthError: A text is longer than the model's context, and may not be truncated.
        CheckpointError: No pooling is named, and the checkpoint's own is not built; or its settings are not.
        MemoryBudgetError: A text's activations would take more than the plan sets aside.
    """
    tokenizer = opened.sentence_tokenizer
    if tokenizer is None:
        raise RequestError(f"texts need a tokenizer: {opened.tokenizer_error}")
    options.check()
    for idx, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(f"text {idx} is no text but {type(text).__name__}")
    if isinstance(opened.sentences, CheckpointError):
        raise opened.sentences.with_traceback(None)
    chosen = _chosen(opened, options.pooling)
    if options.normalize is False:
        chosen = replace(chosen, normalize=False)
    prompt = opened.sentences.prompt(options.prompt_name) if options.prompt is None else options.prompt
    if not texts:
        return []
    encoded, limit = _encode(opened, tokenizer, [prompt + text for text in texts], options.truncate)
    num_prompt_tokens = 0
    if prompt and not chosen.include_prompt:
        num_prompt_tokens = count_prompt_tokens(tokenizer, prompt, limit)
    lengths = [len(item["input_ids"]) for item in encoded]
    taken = input_names(opened.skeleton.text_encoder)  # some tokenizers give more
    truncate_dim = opened.sentences.truncate_dim if options.truncate_dim is None else options.truncate_dim
    batches = []
    for indices in _buckets(lengths, opened.plan.max_tokens_per_sweep, mixed=tokenizer.pad_token_id is not None):
        several = features([encoded[idx] for idx in indices])
        if tokenizer.pad_token_id is None:
            inputs = {name: torch.tensor([item[name] for item in several]) for name in several[0]}
        else:
            # Padding behind a text changes nothing of it, with positions that are learned too.
            inputs = dict(tokenizer.pad(several, padding_side="right", return_tensors="pt"))
        then = partial(
            _pool,
            model=opened.skeleton.model,
            chosen=chosen,
            attention_mask=inputs["attention_mask"],
            num_prompt_tokens=num_prompt_tokens,
            truncate_dim=truncate_dim,
            normalize=options.normalize is True,
        )
        inputs = {name: inputs[name] for name in inputs if name in taken}
        batches.append(TextBatch(indices, prepare_forward(opened, inputs, then, base=True)))
    return batches


def _encode(
    opened: OpenedModel, tokenizer: SharedTokenizer, texts: Sequence[str], truncate: bool | None
) -> tuple[list[Encoded], int | None]:
    """The texts' tokens, and to how many they were cut."""
    assert isinstance(opened.sentences, SentenceSettings)
    context, limit = opened.skeleton.context_length, opened.sentences.max_tokens
    if limit is None:  # as sentence-transformers chooses it
        positions = getattr(opened.skeleton.model.config, "max_position_embeddings", None)
        limits = [tokenizer.model_max_length, positions if isinstance(positions, int) and positions > 0 else None]
        limit = min((most for most in limits if most is not None), default=None)
    if limit is None or (context is not None and context < limit and truncate is not None):
        limit = context
    cutting = opened.sentences.named if truncate is None else truncate
    most = context if limit is None or (context is not None and context < limit) else limit
    if not cutting:
        for text in texts:
            check_could_fit(tokenizer, text, most)
    encoded = encode_texts(tokenizer, texts)
    if cutting and limit is not None:
        encoded = [cut(tokenizer, item, limit) for item in encoded]
    for idx, item in enumerate(encoded):
        length = len(item["input_ids"])
        if not length:
            raise RequestError(f"text {idx} has no tokens: the tokenizer puts none around it")
        if most is not None and length > most:
            what = "the model's context" if most == context else "the most that the checkpoint takes"
            raise ContextLengthError(
                f"text {idx} has {format_count(length, 'token')}; {what} is {most}. Shorten it, or ask for truncation",
                context_length=most,
                num_tokens=length,
            )
    return encoded, limit if cutting else None


def _chosen(opened: OpenedModel, pooling: Pooling | None) -> PoolingConfig:
    if pooling is not None:
        include_prompt = isinstance(opened.pooling, CheckpointError) or opened.pooling.include_prompt
        return PoolingConfig((pooling,), include_prompt)
    if isinstance(opened.pooling, CheckpointError):
        raise opened.pooling.with_traceback(None)
    return opened.pooling


async def embed_batches(forwarding: Forwarding, batches: Sequence[TextBatch]) -> npt.NDArray[np.float32]:
    """Runs the batches, several in one sweep where there is room; the vectors [texts, out] in the texts' order.

    Raises:
        RequestError, ReadError: As `Forwarding.run`.

    Cancellation: every pass ends before its next stage.
    """
    vectors: dict[int, npt.NDArray[np.float32]] = {}

    async def run(batch: TextBatch) -> None:
        result = await forwarding.run(batch.request)
        vectors.update(zip(batch.indices, result.numpy(), strict=True))

    with ungrouped():
        async with anyio.create_task_group() as group:
            for batch in batches:
                group.start_soon(run, batch)
    return np.array([vectors[idx] for idx in sorted(vectors)], np.float32)


def _buckets(lengths: Sequence[int], most: int, *, mixed: bool) -> Iterator[list[int]]:
    """Indices of texts for one pass each: of about one length, and at most `most` tokens with their padding."""
    bucket: list[int] = []
    for idx in sorted(range(len(lengths)), key=lambda idx: lengths[idx]):
        length = lengths[idx]
        limit = lengths[bucket[0]] * (_SLACK if mixed else 1) if bucket else 0
        if bucket and (length > limit or (len(bucket) + 1) * length > most):
            yield bucket
            bucket = []
        bucket.append(idx)
    if bucket:
        yield bucket


def _pool(
    output: Any,
    *,
    model: nn.Module,
    chosen: PoolingConfig,
    attention_mask: torch.Tensor,
    num_prompt_tokens: int,
    truncate_dim: int | None,
    normalize: bool,
) -> torch.Tensor:
    """Hidden states [texts, tokens, hidden] to vectors [texts, out], padding left out."""
    hidden_states = getattr(output, "last_hidden_state", None)
    if hidden_states is None:
        raise RequestError(f"the model gives no hidden states to pool, but a {type(output).__name__}")
    vectors = pool(model, chosen, hidden_states, attention_mask, num_prompt_tokens)[:, :truncate_dim]
    return F.normalize(vectors, dim=1) if normalize else vectors
