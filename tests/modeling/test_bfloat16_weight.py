"""A large bfloat16 weight is multiplied by the chosen function: results are rounded once, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.modeling import bfloat16_weight
from hermes_async.modeling.bfloat16_weight import Bfloat16Weight, bfloat16_shapes, may_be_bfloat16_weight
from hermes_async.modeling.module_tensors import Place
from hermes_async.quantization import bfloat16_products
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products, WidenedInputs
from hermes_async.quantization.row_threads import ONE_THREAD
from hermes_async.quantization.tile_products import TiledInputs

ROWS, COLUMNS = 512, 768
BOTH = Bfloat16Products(vector_gain=2.0, widened_tokens=4, widened_gain=3.0)
TILED = Bfloat16Products(widened_tokens=16, widened_gain=2.0, tiled_tokens=range(2, 65), tiled_gain=3.0)


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(ROWS, COLUMNS).to(torch.bfloat16)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that were called, in their order."""
    names: list[str] = []

    def observe(module: Any, name: str) -> None:
        function = getattr(module, name)

        def observed(*args: Any) -> Any:
            names.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, observed)

    observe(torch, "mv")
    observe(torch, "addmv")
    observe(bfloat16_products, "WidenedInputs")
    return names


def check_rounded_once(
    result: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    exact = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    # Half a unit in the last place of bfloat16's eight bits, and what a sum of 768 numbers loses in float32.
    terms = F.linear(inputs.double().abs(), weight.double().abs())
    assert bool(((result.double() - exact).abs() <= exact.abs() * 2**-8 + terms * COLUMNS * 2**-24).all())


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (1, 1, COLUMNS), (4, COLUMNS), (1, 9, COLUMNS)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_rounded_once(
    weight: torch.Tensor, called: list[str], shape: tuple[int, ...], with_bias: bool
) -> None:
    inputs = torch.randn(shape).to(torch.bfloat16)
    bias = torch.randn(ROWS).to(torch.bfloat16) if with_bias else None
    with torch.inference_mode():
        result = F.linear(inputs, Bfloat16Weight.of(weight, BOTH), bias)
    if inputs.numel() == COLUMNS:
        assert called == ["addmv" if with_bias else "mv"]
    else:
        assert called == ["WidenedInputs"]
    assert type(result) is torch.Tensor
    assert (result.shape, result.dtype) == ((*shape[:-1], ROWS), torch.bfloat16)
    check_rounded_once(result, inputs, weight, bias)


@pytest.mark.parametrize("block", [COLUMNS // 2, COLUMNS, 5 * COLUMNS, 64 * COLUMNS])
def test_blocks_are_of_any_size(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(bfloat16_products, "_SMALL_BLOCK", block)
    monkeypatch.setattr(bfloat16_products, "_INPUTS", block)
    inputs, bias = torch.randn(13, COLUMNS).to(torch.bfloat16), torch.randn(ROWS).to(torch.bfloat16)
    with torch.inference_mode():
        check_rounded_once(BOTH.linear(inputs, weight, bias), inputs, weight, bias)


@pytest.mark.parametrize("num_tokens", [0, 2, 3])
def test_other_numbers_of_tokens_are_multiplied_as_ever(
    weight: torch.Tensor, called: list[str], num_tokens: int
) -> None:
    inputs = torch.randn(num_tokens, COLUMNS).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(F.linear(inputs, Bfloat16Weight.of(weight, BOTH)), F.linear(inputs, weight))
    assert called == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_multiplied_as_ever(dtype: torch.dtype) -> None:
    for products in (BOTH, TILED):
        assert products.converted(torch.zeros(64, COLUMNS, dtype=dtype), ONE_THREAD) is None
        assert products.converted(torch.zeros(64, COLUMNS, dtype=torch.bfloat16), ONE_THREAD) is not None


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "kind"), [(2, TiledInputs), (64, TiledInputs), (65, WidenedInputs)])
def test_compiled_functions_multiply_their_numbers_of_tokens(
    weight: torch.Tensor, num_tokens: int, kind: type, with_bias: bool
) -> None:
    inputs = torch.randn(num_tokens, COLUMNS).to(torch.bfloat16)
    bias = torch.randn(ROWS).to(torch.bfloat16) if with_bias else None
    assert type(TILED.converted(inputs, ONE_THREAD)) is kind
    with torch.inference_mode():
        check_rounded_once(F.linear(inputs, Bfloat16Weight.of(weight, TILED), bias), inputs, weight, bias)
        across = weight.t().contiguous().t()  # the same numbers, one column after another
        check_rounded_once(F.linear(inputs, Bfloat16Weight.of(across, TILED), bias), inputs, weight, bias)


def test_everything_else_is_as_with_a_parameter(weight: torch.Tensor) -> None:
    own = Bfloat16Weight.of(weight, BOTH)
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
def test_only_large_bfloat16_weights_of_linear_layers(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, expected: bool
) -> None:
    monkeypatch.setattr(bfloat16_weight, "LEAST_ELEMENTS", ROWS * COLUMNS)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert may_be_bfloat16_weight(Place(module, "weight"), weight) is expected
    assert bfloat16_shapes(nn.ModuleList([module])) == ({(ROWS, COLUMNS)} if expected else set())


@pytest.mark.parametrize("num_tokens", [4, 100, 1100])
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (16, 1 << 15), (1 << 15, 16), (3, 1 << 20)])
def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], num_tokens: int) -> None:
    """What the products really make in float32, against the bound."""
    made = 0
    empty, linear = torch.empty, F.linear

    def counted(result: torch.Tensor) -> torch.Tensor:
        nonlocal made
        if result.dtype == torch.float32:
            made += result.nbytes
        return result

    largest = 0

    def product(*args: Any) -> torch.Tensor:
        nonlocal largest
        result = linear(*args)
        largest = max(largest, result.nbytes)
        return result

    weight, inputs = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros((num_tokens, 1), dtype=torch.bfloat16)
    monkeypatch.setattr(bfloat16_products.torch, "empty", lambda *args, **kwargs: counted(empty(*args, **kwargs)))
    monkeypatch.setattr(bfloat16_products.F, "linear", product)
    with torch.inference_mode():
        BOTH.linear(inputs.expand(num_tokens, shape[1]), weight)
    bound = BOTH.scratch_bytes(num_tokens, [shape])
    assert 0 < made + largest <= bound <= max(25 << 20, 9 * shape[1])


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (8192, 4096), (1 << 15, 16)])
def test_more_tokens_never_need_less_scratch_memory(shape: tuple[int, int]) -> None:
    for products in (BOTH, TILED):
        bounds = [products.scratch_bytes(num_tokens, [shape]) for num_tokens in range(1, 5000)]
        assert bounds == sorted(bounds)


def test_few_tokens_need_no_scratch_memory() -> None:
    assert BOTH.scratch_bytes(3, [(ROWS, COLUMNS)]) == 0
    assert LINEAR.scratch_bytes(1000, [(ROWS, COLUMNS)]) == 0
    assert LINEAR.is_linear
    assert not BOTH.is_linear
