"""Texts to sentence vectors: how a checkpoint pools its tokens, and which texts go into one forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import anyio
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from hermes_async.engine.forwarding import Forwarding, ForwardRequest, prepare_forward
from hermes_async.engine.opening import OpenedModel
from hermes_async.errors import CheckpointError, ContextLengthError, RequestError
from hermes_async.modeling.inputs import input_names
from hermes_async.pipeload.groups import ungrouped

Pooling = Literal["mean", "cls", "max", "last"]
"""What is made of a text's tokens: their mean or maximum, or the first or last one alone."""

_SLACK = 1.25  # the longest text of a pass may be so much longer than its shortest


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """How vectors are made of hidden states.

    Attributes:
        normalize: To length 1.
    """

    pooling: Pooling
    normalize: bool


def pooling_config(path: Path) -> PoolingConfig:
    """What the checkpoint says, in sentence-transformers' own files; the mean where it says nothing.

    Raises:
        CheckpointError: The files cannot be read, or ask for what is not built.
    """
    file = path / "modules.json"
    if not file.is_file():
        return PoolingConfig("mean", normalize=False)
    pooling: Pooling = "mean"
    normalize = False
    for module in _json(file, list):
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "?"
        if kind == "Pooling":
            pooling = _pooling_mode(_inside(path, str(module.get("path", ""))) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise CheckpointError(
                f"{file} has a module of type {kind!r} behind its Transformer; Pooling and Normalize are supported. "
                "Name a pooling to leave it out",
                path=file,
            )
    return PoolingConfig(pooling, normalize)


def _pooling_mode(file: Path) -> Pooling:
    config = _json(file, dict)
    names: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "lasttoken": "last"}
    chosen = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    chosen = [name for name in chosen if f"pooling_mode_{name}" in config]
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    known = [names.get(name, name) for name in chosen]
    if len(known) != 1 or known[0] not in get_args(Pooling):
        raise CheckpointError(
            f"{file} asks for pooling {' and '.join(chosen) or 'of no kind'}; one of {', '.join(get_args(Pooling))} is "
            "supported",
            path=file,
        )
    mode: Pooling = known[0]
    return mode


def _inside(path: Path, folder: str) -> Path:
    inside = path / folder
    if not inside.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(
            f"{path / 'modules.json'} names {folder!r}, which is outside of the checkpoint", path=path
        )
    return inside


def _json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", path=file) from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{file} does not hold a JSON {kind.__name__}", path=file)
    return value


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of about the same length, in one forward pass.

    Attributes:
        indices: Which of the texts they are.
        request: Its result is float32 [texts, hidden].
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
        CheckpointError: As `pooling_config`.
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
    own = PoolingConfig("mean", normalize=False) if pooling is not None else pooling_config(opened.checkpoint.path)
    chosen = PoolingConfig(pooling or own.pooling, own.normalize if normalize is None else normalize)
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
        then = partial(_pool, chosen=chosen, attention_mask=inputs["attention_mask"])
        inputs = {name: inputs[name] for name in inputs if name in taken}
        batches.append(TextBatch(indices, prepare_forward(opened, inputs, then, base=True)))
    return batches


async def embed_batches(forwarding: Forwarding, batches: Sequence[TextBatch]) -> npt.NDArray[np.float32]:
    """Runs the batches, several in one sweep where there is room; the vectors [texts, hidden] in the texts' order.

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


def _pool(output: Any, *, chosen: PoolingConfig, attention_mask: torch.Tensor) -> torch.Tensor:
    """Hidden states [texts, tokens, hidden] to vectors [texts, hidden], padding left out."""
    hidden_states = getattr(output, "last_hidden_state", None)
    if hidden_states is None:
        raise RequestError(f"the model gives no hidden states to pool, but a {type(output).__name__}")
    hidden_states = hidden_states.float()
    mask = attention_mask[..., None].float()
    pools: dict[Pooling, Callable[[], torch.Tensor]] = {
        "mean": lambda: (hidden_states * mask).sum(1) / mask.sum(1),
        "max": lambda: hidden_states.masked_fill(mask == 0, -torch.inf).amax(1),
        "cls": lambda: hidden_states[:, 0],
        "last": lambda: hidden_states[torch.arange(len(mask)), mask[..., 0].cumsum(1).argmax(1)],
    }
    vectors = pools[chosen.pooling]()
    return F.normalize(vectors, dim=1) if chosen.normalize else vectors
