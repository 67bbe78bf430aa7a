"""Attention over a packed row gives each segment what it would get alone, as torch and the formulas have it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling import attention as attention_module
from hermes_async.modeling.attention import PackedAttention, _grouped_attention, block_diagonal_mask
from hermes_async.modeling.kv_cache import KVLayout, KVPool, KVShape, PackedCache, Segment, SequenceKV, num_blocks


def noise(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


WAYS: list[dict[str, Any]] = [{}, {"sliding_window": 5}, {"softcap": 30.0}, {"s_aux": noise(4, seed=7)}]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def attention() -> Iterator[PackedAttention]:
    with closing(PackedAttention()) as attention:
        yield attention


class Row:
    """Sequences of `(past, tokens)` in one row, and what each of them is alone: queries, all keys, all values."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        dims: tuple[int, int] = (8, 8),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        layout = KVLayout({0: KVShape(num_kv_heads, dims[0], num_kv_heads, dims[1])}, dtype)
        pool = KVPool(layout, sum(num_blocks(past + tokens) for past, tokens in sequences) * layout.block_bytes)
        self.segments: list[Segment] = []
        self.alone = []
        start = 0
        for seed, (past, tokens) in enumerate(sequences):
            kv = SequenceKV(pool, pool.allocate(num_blocks(past + tokens)))
            queries = noise(1, num_heads, tokens, dims[0], dtype=dtype, seed=seed)
            keys = noise(1, num_kv_heads, past + tokens, dims[0], dtype=dtype, seed=seed + 100)
            values = noise(1, num_kv_heads, past + tokens, dims[1], dtype=dtype, seed=seed + 200)
            if past:
                before = PackedCache([Segment(0, past, kv, 0)], concatenate=False)
                before.update(keys[:, :, :past], values[:, :, :past], 0)
            self.segments.append(Segment(start, start + tokens, kv, past))
            self.alone.append((queries, keys, values))
            start += tokens

    def attend(self, attention: PackedAttention, **kwargs: Any) -> torch.Tensor:
        """[1, tokens, num_heads, value_dim]"""
        queries = torch.cat([queries for queries, _, _ in self.alone], dim=2)
        pasts = [segment.past for segment in self.segments]
        new = [torch.cat([one[i][:, :, p:] for one, p in zip(self.alone, pasts, strict=True)], dim=2) for i in (1, 2)]
        attention.cache = PackedCache(self.segments, concatenate=False)
        keys, values = attention.cache.update(*new, 0)
        output, weights = attention(torch.nn.Identity(), queries, keys, values, None, **kwargs)
        assert weights is None
        return output

    def check(self, output: torch.Tensor, *, sliding_window: int | None = None, **kwargs: Any) -> None:
        """Compares with the formula, computed in float64."""
        for segment, (queries, keys, values) in zip(self.segments, self.alone, strict=True):
            if segment.dropped:
                assert not output[:, segment.start : segment.end].any()
                continue
            visible = seen(segment.past, segment.num_tokens, sliding_window)
            expected = formula(queries, keys, values, visible, **kwargs).transpose(1, 2)
            actual = output[:, segment.start : segment.end].double()
            torch.testing.assert_close(actual, expected, rtol=ROUNDING[self.dtype], atol=ROUNDING[self.dtype])


def seen(past: int, num_tokens: int, sliding_window: int | None = None) -> torch.Tensor:
    """Which keys each new token may attend to: [tokens, keys] bool."""
    window = math.inf if sliding_window is None else sliding_window
    return torch.tensor([
        [query - window < key <= query for key in range(past + num_tokens)] for query in range(past, past + num_tokens)
    ])  # fmt: skip


def formula(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (keys, values))
    scores = queries.double() @ keys.mT * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~visible, -math.inf).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if s_aux is not None:
        total = total + s_aux.double().exp().reshape(-1, 1, 1)
    return weights / total @ values


