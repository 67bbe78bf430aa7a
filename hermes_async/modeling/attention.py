"""Attention over a packed row: every segment attends only to its own sequence.

Models whose attention function can be chosen call `PackedAttention`. The others use their own attention with
`block_diagonal_mask`, over keys and values that `PackedCache` concatenates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.kernels import bounded_attention_kernels
from hermes_async.modeling.kv_cache import PackedCache, Segment
from hermes_async.modeling.transformers_api import KV_CACHE_ARGUMENTS, register_attention, unregister_attention

QUERY_TOKENS = 256
"""Queries of one sequence that are computed at once. Masks and scores take memory for each query and each key."""

_WITHOUT_MEANING_HERE = KV_CACHE_ARGUMENTS | frozenset({
    # Positions are already applied to queries and keys. The others ask for outputs, or repeat what the cache knows.
    "position_ids", "position_embeddings", "cache_position", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "is_causal", "dropout",
    "logits_to_keep", "num_items_in_batch", "layer_idx",
})  # fmt: skip


# The cache of the packed call that runs. Each greenlet has its own context, so each call of a sweep has its own cache.
_CACHE = ContextVar[PackedCache | None]("packed cache", default=None)


class PackedAttention:
    """An attention function for transformers' `AttentionInterface`, registered under its own name until `close`.

    Attributes:
        windows: The last sliding window of each layer, by `layer_idx`.
        eager: Whether a layer needed `_eager_attention`, which takes memory for all scores.
    """

    def __init__(self) -> None:
        self.windows: dict[int, int | None] = {}
        self.eager = False
        self.name = f"hermes_async_{id(self):x}"
        register_attention(self.name, self)

    @property
    def cache(self) -> PackedCache | None:
        """The KV cache of the packed call that runs; it knows the segments too. None outside of a packed call."""
        return _CACHE.get()

    @cache.setter
    def cache(self, cache: PackedCache | None) -> None:
        _CACHE.set(cache)

    def close(self) -> None:
        """Removes the name from transformers' registry."""
        unregister_attention(self.name)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Args: query: [1, num_heads, tokens, key_dim]. Returns: [1, tokens, num_heads, value_dim], None.

        Raises:
            UnsupportedModelError: The model needs something that this function does not compute.
        """
        cache = self.cache
        name = type(module).__name__
        if cache is None or cache.layer_idx is None or cache.returned_keys is not key:
            raise UnsupportedModelError(f"{name} attends to keys that did not come from its KV cache")
        if cache.returned_values is not value:
            raise UnsupportedModelError(f"{name} attends to values that did not come from its KV cache")
        self.windows[cache.layer_idx] = sliding_window
        for kwarg, given in kwargs.items():
            if given is not None and kwarg not in _WITHOUT_MEANING_HERE and not isinstance(given, bool):
                raise UnsupportedModelError(f"{name} attends with {kwarg!r}, which is not supported")
        if attention_mask is not None:
            raise UnsupportedModelError(f"{name} attends under a mask of its own, which is not supported")
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        for segment in cache.segments:
            if segment.dropped:
                output[:, segment.start : segment.end] = 0
                continue
            for first in range(segment.past, segment.past + segment.num_tokens, QUERY_TOKENS):
                last = min(first + QUERY_TOKENS, segment.past + segment.num_tokens)
                rows = slice(segment.start + first - segment.past, segment.start + last - segment.past)
                start = 0 if sliding_window is None else max(0, first + 1 - sliding_window)
                keys, values = segment.kv.read(cache.layer_idx, start, last)
                mask = _causal_mask(first, last, start, sliding_window, query.device)
                if softcap is None and s_aux is None:
                    attended = _grouped_attention(query[:, :, rows], keys, values, mask, scaling)
                else:
                    self.eager = True
                    attended = _eager_attention(
                        query[:, :, rows], keys, values, mask, scaling=scaling, softcap=softcap, sinks=s_aux
                    )
                output[:, rows] = attended.transpose(1, 2)
        return output, None


def _grouped_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention [1, num_heads, tokens, dim]. The query heads that share a key head are rows of one matrix.

    torch's own `enable_gqa` gives the same except for rounding, but copies keys and values for each query head: on a
    CPU it is ten times slower for one token after a thousand.
    """
    _, num_heads, num_tokens, dim = queries.shape
    groups = num_heads // keys.shape[1]
    rows = queries.reshape(1, keys.shape[1], groups * num_tokens, dim)
    with bounded_attention_kernels(rows):
        attended = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=None if mask is None else mask.repeat(groups, 1), scale=scaling
        )
    return attended.reshape(1, num_heads, num_tokens, values.shape[-1])


def _causal_mask(
    first: int, last: int, start: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which keys from `start` on the queries `first` to `last` attend to: [tokens, keys] bool, or None for all."""
    if last - first == 1:
        return None
    queries = torch.arange(first, last, device=device)[:, None]
    keys = torch.arange(start, last, device=device)[None, :]
    mask = keys <= queries
    if sliding_window is not None:
        mask &= keys > queries - sliding_window
    return mask


def _eager_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [1, num_heads, tokens, dim] with capped scores (Gemma 2) or a learned sink per head (gpt-oss)."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(2, 3) * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink_scores = sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sink_scores], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return scores.softmax(dim=-1, dtype=scores.dtype)[..., :-1] @ values
    return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values


def block_diagonal_mask(segments: Sequence[Segment], dtype: torch.dtype) -> torch.Tensor:
    """The additive mask of a packed row over the concatenated keys of all segments: [1, 1, tokens, keys]."""
    num_tokens = sum(segment.num_tokens for segment in segments)
    num_keys = sum(segment.past + segment.num_tokens for segment in segments)
    mask = torch.full((1, 1, num_tokens, num_keys), torch.finfo(dtype).min, dtype=dtype)
    offset = 0
    for segment in segments:
        length = segment.past
        for i in range(segment.num_tokens):
            mask[0, 0, segment.start + i, offset : offset + length + i + 1] = 0
        offset += length + segment.num_tokens
    return mask
