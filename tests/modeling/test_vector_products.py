"""One token with a large bfloat16 weight is multiplied by `mv`: rounded once, and nothing else changes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.modeling import vector_products
from hermes_async.modeling.module_tensors import Place
from hermes_async.modeling.vector_products import VectorWeight, has_vector_weights, may_be_vector_weight, measured_gain

ROWS, COLUMNS = 512, 768


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(ROWS, COLUMNS).to(torch.bfloat16)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that were called, in their order."""
    called: list[str] = []
    for name in ("mv", "addmv"):
        function = getattr(torch, name)

        def observed(*args: Any, name: str = name, function: Any = function) -> Any:
            called.append(name)
            return function(*args)

        monkeypatch.setattr(torch, name, observed)
    return called


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (1, 1, COLUMNS)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_token_is_rounded_once(
    weight: torch.Tensor, products: list[str], shape: tuple[int, ...], with_bias: bool
) -> None:
    inputs = torch.randn(shape).to(torch.bfloat16)
    bias = torch.randn(ROWS).to(torch.bfloat16) if with_bias else None
    with torch.inference_mode():
        result = F.linear(inputs, VectorWeight(weight, requires_grad=False), bias)
    assert products == ["addmv" if with_bias else "mv"]
    assert type(result) is torch.Tensor
    assert (result.shape, result.dtype) == ((*shape[:-1], ROWS), torch.bfloat16)
    exact = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    # Half a unit in the last place of bfloat16's eight bits, and what a sum of 768 numbers loses in float32.
    terms = F.linear(inputs.double().abs(), weight.double().abs())
    assert bool(((result.double() - exact).abs() <= exact.abs() * 2**-8 + terms * 768 * 2**-24).all())


@pytest.mark.parametrize("num_tokens", [0, 2, 5])
def test_other_numbers_of_tokens_are_multiplied_as_ever(
    weight: torch.Tensor, products: list[str], num_tokens: int
) -> None:
    inputs = torch.randn(num_tokens, COLUMNS).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(F.linear(inputs, VectorWeight(weight, requires_grad=False)), F.linear(inputs, weight))
    assert products == []


def test_everything_else_is_as_with_a_parameter(weight: torch.Tensor) -> None:
    own = VectorWeight(weight, requires_grad=False)
    assert isinstance(own, nn.Parameter)
    assert own.data_ptr() == weight.data_ptr()
    with torch.inference_mode():
        for result, expected in ((own.t(), weight.t()), (own[3], weight[3]), (own + 1, weight + 1)):
            assert type(result) is torch.Tensor
            assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16), True),
        (nn.Linear(COLUMNS, ROWS, dtype=torch.float32), False),
        (nn.Linear(COLUMNS, ROWS, dtype=torch.float16), False),
        (nn.Linear(COLUMNS, 8, dtype=torch.bfloat16), False),
        (nn.Embedding(ROWS, COLUMNS, dtype=torch.bfloat16), False),
    ],
    ids=["bfloat16", "float32", "float16", "small", "embedding"],
)
def test_only_large_bfloat16_weights_of_linear_layers(module: nn.Module, expected: bool) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert may_be_vector_weight(Place(module, "weight"), weight) is expected
    assert has_vector_weights(nn.ModuleList([module])) is expected


@pytest.mark.parametrize(("linear_s", "mv_s", "gain"), [(3.0, 2.0, 1.5), (2.0, 3.0, 2 / 3)])
def test_the_gain_is_of_the_fastest_times(
    monkeypatch: pytest.MonkeyPatch, linear_s: float, mv_s: float, gain: float
) -> None:
    now, slowed = 0.0, itertools.cycle((7.0, 1.0, 1.0, 1.0, 5.0))  # by other programs
    linear, mv = F.linear, torch.mv

    def slow_linear(*args: Any) -> torch.Tensor:
        nonlocal now
        now += linear_s * next(slowed)
        return linear(*args)

    def slow_mv(*args: Any) -> torch.Tensor:
        nonlocal now
        now += mv_s * next(slowed)
        return mv(*args)

    monkeypatch.setattr(vector_products.F, "linear", slow_linear)
    monkeypatch.setattr(torch, "mv", slow_mv)
    monkeypatch.setattr(vector_products.time, "perf_counter", lambda: now)
    assert measured_gain() == pytest.approx(gain)