sequences = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=4)
heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2)])
dims = st.sampled_from([(8, 8), (8, 4), (4, 12)])


# Each segment alone


@given(
    sequences,
    heads,
    dims,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 1, 3, 17, 1000]),
)
def test_as_the_formula(
    packed: list[tuple[int, int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    scaling: float | None,
    window: int | None,
) -> None:
    with closing(PackedAttention()) as attention:
        row = Row(packed, num_heads=heads[0], num_kv_heads=heads[1], dims=dims, dtype=dtype)
        row.check(row.attend(attention, scaling=scaling, sliding_window=window), scaling=scaling, sliding_window=window)


@given(
    sequences,
    heads,
    st.sampled_from([None, 2.0, 50.0]),
    st.booleans(),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 3, 17]),
)
def test_capped_scores_and_sinks_as_the_formula(
    packed: list[tuple[int, int]],
    heads: tuple[int, int],
    softcap: float | None,
    sinks: bool,
    scaling: float | None,
    window: int | None,
) -> None:
    s_aux = noise(heads[0], seed=7) if sinks else None
    with closing(PackedAttention()) as attention:
        row = Row(packed, num_heads=heads[0], num_kv_heads=heads[1])
        kwargs = {"softcap": softcap, "s_aux": s_aux, "scaling": scaling, "sliding_window": window}
        row.check(row.attend(attention, **kwargs), **kwargs)


@pytest.mark.parametrize("kwargs", WAYS, ids=str)
def test_to_the_last_bit_the_same_whoever_shares_the_row(attention: PackedAttention, kwargs: dict[str, Any]) -> None:
    alone = Row([(20, 3)]).attend(attention, **kwargs)
    crowded = Row([(20, 3), (0, 17), (33, 1)]).attend(attention, **kwargs)
    assert torch.equal(crowded[:, :3], alone)


@pytest.mark.parametrize("kwargs", WAYS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 9])
def test_long_chunks_attend_in_pieces(
    attention: PackedAttention, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any], num_tokens: int
) -> None:
    monkeypatch.setattr(attention_module, "QUERY_TOKENS", 4)
    row = Row([(3, 2), (20, num_tokens), (0, num_tokens)])
    row.check(row.attend(attention, **kwargs), **kwargs)


def test_a_dropped_segment_gets_zeros_and_the_others_what_they_get_anyway(attention: PackedAttention) -> None:
    row = Row([(20, 3), (5, 2), (0, 4)])
    before = row.attend(attention)
    row.segments[1].dropped = True
    output = row.attend(attention)
    row.check(output)
    assert torch.equal(output[:, :3], before[:, :3])
    assert torch.equal(output[:, 5:], before[:, 5:])


def test_a_segment_may_build_on_what_another_computes_in_the_same_row(attention: PackedAttention) -> None:
    whole = Row([(0, 20)])
    expected = whole.attend(attention)
    parted = Row([(0, 20)])
    (segment,) = parted.segments
    follower = SequenceKV(segment.kv.pool, list(segment.kv.blocks))
    parted.segments = [Segment(0, 16, segment.kv, 0), Segment(16, 20, follower, 16)]
    queries, keys, values = parted.alone[0]
    parted.alone = [(queries[:, :, :16], keys, values), (queries[:, :, 16:], keys, values)]
    attention.cache = PackedCache(parted.segments, concatenate=False)
    new = attention.cache.update(keys, values, 0)
    output, _ = attention(torch.nn.Identity(), queries, *new, None)
    torch.testing.assert_close(output, expected)
    assert follower.length == 0


# Query heads of one key head as rows of one matrix


