"""The pool of KV blocks against plain tensors, and what a packed row writes through it and reads back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hermes_async.modeling.kv_cache import (
    BLOCK_TOKENS,
    KVLayout,
    KVPool,
    KVShape,
    PackedCache,
    Segment,
    SequenceKV,
    num_blocks,
)

# Layers need not be numbered from zero, and keys and values differ in heads and width.
LAYOUT = KVLayout({0: KVShape(2, 4, 2, 4), 3: KVShape(1, 6, 3, 2), 4: KVShape(4, 1, 1, 5)}, torch.float32)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.builds(KVShape, st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9))
layouts = st.builds(KVLayout, st.dictionaries(st.integers(0, 9), shapes, min_size=1, max_size=4), dtypes)


@pytest.fixture
def pool() -> Iterator[KVPool]:
    with closing(KVPool(LAYOUT, 12 * LAYOUT.block_bytes)) as pool:
        yield pool


def noise(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Sizes


@given(layouts)
def test_a_block_holds_its_tokens_in_whole_pages(layout: KVLayout) -> None:
    numel = sum(shape.numel_per_token for shape in layout.layers.values())
    assert layout.block_bytes % 4096 == 0
    assert 0 <= layout.block_bytes - BLOCK_TOKENS * numel * layout.dtype.itemsize < 4096
    assert layout.bytes_per_token * BLOCK_TOKENS == layout.block_bytes


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_sequences_take_whole_blocks(num_tokens: int, blocks: int) -> None:
    assert num_blocks(num_tokens) == blocks
    assert LAYOUT.nbytes(num_tokens) == blocks * LAYOUT.block_bytes


def test_a_pool_has_as_many_whole_blocks_as_fit() -> None:
    for nbytes, expected in ((0, 0), (LAYOUT.block_bytes - 1, 0), (3 * LAYOUT.block_bytes + 1, 3)):
        with closing(KVPool(LAYOUT, nbytes)) as pool:
            assert pool.num_blocks == expected
            with pytest.raises(MemoryError):
                pool.allocate(expected + 1)


# Blocks


def test_more_blocks_than_are_left_are_refused_and_none_is_taken(pool: KVPool) -> None:
    blocks = pool.allocate(10)
    with pytest.raises(MemoryError, match="3 KV blocks asked for, 2 left"):
        pool.allocate(3)
    assert pool.num_used == 10
    pool.free(blocks[:1])
    assert pool.num_used == 9
    assert len({*blocks[1:], *pool.allocate(3)}) == 12


def test_a_block_given_back_is_used_again_first(pool: KVPool) -> None:
    blocks = pool.allocate(4)
    pool.free([blocks[1]])
    assert pool.allocate(1) == [blocks[1]]


def test_a_block_given_back_takes_no_memory(pool: KVPool) -> None:
    kept, freed = pool.allocate(2)
    for idx in (kept, freed):
        pool.block(idx)[:] = b"\1" * LAYOUT.block_bytes
    pool.free([freed])
    # Linux fills pages that it was told nobody needs with zeros when they are touched again.
    assert bytes(pool.block(freed)) == bytes(LAYOUT.block_bytes)
    assert bytes(pool.block(kept)) == b"\1" * LAYOUT.block_bytes


def test_a_closed_pool_takes_no_memory_even_where_a_view_is_left(pool: KVPool) -> None:
    (idx,) = pool.allocate(1)
    view = pool.block(idx)
    view[:] = b"\1" * LAYOUT.block_bytes
    pool.close()
    assert bytes(view) == bytes(LAYOUT.block_bytes)


def test_a_block_s_bytes_are_all_that_is_in_it(pool: KVPool) -> None:
    """Copied to another place, they are the same keys and values: so a session comes back from disk."""
    one, other = pool.allocate(2)
    places = torch.arange(BLOCK_TOKENS)
    for layer_idx, shape in LAYOUT.layers.items():
        keys = noise(BLOCK_TOKENS, shape.num_heads, shape.key_dim, seed=layer_idx)
        values = noise(BLOCK_TOKENS, shape.value_num_heads, shape.value_dim, seed=-layer_idx)
        pool.write(layer_idx, torch.full_like(places, one), places, keys, values)
    pool.block(other)[:] = pool.block(one)
    for layer_idx in LAYOUT.layers:
        for moved, original in zip(pool.gather(layer_idx, [other]), pool.gather(layer_idx, [one]), strict=True):
            assert torch.equal(moved, original)


class PoolAndTensors(RuleBasedStateMachine):
    """The model: each block in use has a plain tensor of keys and one of values for each layer."""

    @initialize(layout=layouts, num_blocks=st.integers(1, 8))
    def open(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.pool = KVPool(layout, num_blocks * layout.block_bytes)
        self.blocks: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def teardown(self) -> None:
        self.pool.close()

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_blocks - len(self.blocks):
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert len(set(taken)) == count
        assert not self.blocks.keys() & set(taken)
        for idx in taken:
            self.blocks[idx] = {layer_idx: self._contents(layer_idx, idx) for layer_idx in self.layout.layers}

    def _contents(self, layer_idx: int, idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.pool.gather(layer_idx, [idx])
        shape = self.layout.layers[layer_idx]
        assert keys.shape == (BLOCK_TOKENS, shape.num_heads, shape.key_dim)
        assert values.shape == (BLOCK_TOKENS, shape.value_num_heads, shape.value_dim)
        return keys, values

    @rule(data=st.data())
    @precondition(lambda self: self.blocks)
    def free(self, data: st.DataObject) -> None:
        freed = data.draw(st.lists(st.sampled_from(sorted(self.blocks)), unique=True))
        self.pool.free(freed)
        for idx in freed:
            del self.blocks[idx]

    @rule(data=st.data(), seed=st.integers(0, 99))
    @precondition(lambda self: self.blocks)
    def write(self, data: st.DataObject, seed: int) -> None:
        """Any tokens of any blocks at once, in any order, to one layer."""
        layer_idx = data.draw(st.sampled_from(sorted(self.layout.layers)))
        place = st.tuples(st.sampled_from(sorted(self.blocks)), st.integers(0, BLOCK_TOKENS - 1))
        places = data.draw(st.lists(place, unique=True, max_size=40))
        shape, dtype = self.layout.layers[layer_idx], self.layout.dtype
        keys = noise(len(places), shape.num_heads, shape.key_dim, dtype=dtype, seed=seed)
        values = noise(len(places), shape.value_num_heads, shape.value_dim, dtype=dtype, seed=seed + 100)
        blocks, offsets = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
        self.pool.write(layer_idx, blocks, offsets, keys, values)
        for token, (idx, offset) in enumerate(places):
            for tensor, written in zip(self.blocks[idx][layer_idx], (keys, values), strict=True):
                tensor[offset] = written[token]

    @rule(data=st.data())
    @precondition(lambda self: self.blocks)
    def gather(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.blocks)), min_size=1, max_size=12))
        for layer_idx in self.layout.layers:
            for gathered, expected in zip(
                self.pool.gather(layer_idx, chosen),
                zip(*(self.blocks[idx][layer_idx] for idx in chosen), strict=True),
                strict=True,
            ):
                assert torch.equal(gathered, torch.cat(expected))

    @invariant()
    def the_pool_is_as_the_tensors(self) -> None:
        assert self.pool.num_used == len(self.blocks)
        for idx, layers in self.blocks.items():
            for layer_idx, expected in layers.items():
                for stored, tensor in zip(self.pool.gather(layer_idx, [idx]), expected, strict=True):
                    assert torch.equal(stored, tensor)


test_pool = PoolAndTensors.TestCase


# A sequence's own view


@given(st.integers(0, 999), st.data())
def test_a_sequence_reads_any_part_of_itself(seed: int, data: st.DataObject) -> None:
    chosen = random.Random(seed)
    with closing(KVPool(LAYOUT, 9 * LAYOUT.block_bytes)) as pool:
        blocks = pool.allocate(9)
        chosen.shuffle(blocks)
        kv = SequenceKV(pool, blocks[:5])
        assert kv.capacity == 80
        keys, values = noise(1, 1, 80, 6, seed=seed), noise(1, 3, 80, 2, seed=seed + 1)
        PackedCache([Segment(0, 80, kv, 0)], concatenate=False).update(keys, values, 3)
        start = data.draw(st.integers(0, 79), "start")
        end = data.draw(st.integers(start + 1, 80), "end")
        read = kv.read(3, start, end)
        assert torch.equal(read[0], keys[:, :, start:end])
        assert torch.equal(read[1], values[:, :, start:end])


def test_what_was_read_is_a_copy(pool: KVPool) -> None:
    kv = SequenceKV(pool, pool.allocate(1))
    fill(kv, 4)
    keys, _ = kv.read(0, 0, 4)
    before = keys.clone()
    fill(kv, 4, seed=9)
    assert torch.equal(keys, before)


# Packed rows


def fill(kv: SequenceKV, num_tokens: int, *, seed: int = 0) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Writes the sequence's first tokens in all layers; returns keys and values by layer."""
    cache = PackedCache([Segment(0, num_tokens, kv, 0)], concatenate=False)
    written = {layer_idx: states(layer_idx, num_tokens, seed=seed) for layer_idx in LAYOUT.layers}
    for layer_idx, (keys, values) in written.items():
        cache.update(keys, values, layer_idx)
    kv.length = num_tokens
    return written


