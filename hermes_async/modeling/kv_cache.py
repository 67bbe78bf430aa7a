"""Keys and values of one sequence, and the transformers cache through which a packed batch writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from hermes_async.storage.buffers import Buffer


@dataclass(frozen=True, slots=True)
class KVShape:
    """One layer's keys `[num_heads, tokens, key_dim]` and values `[num_heads, tokens, value_dim]`."""

    num_heads: int
    key_dim: int
    value_num_heads: int
    value_dim: int

    @property
    def numel_per_token(self) -> int:
        return self.num_heads * self.key_dim + self.value_num_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The layers that keep keys and values, by transformers' `layer_idx`, and the dtype they are kept in."""

    layers: Mapping[int, KVShape]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return sum(shape.numel_per_token for shape in self.layers.values()) * self.dtype.itemsize

    def nbytes(self, capacity: int) -> int:
        """What a sequence of `capacity` tokens takes, in whole pages."""
        return -(-max(1, capacity * self.bytes_per_token) // 4096) * 4096


class SequenceKV:
    """Keys and values of one sequence for all layers, allocated at once for `capacity` tokens.

    Attributes:
        length: Tokens that are there to stay; a sweep writes behind them and the scheduler then advances it.
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.nbytes = layout.nbytes(capacity)
        self._buffer = Buffer(self.nbytes)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        position = 0
        for layer_idx, shape in layout.layers.items():
            keys = self._buffer.tensor(position, layout.dtype, (shape.num_heads, capacity, shape.key_dim))
            position += keys.nbytes
            values = self._buffer.tensor(position, layout.dtype, (shape.value_num_heads, capacity, shape.value_dim))
            position += values.nbytes
            self._layers[layer_idx] = (keys, values)

    def write(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes `[num_heads, tokens, dim]` behind the sequence's `length` tokens."""
        stored_keys, stored_values = self._layers[layer_idx]
        end = self.length + keys.shape[1]
        stored_keys[:, self.length : end] = keys
        stored_values[:, self.length : end] = values

    def read(self, layer_idx: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values `[1, num_heads, end - start, dim]` of tokens `start` to `end`."""
        keys, values = self._layers[layer_idx]
        return keys[None, :, start:end], values[None, :, start:end]

    def close(self) -> None:
        """Gives the memory back at once."""
        self._layers.clear()
        self._buffer.close()


@dataclass(slots=True)
class Segment:
    """One sequence's tokens in a packed row: `start` to `end` of it, behind `kv.length` tokens already cached.

    Attributes:
        dropped: Set by the compute thread when the sequence was aborted during the sweep; its output is zeros.
    """

    start: int
    end: int
    kv: SequenceKV
    dropped: bool = False

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


class PackedCache(Cache):
    """What transformers sees as `past_key_values`: writes each segment's keys and values to its own sequence.

    Args:
        segments: The running sweep's.
        concatenate: Return the keys and values of all segments one after another (for models that attend by
            themselves, under a block-diagonal mask); otherwise return the new ones as they came, for
            `PackedAttention` to find the rest.
    """

    def __init__(self, segments: Sequence[Segment], *, concatenate: bool) -> None:
        super().__init__(layers=[])
        self.segments = segments
        self._concatenate = concatenate
        self.layer_idx: int | None = None
        self.returned_keys: torch.Tensor | None = None
        self.returned_values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: key_states: [1, num_heads, tokens, key_dim]; value_states: [1, num_heads, tokens, value_dim]."""
        for segment in self.segments:
            if not segment.dropped:
                part = slice(segment.start, segment.end)
                segment.kv.write(layer_idx, key_states[0, :, part], value_states[0, :, part])
        if self._concatenate:
            key_states, value_states = self._all(layer_idx, key_states, value_states)
        self.layer_idx, self.returned_keys, self.returned_values = layer_idx, key_states, value_states
        return key_states, value_states

    def _all(
        self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = [], []
        for segment in self.segments:
            if segment.dropped:
                length = segment.kv.length + segment.num_tokens
                keys.append(key_states.new_zeros(1, key_states.shape[1], length, key_states.shape[3]))
                values.append(value_states.new_zeros(1, value_states.shape[1], length, value_states.shape[3]))
            else:
                layer = segment.kv.read(layer_idx, 0, segment.kv.length + segment.num_tokens)
                keys.append(layer[0])
                values.append(layer[1])
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest sequence's cached tokens; positions are given explicitly and do not come from here."""
        return max((segment.kv.length for segment in self.segments), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return sum(segment.kv.length + segment.num_tokens for segment in self.segments), 0
