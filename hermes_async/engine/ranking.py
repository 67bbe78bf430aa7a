"""Turns a query and documents into forward passes of a cross-encoder, and their results into a ranking."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hermes_async.engine.embedding import TextBatch, batch_inputs, length_groups
from hermes_async.engine.encoding import count_text_tokens, encode_pair, encode_texts, truncated
from hermes_async.engine.opening import OpenedModel
from hermes_async.engine.text_length import check_could_fit
from hermes_async.errors import RequestError
from hermes_async.modeling.cross_encoder import cross_encoder_settings
from hermes_async.modeling.inputs import input_names
from hermes_async.results import RankedDocument
from hermes_async.serving.forward_passes import prepare_forward


def prepare_ranking(opened: OpenedModel, query: str, documents: Sequence[str]) -> list[TextBatch]:
    """Tokenizes pairs of the query and each document, and puts pairs of about the same length into one batch.

    For a worker thread. The result of a batch is float32 [pairs].

    Raises:
        RequestError: The model is no cross-encoder with one label, or an item is no text.
        ContextLengthError: The query alone is far longer than a pair may be.
        CheckpointError: The checkpoint's settings cannot be read.
        MemoryBudgetError: As `prepare_forward`.
    """
    model, tokenizer, path = opened.skeleton.model, opened.tokenizer, opened.checkpoint.path
    settings = cross_encoder_settings(opened.checkpoint.root or path, path, model.config)
    if tokenizer is None:
        raise RequestError(f"texts need a tokenizer: {opened.tokenizer_error}")
    for what, text in (("the query", query), *((f"document {idx}", text) for idx, text in enumerate(documents))):
        if not isinstance(text, str):
            raise RequestError(f"{what} is no text but {type(text).__name__}")
    limits = (opened.skeleton.context_length, settings.max_tokens or tokenizer.model_max_length)
    most = min(limit for limit in limits if limit is not None)
    # Each pair tokenizes the query again.
    check_could_fit(tokenizer, query, most)
    num_query_tokens = count_text_tokens(encode_texts(tokenizer, [query])[0])
    encoded = [
        truncated(tokenizer, encode_pair(tokenizer, query, document), most, num_query_tokens) for document in documents
    ]
    lengths = [len(item["input_ids"]) for item in encoded]
    if 0 in lengths:
        raise RequestError(f"document {lengths.index(0)} and the query have no tokens")
    # Some models look for the end of a text by its padding.
    can_pad = tokenizer.pad_token_id is not None and tokenizer.pad_token_id == model.config.pad_token_id
    groups = length_groups(lengths, opened.plan.max_tokens_per_sweep if can_pad else 1, can_pad=can_pad)
    names, batches = input_names(model), []
    for indices in groups:
        inputs = batch_inputs(tokenizer, [encoded[idx] for idx in indices])
        inputs = {name: inputs[name] for name in inputs if name in names}  # some tokenizers give more
        job = prepare_forward(opened, inputs, partial(_scores, activation=settings.activation))
        batches.append(TextBatch(indices, [lengths[idx] for idx in indices], job))
    return batches


def _scores(output: Any, *, activation: nn.Module) -> torch.Tensor:
    """Scores [pairs] of logits [pairs, 1]."""
    scores: torch.Tensor = activation(output.logits.float())
    return scores[:, 0]


def ranked(batches: Sequence[TextBatch], scores: npt.NDArray[np.float32]) -> list[RankedDocument]:
    """All documents, the best first; those of the same score in the order in which they were given."""
    lengths = {idx: length for batch in batches for idx, length in zip(batch.indices, batch.lengths, strict=True)}
    documents = [RankedDocument(idx, float(score), lengths[idx]) for idx, score in enumerate(scores)]
    return sorted(documents, key=lambda document: document.score, reverse=True)
