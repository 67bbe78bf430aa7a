"""The switch between oneDNN's kernels and torch's own is the process's, and everybody who turns it turns it back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from hermes_async.modeling import kernels
from hermes_async.modeling.kernels import bounded_attention, bounded_attention_kernels, without_one_dnn


def is_on() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = is_on()
    yield
    torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("before", [True, False])
def test_it_comes_back_as_it_was(before: bool) -> None:
    torch._C._set_mkldnn_enabled(before)
    with pytest.raises(ZeroDivisionError), without_one_dnn():
        assert not is_on()
        _ = 1 / 0
    assert is_on() is before


def test_it_stays_off_until_the_last_has_turned_it_back() -> None:
    torch._C._set_mkldnn_enabled(True)
    first, second = without_one_dnn(), without_one_dnn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as another thread's sweep ends, which began earlier
    assert not is_on()
    second.__exit__(None, None, None)
    assert is_on()


@pytest.fixture
def packs_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with matrix instructions."""
    torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(kernels, "_packs_attention", lambda dtype: dtype == torch.bfloat16)


@pytest.mark.usefixtures("packs_bfloat16")
@pytest.mark.parametrize(
    ("num_queries", "dtype", "on"),
    [(64, torch.bfloat16, False), (63, torch.bfloat16, True), (64, torch.float32, True)],
)
def test_attention_that_would_keep_kernels_is_computed_without(num_queries: int, dtype: torch.dtype, on: bool) -> None:
    with bounded_attention_kernels(torch.zeros(1, 2, num_queries, 8, dtype=dtype)):
        assert is_on() is on
    assert is_on()


@pytest.mark.usefixtures("packs_bfloat16")
@pytest.mark.parametrize("by_name", [True, False])
def test_so_is_attention_that_is_a_model_s_own(by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(kernels, "bounded_attention_kernels", lambda q: seen.append(q) or bounded_attention_kernels(q))
    queries = torch.ones(1, 2, 64, 8, dtype=torch.bfloat16)
    with bounded_attention(torch.bfloat16):
        if by_name:
            attended = F.scaled_dot_product_attention(query=queries, key=queries, value=queries, is_causal=True)
        else:
            attended = F.scaled_dot_product_attention(queries, queries, queries, is_causal=True)
        assert is_on()  # for all that is not attention
    assert len(seen) == 1
    assert seen[0] is queries
    assert torch.equal(attended, queries)


@pytest.mark.usefixtures("packs_bfloat16")
@pytest.mark.parametrize(("most_queries", "num_looked_at"), [(None, 1), (64, 1), (63, 0)])
def test_attention_with_few_queries_is_not_looked_at(
    most_queries: int | None, num_looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(kernels, "bounded_attention_kernels", lambda q: seen.append(q) or bounded_attention_kernels(q))
    queries = torch.ones(1, 2, 8, 8, dtype=torch.bfloat16)
    with bounded_attention(torch.bfloat16, most_queries):
        F.scaled_dot_product_attention(queries, queries, queries)
    assert len(seen) == num_looked_at
