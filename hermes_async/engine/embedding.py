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
from torch import nn

from hermes_async.config import Pooling
from hermes_async.engine.forwarding import Forwarding, ForwardRequest, prepare_forward
from hermes_async.engine.opening import OpenedModel
from hermes_async.errors import CheckpointError, ContextLengthError, RequestError
from hermes_async.modeling.inputs import input_names
from hermes_async.modeling.pooling import PoolingConfig, pool
from hermes_async.pipeload.groups import ungrouped

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


def prepare_embedding(
    opened: OpenedModel, texts: Sequence[str], pooling: Pooling | None, normalize: bool | None, *, truncate: bool
) -> list[TextBatch]:
    """Tokenizes texts and puts those of about one length together; for a worker thread.

    Raises:
        RequestError: Something is no text, or the model does not take texts, or gives no hidden states.
        ContextLengthError: A text is longer than the model's context, and may not be truncated.
        CheckpointError: No pooling is named, and the checkpoint's own is not built.
        MemoryBudgetError: A text's activations would take more than the plan sets aside.
    """
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"texts need a tokenizer: {opened.tokenizer_error}")
    if pooling is not None and pooling not in get_args(Pooling):
        raise RequestError(f"pooling must be one of {', '.join(get_args(Pooling))} or None, not {pooling!r}")
    for idx, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise RequestError(f"text {idx} is {'empty' if text == '' else f'no text but {type(text).__name__}'}")
    chosen = _chosen(opened, pooling)
    if normalize is not None:
        chosen = replace(chosen, normalize=normalize)
    if not texts:
        return []
    context = opened.skeleton.context_length
    encoded = tokenizer(list(texts), truncation=truncate and context is not None, max_length=context, verbose=False)
    lengths = [len(token_ids) for token_ids in encoded["input_ids"]]
    for idx, length in enumerate(lengths):
        if context is not None and length > context:
            raise ContextLengthError(
                f"text {idx} has {length} tokens; the model's context is {context}. Shorten it, or ask for truncation",
                context_length=context,
                num_tokens=length,
            )
    taken = input_names(opened.skeleton.base_model)  # some tokenizers give more
    batches = []
    for indices in _buckets(lengths, opened.plan.max_tokens_per_sweep, mixed=tokenizer.pad_token_id is not None):
        features = [{name: values[idx] for name, values in encoded.items()} for idx in indices]
        if tokenizer.pad_token_id is None:
            inputs = {name: torch.tensor([item[name] for item in features]) for name in features[0]}
        else:
            inputs = dict(tokenizer.pad(features, return_tensors="pt"))
        then = partial(_pool, model=opened.skeleton.model, chosen=chosen, attention_mask=inputs["attention_mask"])
        inputs = {name: inputs[name] for name in inputs if name in taken}
        batches.append(TextBatch(indices, prepare_forward(opened, inputs, then, base=True)))
    return batches


def _chosen(opened: OpenedModel, pooling: Pooling | None) -> PoolingConfig:
    if pooling is not None:
        return PoolingConfig(pooling)
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


def _pool(output: Any, *, model: nn.Module, chosen: PoolingConfig, attention_mask: torch.Tensor) -> torch.Tensor:
    """Hidden states [texts, tokens, hidden] to vectors [texts, out], padding left out."""
    hidden_states = getattr(output, "last_hidden_state", None)
    if hidden_states is None:
        raise RequestError(f"the model gives no hidden states to pool, but a {type(output).__name__}")
    return pool(model, chosen, hidden_states, attention_mask)
