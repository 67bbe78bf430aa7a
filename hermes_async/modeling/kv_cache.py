"""Keys and values in blocks of a few tokens, and the transformers cache by which a packed batch writes them.

Source: block tables as in PagedAttention (Kwon et al., SOSP 2023, arXiv 2309.06180).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from hermes_async.storage.buffers import MAP_NORESERVE, align_up, map_memory

BLOCK_TOKENS = 16
"""Tokens of a block. Sequences share whole blocks, and after an edit of a history at most one is computed again."""


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
    """The layers that have keys and values, by transformers' `layer_idx`, and their dtype."""

    layers: Mapping[int, KVShape]
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of `BLOCK_TOKENS` tokens in all layers, in whole pages."""
        numel = sum(shape.numel_per_token for shape in self.layers.values()) * BLOCK_TOKENS
        return align_up(max(1, numel * self.dtype.itemsize))

    @property
    def bytes_per_token(self) -> int:
        return self.block_bytes // BLOCK_TOKENS

    def nbytes(self, capacity: int) -> int:
        """Bytes of a sequence of `capacity` tokens, in whole blocks."""
        return num_blocks(capacity) * self.block_bytes

    def tokens_within(self, nbytes: int) -> int:
        """The most tokens of a sequence in so many bytes."""
        return nbytes // self.block_bytes * BLOCK_TOKENS

    @property
    def sequence_bytes(self) -> int:
        """What does not depend on the length of a sequence."""
        return 0


def num_blocks(num_tokens: int) -> int:
    """How many blocks so many tokens need."""
    return -(-num_tokens // BLOCK_TOKENS)


def num_kept(kept: Sequence[int], token_ids: Sequence[int]) -> int:
    """How many tokens of a sequence have their keys and values among those of the tokens `kept`.

    The sequence's last token never counts: it must be computed to continue the sequence.
    """
    most = min(len(kept), len(token_ids) - 1)
    return next((idx for idx in range(most) if kept[idx] != token_ids[idx]), most)


class KVPool:
    """The memory of all KV blocks: one mapping, of which only the blocks in use take memory.

    Args:
        nbytes: The pool has as many whole blocks as fit.

    Raises:
        MemoryBudgetError: The system does not give so many addresses.
    """

    def __init__(self, layout: KVLayout, nbytes: int) -> None:
        self.layout = layout
        self.num_blocks = nbytes // layout.block_bytes
        # The largest size there can ever be, so no swap space is reserved for it.
        self._map = map_memory(max(1, self.num_blocks) * layout.block_bytes, MAP_NORESERVE)
        # All mutable state: freed blocks, and the first block that was never used.
        self._free: list[int] = []
        self._unused = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        memory = torch.frombuffer(self._map, dtype=layout.dtype)
        stride = layout.block_bytes // layout.dtype.itemsize
        position = 0
        for layer_idx, shape in layout.layers.items():
            views = []
            for num_heads, dim in ((shape.num_heads, shape.key_dim), (shape.value_num_heads, shape.value_dim)):
                size = (self.num_blocks, BLOCK_TOKENS, num_heads, dim)
                views.append(memory.as_strided(size, (stride, num_heads * dim, dim, 1), position))
                position += BLOCK_TOKENS * num_heads * dim
            self._layers[layer_idx] = (views[0], views[1])

    @property
    def num_used(self) -> int:
        return self._unused - len(self._free)

    def write(
        self, layer_idx: int, blocks: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Writes keys and values `[tokens, num_heads, dim]`; each token has its block and its offset in the block."""
        stored_keys, stored_values = self._layers[layer_idx]
        stored_keys[blocks, offsets] = keys
        stored_values[blocks, offsets] = values

    def gather(self, layer_idx: int, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values `[tokens, num_heads, dim]` of these blocks, in order."""
        chosen = torch.tensor(blocks)
        keys, values = self._layers[layer_idx]
        return keys.index_select(0, chosen).flatten(0, 1), values.index_select(0, chosen).flatten(0, 1)

    def block(self, idx: int) -> memoryview:
        """The bytes of a block, for all layers."""
        nbytes = self.layout.block_bytes
        return memoryview(self._map)[idx * nbytes : (idx + 1) * nbytes]

    def allocate(self, count: int) -> list[int]:
        """Takes blocks, whose contents are undefined. The caller holds a lease for them."""
        if count > self.num_blocks - self.num_used:
            raise MemoryError(f"{count} KV blocks asked for, {self.num_blocks - self.num_used} left")
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self._unused += count - len(taken)
        return taken + list(range(self._unused - (count - len(taken)), self._unused))

    def free(self, blocks: Sequence[int]) -> None:
        """Frees blocks, and gives their memory to the system."""
        nbytes = self.layout.block_bytes
        for idx in blocks:
            self._map.madvise(mmap.MADV_DONTNEED, idx * nbytes, nbytes)
        self._free += blocks

    def close(self) -> None:
        """Gives all memory to the system, even while a view is still alive somewhere."""
        self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(eq=False, slots=True)
class SequenceKV:
    """One sequence's block table: token `i` is in `blocks[i // BLOCK_TOKENS]`.

    Attributes:
        length: Tokens that are complete. A sweep writes after them; `length` is advanced when it has succeeded.
    """

    pool: KVPool
    blocks: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def capacity(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS

    def read(self, layer_idx: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values `[1, num_heads, end - start, dim]` of tokens `start` to `end`."""
        first = start // BLOCK_TOKENS
        wanted = slice(start - first * BLOCK_TOKENS, end - first * BLOCK_TOKENS)
        keys, values = self.pool.gather(layer_idx, self.blocks[first : num_blocks(end)])
        return keys[wanted].transpose(0, 1)[None], values[wanted].transpose(0, 1)[None]


class Settable(Protocol):
    """Something to set when it has happened, such as an event."""

    def set(self) -> None: ...


@dataclass(slots=True)
class Segment:
    """One sequence's tokens in a packed row: from `start` to `end`, after `past` tokens that are cached.

    Attributes:
        past: Also counts tokens that an earlier segment of the same sweep writes into blocks that both share.
        abandoned: Set by the event loop when nobody wants the sequence any more.
        dropped: Set by the inference thread, before a stage, when it has noticed that. The sequence's output is zeros
            from then on, and nothing of it is read or written.
        left: Set right after `dropped`.
    """

    start: int
    end: int
    kv: SequenceKV
    past: int
    abandoned: bool = False
    dropped: bool = False
    left: Settable | None = None

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


class PackedCache(Cache):
    """transformers' KV cache for a packed row: writes the keys and values of each segment to its own sequence.

    Args:
        segments: Those of the packed row.
        concatenate: Return the keys and values of all segments concatenated, for models that use their own attention
            with a block-diagonal mask. Otherwise return the new keys and values; `PackedAttention` finds the others.
    """

    def __init__(self, segments: Sequence[Segment], *, concatenate: bool) -> None:
        super().__init__(layers=[])
        self.segments = segments
        self._concatenate = concatenate
        self._destination: _Destination | None = None
        self.layer_idx: int | None = None
        self.returned_keys: torch.Tensor | None = None
        self.returned_values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: key_states: [1, num_heads, tokens, key_dim]; value_states: [1, num_heads, tokens, value_dim]."""
        self._write(layer_idx, key_states, value_states)
        if self._concatenate:
            key_states, value_states = self._all(layer_idx, key_states, value_states)
        self.layer_idx, self.returned_keys, self.returned_values = layer_idx, key_states, value_states
        return key_states, value_states

    def _write(self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        num_dropped = sum(segment.dropped for segment in self.segments)
        if self._destination is None or self._destination.num_dropped != num_dropped:
            self._destination = _Destination.of(self.segments)
        to = self._destination
        if to.pool is None:
            return
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        if to.tokens is not None:
            keys, values = keys.index_select(0, to.tokens), values.index_select(0, to.tokens)
        to.pool.write(layer_idx, to.blocks, to.offsets, keys, values)

    def _all(
        self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = [], []
        for segment in self.segments:
            length = segment.past + segment.num_tokens
            if segment.dropped:
                keys.append(key_states.new_zeros(1, key_states.shape[1], length, key_states.shape[3]))
                values.append(value_states.new_zeros(1, value_states.shape[1], length, value_states.shape[3]))
            else:
                layer = segment.kv.read(layer_idx, 0, length)
                keys.append(layer[0])
                values.append(layer[1])
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The cached tokens of the longest sequence. Positions do not depend on this: they are given explicitly."""
        return max((segment.past for segment in self.segments), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return sum(segment.past + segment.num_tokens for segment in self.segments), 0


@dataclass(frozen=True, slots=True)
class _Destination:
    """Where the tokens of a packed row are written.

    Attributes:
        blocks: [tokens] int64, each token's block.
        offsets: [tokens] int64, each token's place in its block.
        tokens: [tokens] int64, the tokens that are written; None for all.
    """

    pool: KVPool | None
    num_dropped: int
    blocks: torch.Tensor
    offsets: torch.Tensor
    tokens: torch.Tensor | None

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> _Destination:
        kept = [segment for segment in segments if not segment.dropped]
        blocks: list[int] = []
        offsets: list[int] = []
        tokens: list[int] = []
        for segment in kept:
            for idx in range(segment.past, segment.past + segment.num_tokens):
                blocks.append(segment.kv.blocks[idx // BLOCK_TOKENS])
                offsets.append(idx % BLOCK_TOKENS)
            tokens += range(segment.start, segment.end)
        return cls(
            kept[0].kv.pool if kept else None,
            len(segments) - len(kept),
            torch.tensor(blocks, dtype=torch.long),
            torch.tensor(offsets, dtype=torch.long),
            torch.tensor(tokens, dtype=torch.long) if len(kept) < len(segments) else None,
        )