@given(heads, st.integers(0, 40), st.integers(1, 20), dims, st.sampled_from([None, 0.3]), st.sampled_from([None, 3]))
def test_grouped_heads_as_torch_has_them(
    heads: tuple[int, int], past: int, num_tokens: int, dims: tuple[int, int], scale: float | None, window: int | None
) -> None:
    queries = noise(1, heads[0], num_tokens, dims[0], seed=1)
    keys = noise(1, heads[1], past + num_tokens, dims[0], seed=2)
    values = noise(1, heads[1], past + num_tokens, dims[1], seed=3)
    mask = seen(past, num_tokens, window)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    torch.testing.assert_close(_grouped_attention(queries, keys, values, mask, scale), expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_without_groups_it_is_torch_s_to_the_last_bit(num_tokens: int) -> None:
    queries, keys, values = noise(1, 4, num_tokens, 16, seed=1), noise(1, 4, 50, 16, seed=2), noise(1, 4, 50, 8, seed=3)
    mask = None if num_tokens == 1 else seen(50 - num_tokens, num_tokens)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    assert torch.equal(_grouped_attention(queries, keys, values, mask, None), expected)


# Models that attend by themselves


def test_the_mask_over_concatenated_keys() -> None:
    """Under it a whole row attends as each segment alone."""
    row = Row([(3, 2), (0, 4), (17, 1)])
    mask = block_diagonal_mask(row.segments, torch.float32)
    assert mask.shape == (1, 1, 7, 27)
    queries, keys, values = (torch.cat([one[i] for one in row.alone], dim=2) for i in range(3))
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    row.check(output.transpose(1, 2))


# What a model may ask for


@pytest.mark.parametrize(("kwargs", "eager"), list(zip(WAYS, [False, False, True, True], strict=True)))
def test_what_takes_memory_for_all_scores_is_remembered(
    attention: PackedAttention, kwargs: dict[str, Any], eager: bool
) -> None:
    Row([(20, 3)]).attend(attention, **kwargs)
    assert attention.eager == eager


def test_windows_are_remembered_by_layer(attention: PackedAttention) -> None:
    row = Row([(20, 3)])
    row.attend(attention, sliding_window=7)
    assert attention.windows == {0: 7}
    row.attend(attention)
    assert attention.windows == {0: None}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"head_mask": torch.ones(4)}, "'head_mask'"), ({"alibi": 1.0}, "'alibi'"), ({"chunk": 3}, "'chunk'")],
)
def test_what_would_be_left_out_is_refused(attention: PackedAttention, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        Row([(0, 2)]).attend(attention, **kwargs)


def test_what_has_no_meaning_here_is_not(attention: PackedAttention) -> None:
    row = Row([(0, 2)])
    without_meaning = {"dropout": 0.1, "position_ids": torch.arange(2), "is_causal": True}
    row.check(row.attend(attention, **without_meaning, some_flag=False, alibi=None))


def test_keys_values_and_masks_must_be_the_cache_s(attention: PackedAttention) -> None:
    row = Row([(0, 2)])
    row.attend(attention)
    queries, keys, values = row.alone[0]
    module = torch.nn.Identity()
    returned = attention.cache.update(keys, values, 0)
    with pytest.raises(UnsupportedModelError, match="Identity attends to keys that"):
        attention(module, queries, keys.clone(), returned[1], None)
    with pytest.raises(UnsupportedModelError, match="Identity attends to values that"):
        attention(module, queries, returned[0], values.clone(), None)
    with pytest.raises(UnsupportedModelError, match="Identity attends under a mask of its own"):
        attention(module, queries, *returned, torch.zeros(1, 1, 2, 2))
    attention.cache = None
    with pytest.raises(UnsupportedModelError, match="Identity attends to keys that"):
        attention(module, queries, *returned, None)


def test_a_name_of_its_own_until_it_is_closed() -> None:
    first, second = PackedAttention(), PackedAttention()
    assert first.name != second.name
    assert AttentionInterface._global_mapping[first.name] is first
    first.close()
    assert first.name not in AttentionInterface._global_mapping
    assert AttentionInterface._global_mapping[second.name] is second
    second.close()
