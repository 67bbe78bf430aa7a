"""One call of a transformers model on a packed row of several sequences."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.attention import PackedAttention, block_diagonal_mask
from hermes_async.modeling.kv_cache import PackedCache, Segment, SequenceKV, Settable
from hermes_async.modeling.transformers_api import installed_versions, kv_cache_argument, supports_packed_attention


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence's share of a packed batch.

    Attributes:
        kv: Where its keys and values are written, behind `past`.
        past: Earlier tokens of the sequence. Their keys and values are cached, or written in the same sweep.
        token_ids: The tokens to compute; at least one.
        num_outputs: Logits are wanted for so many of the last tokens.
        left: As `Segment.left`.
    """

    kv: SequenceKV
    past: int
    token_ids: Sequence[int]
    num_outputs: int
    left: Settable | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The tokens of several sequences in one row.

    Attributes:
        input_ids: [1, tokens] int64.
        position_ids: [1, tokens] int64, each token's position in its own sequence.
        segments: The tokens of each sequence, in the order of the sequences.
        logits_positions: [outputs] int64, the tokens whose logits are wanted, one sequence after another.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    logits_positions: torch.Tensor

    @classmethod
    def of(cls, sequences: Iterable[PackedSequence]) -> PackedBatch:
        """Puts sequences one after another in a row."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        segments: list[Segment] = []
        logits_positions: list[int] = []
        for sequence in sequences:
            start = len(input_ids)
            input_ids += sequence.token_ids
            end = len(input_ids)
            position_ids += range(sequence.past, sequence.past + end - start)
            segments.append(Segment(start, end, sequence.kv, sequence.past, left=sequence.left))
            logits_positions += range(end - sequence.num_outputs, end)
        return cls(
            input_ids=torch.tensor([input_ids], dtype=torch.long),
            position_ids=torch.tensor([position_ids], dtype=torch.long),
            segments=tuple(segments),
            logits_positions=torch.tensor(logits_positions, dtype=torch.long),
        )

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def check_forward_signature(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModelError` if the model's forward lacks an argument that a packed row needs."""
    accepted = inspect.signature(model.forward).parameters
    lacking = [name for name in ("input_ids", "position_ids", "attention_mask") if name not in accepted]
    if kv_cache_argument(model) is None:
        lacking.append("KV cache")
    if lacking:
        raise UnsupportedModelError(
            f"{type(model).__name__} of transformers {installed_versions()['transformers']} takes no "
            f"{' and no '.join(lacking)}; only models with a KV cache and explicit positions can share a sweep"
        )


def forward_packed(model: PreTrainedModel, attention: PackedAttention, batch: PackedBatch) -> torch.Tensor:
    """Runs the model. The caller has bound its weights, or hooks bind them meanwhile.

    Calls on several greenlets may overlap: each has its own cache and its own outputs.

    Args:
        attention: The one whose name the model was built with.
        batch: The `kv` of each segment is written after its `past`; `length` is not advanced.

    Returns:
        Logits [outputs, vocab] at `batch.logits_positions`, in the model's dtype.
    """

    def select_outputs(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if attention.cache is not cache:
            return None  # the head computes for another call
        # Indexing makes the head's input contiguous; on a slice, `linear` would copy the whole weight.
        return (args[0].index_select(1, batch.logits_positions), *args[1:])

    packed, cache_argument = supports_packed_attention(type(model)), kv_cache_argument(model)
    assert cache_argument is not None  # `check_forward_signature` has seen to it
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    attention.cache = cache = PackedCache(batch.segments, concatenate=not packed)
    try:
        with head.register_forward_pre_hook(select_outputs), torch.inference_mode():
            output = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None if packed else block_diagonal_mask(batch.segments, model.dtype),
                use_cache=True,
                **{cache_argument: cache},
            )
        logits: torch.Tensor = output.logits
        return logits[0]
    finally:
        attention.cache = None
