"""One forward pass of a transformers model over a packed row of several sequences."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.attention import PackedAttention, block_diagonal_mask
from hermes_async.modeling.kv_cache import PackedCache, Segment
from hermes_async.modeling.transformers_api import installed_versions, kv_cache_argument, supports_packed_attention


@dataclass(slots=True)
class PackedBatch:
    """The tokens of one sweep, all sequences in one row.

    Attributes:
        input_ids: [1, tokens] int64.
        position_ids: [1, tokens] int64, each token's place in its own sequence.
        segments: Which tokens belong to which sequence.
        logits_positions: [outputs] int64, the tokens whose logits are wanted.
        embedding_rows: [rows, hidden], the rows of the input embedding that the tokens need; None where it is resident.
        embedding_index: [1, tokens] int64, each token's row in `embedding_rows`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: list[Segment]
    logits_positions: torch.Tensor
    embedding_rows: torch.Tensor | None = None
    embedding_index: torch.Tensor | None = None


def check_forward_signature(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModelError` where the model's forward does not take what a packed row needs."""
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
    """Runs the model; its weights are bound by the caller, or by hooks as it goes.

    Args:
        attention: The one whose name the model was built with.
        batch: Each segment's `kv` is written behind the segment's `past`; its `length` is not advanced.

    Returns:
        Logits [outputs, vocab] at `batch.logits_positions`, in the model's dtype.
    """

    def select_outputs(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # Indexing makes the head's input contiguous; on a slice, `linear` would copy the whole weight.
        return (args[0].index_select(1, batch.logits_positions), *args[1:])

    packed, cache_argument = supports_packed_attention(type(model)), kv_cache_argument(model)
    assert cache_argument is not None  # `check_forward_signature` has seen to it
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    attention.cache = PackedCache(batch.segments, concatenate=not packed)
    try:
        with head.register_forward_pre_hook(select_outputs), torch.inference_mode():
            output = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None if packed else block_diagonal_mask(batch.segments, model.dtype),
                use_cache=True,
                **{cache_argument: attention.cache},
            )
        logits: torch.Tensor = output.logits
        return logits[0]
    finally:
        attention.cache = None