def states(layer_idx: int, num_tokens: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = LAYOUT.layers[layer_idx]
    keys = noise(1, shape.num_heads, num_tokens, shape.key_dim, seed=100 * seed + layer_idx)
    return keys, noise(1, shape.value_num_heads, num_tokens, shape.value_dim, seed=100 * seed + 50 + layer_idx)


@pytest.mark.parametrize("layer_idx", LAYOUT.layers)
def test_each_segment_goes_behind_its_own_sequence(pool: KVPool, layer_idx: int) -> None:
    first, second = SequenceKV(pool, pool.allocate(2)), SequenceKV(pool, pool.allocate(3))
    before = [fill(first, 20, seed=1)[layer_idx], fill(second, 31, seed=2)[layer_idx]]
    cache = PackedCache([Segment(0, 3, first, 20), Segment(3, 8, second, 31)], concatenate=False)
    new = states(layer_idx, 8, seed=3)
    returned = cache.update(*new, layer_idx)
    assert returned[0] is new[0]
    assert returned[1] is new[1]
    for kv, past, part, old in ((first, 20, slice(0, 3), before[0]), (second, 31, slice(3, 8), before[1])):
        for stored, tensor, added in zip(kv.read(layer_idx, 0, past + part.stop - part.start), old, new, strict=True):
            assert torch.equal(stored, torch.cat([tensor, added[:, :, part]], dim=2))
    assert (first.length, second.length) == (20, 31)  # a sweep that fails has cached nothing


def test_concatenated_a_model_gets_all_keys_one_sequence_after_another(pool: KVPool) -> None:
    first, second = SequenceKV(pool, pool.allocate(2)), SequenceKV(pool, pool.allocate(3))
    fill(first, 20, seed=1)
    fill(second, 31, seed=2)
    cache = PackedCache([Segment(0, 3, first, 20), Segment(3, 8, second, 31)], concatenate=True)
    keys, values = cache.update(*states(3, 8, seed=3), 3)
    assert keys.shape == (1, 1, 59, 6)
    assert values.shape == (1, 3, 59, 2)
    for start, end, kv in ((0, 23, first), (23, 59, second)):
        stored = kv.read(3, 0, end - start)
        assert torch.equal(keys[:, :, start:end], stored[0])
        assert torch.equal(values[:, :, start:end], stored[1])
    assert cache.get_mask_sizes(8, 3) == (59, 0)
    assert cache.get_seq_length() == 31


def test_one_sequence_s_tokens_wait_for_another_s_in_the_same_row(pool: KVPool) -> None:
    """Both have the same first block; one computes it, and the other's tokens come behind it, beyond its own length."""
    shared, *own = pool.allocate(3)
    leader, follower = SequenceKV(pool, [shared, own[0]]), SequenceKV(pool, [shared, own[1]])
    cache = PackedCache([Segment(0, 18, leader, 0), Segment(18, 20, follower, 16)], concatenate=True)
    new = states(0, 20)
    keys, _ = cache.update(*new, 0)
    assert follower.length == 0
    assert torch.equal(keys[:, :, :18], new[0][:, :, :18])
    assert torch.equal(keys[:, :, 18:], torch.cat([new[0][:, :, :16], new[0][:, :, 18:]], dim=2))
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("concatenate", [False, True])
def test_a_dropped_segment_is_not_written_from_then_on(pool: KVPool, concatenate: bool) -> None:
    kept, dropped = SequenceKV(pool, pool.allocate(1)), SequenceKV(pool, pool.allocate(1))
    segments = [Segment(0, 2, dropped, 0), Segment(2, 5, kept, 0)]
    cache = PackedCache(segments, concatenate=concatenate)
    cache.update(*states(0, 5), 0)
    segments[0].dropped = True
    pool.free(dropped.blocks)  # their owner is gone
    dropped.blocks.clear()
    other = SequenceKV(pool, pool.allocate(1))
    before = fill(other, 16, seed=4)
    new = states(3, 5)
    returned = cache.update(*new, 3)
    assert torch.equal(kept.read(3, 0, 3)[0], new[0][:, :, 2:])
    assert torch.equal(other.read(3, 0, 16)[0], before[3][0])
    if concatenate:
        for tensor, added in zip(returned, new, strict=True):
            assert torch.equal(tensor[:, :, :2], torch.zeros_like(added[:, :, :2]))
            assert torch.equal(tensor[:, :, 2:], added[:, :, 2:])


def test_dropped_segments_can_be_all_there_are(pool: KVPool) -> None:
    kv = SequenceKV(pool, pool.allocate(1))
    before = fill(kv, 16)
    segments = [Segment(0, 2, kv, 3, dropped=True), Segment(2, 3, kv, 9, dropped=True)]
    keys, values = PackedCache(segments, concatenate=True).update(*states(4, 3, seed=1), 4)
    assert torch.equal(kv.read(4, 0, 16)[0], before[4][0])
    assert keys.shape == (1, 4, 15, 1)
    assert not keys.any()
    assert not values.any()


def test_the_attention_function_can_tell_whose_keys_it_got(pool: KVPool) -> None:
    kv = SequenceKV(pool, pool.allocate(1))
    cache = PackedCache([Segment(0, 2, kv, 0)], concatenate=False)
    keys, values = cache.update(*states(3, 2), 3)
    assert (cache.layer_idx, cache.returned_keys is keys, cache.returned_values is values) == (3, True, True)
