"""An encoded weight stands for a plain one in a module: each function of torch gives what it gives for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hermes_async.quantization import fp8
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products
from hermes_async.quantization.block_scales import BlockSize
from hermes_async.quantization.encoded_weight import EncodedParameter, EncodedWeight, uses_rows
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.fp8 import Fp8Encoding
from hermes_async.storage.tensor_spec import TensorSpec

ROWS, COLUMNS, BLOCK = 24, 16, 8
ORDER = tuple(reversed(range(ROWS)))


def spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, Path("model.safetensors"), 0, dtype.itemsize, dtype, shape)


def made(
    *,
    experts: int = 0,
    per_expert: int = 1,
    transposed: bool = False,
    order: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    products: Bfloat16Products = LINEAR,
) -> tuple[EncodedWeight, torch.Tensor]:
    """A weight of FP8 matrices, and the same weight as a plain tensor."""
    generator = torch.Generator().manual_seed(0)
    parts, plain, matrices = {}, [], []
    encoding = Fp8Encoding(BlockSize(BLOCK, BLOCK))
    for idx in range(max(1, experts) * per_expert):
        weight = torch.randn(ROWS, COLUMNS, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(ROWS // BLOCK, COLUMNS // BLOCK, generator=generator) + 0.5
        parts |= {f"w/{idx}/weight": weight, f"w/{idx}/scale": scale}
        values = weight.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        plain.append(values if order is None else values[list(order)])
        stored = {
            "weight": spec("weight", weight.dtype, (ROWS, COLUMNS)),
            "scale": spec("scale", torch.float32, tuple(scale.shape)),
        }
        matrices.append(StoredMatrix(encoding, (ROWS, COLUMNS), stored, transposed, order))
    weight = torch.cat(plain)
    if experts:
        weight = weight.view(experts, per_expert * ROWS, COLUMNS)
    weight = weight.mT if transposed else weight
    parameter = EncodedParameter("w", tuple(weight.shape), dtype, tuple(matrices))
    return EncodedWeight.of(parameter, parts.__getitem__, products), weight.to(dtype)


INPUTS = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1))
BIAS = torch.arange(float(ROWS))


@pytest.mark.parametrize("order", [None, ORDER], ids=["as stored", "other order"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["without bias", "with bias"])
def test_linear(order: tuple[int, ...] | None, bias: torch.Tensor | None) -> None:
    encoded, plain = made(order=order)
    torch.testing.assert_close(F.linear(INPUTS, encoded, bias), F.linear(INPUTS, plain, bias))


@pytest.mark.parametrize("order", [None, ORDER], ids=["as stored", "other order"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_linear_in_16_bits(order: tuple[int, ...] | None, dtype: torch.dtype, num_tokens: int) -> None:
    encoded, plain = made(order=order, per_expert=2, dtype=dtype)
    inputs = INPUTS[0, :num_tokens].to(dtype)
    torch.testing.assert_close(F.linear(inputs, encoded), F.linear(inputs, plain))
    bias = torch.cat([BIAS, -BIAS]).to(dtype)
    torch.testing.assert_close(F.linear(inputs, encoded, bias), F.linear(inputs, plain, bias))


def test_matrices_behind_one_another() -> None:
    encoded, plain = made(per_expert=3)
    assert encoded.shape == (3 * ROWS, COLUMNS)
    torch.testing.assert_close(F.linear(INPUTS, encoded), F.linear(INPUTS, plain))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda weight: INPUTS @ weight,
        lambda weight: torch.matmul(INPUTS, weight),
        lambda weight: torch.mm(INPUTS[0], weight),
        lambda weight: torch.addmm(BIAS, INPUTS[0], weight),
        lambda weight: F.linear(INPUTS, weight.t()),
        lambda weight: F.linear(INPUTS, weight.T, BIAS),
        lambda weight: F.linear(INPUTS, weight.transpose(0, 1)),
    ],
)
def test_a_transposed_weight(multiply: Callable[[torch.Tensor], torch.Tensor]) -> None:
    encoded, plain = made(transposed=True)
    assert encoded.shape == (COLUMNS, ROWS)
    torch.testing.assert_close(multiply(encoded), multiply(plain))


@pytest.mark.parametrize("index", [2, -1, torch.tensor(1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_is_dequantized_alone(index: int | torch.Tensor, transposed: bool) -> None:
    encoded, plain = made(experts=4, per_expert=2, transposed=transposed)
    expert = encoded[index]
    assert isinstance(expert, EncodedWeight)
    assert expert.shape == plain[index].shape
    inputs = INPUTS[0]
    result = inputs @ expert if transposed else F.linear(inputs, expert)
    torch.testing.assert_close(result, inputs @ plain[index] if transposed else F.linear(inputs, plain[index]))
    with pytest.raises(IndexError):
        encoded[4]


@pytest.mark.parametrize("order", [None, ORDER], ids=["as stored", "other order"])
def test_rows_are_looked_up(order: tuple[int, ...] | None) -> None:
    encoded, plain = made(order=order)
    ids = torch.tensor([[0, ROWS - 1, 5], [5, 9, 0]])
    torch.testing.assert_close(F.embedding(ids, encoded), F.embedding(ids, plain))


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight * 2,
        lambda weight: weight.view(ROWS, 2, -1).sum(1),
        lambda weight: torch.cat([weight, weight]),
        lambda weight: weight[3:5],
        lambda weight: weight.float(),
        lambda weight: torch.einsum("btc,rc->btr", INPUTS, weight),
    ],
)
def test_any_other_use_gets_the_whole_weight(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    encoded, plain = made()
    result = use(encoded)
    assert not isinstance(result, EncodedWeight)
    torch.testing.assert_close(result, use(plain))


def test_its_shape_and_dtype_are_known_without_its_values() -> None:
    encoded, plain = made()
    assert (encoded.shape, encoded.dtype, encoded.device) == (plain.shape, plain.dtype, plain.device)
    assert (encoded.dim(), encoded.numel(), encoded.size(0), len(encoded)) == (2, ROWS * COLUMNS, ROWS, ROWS)
    assert encoded.is_floating_point()


def test_which_uses_need_the_whole_weight() -> None:
    plain = torch.zeros(3, 4, 4)
    assert uses_rows(F.linear, (plain, plain))
    assert uses_rows(torch.Tensor.__getitem__, (plain, 1))
    assert not uses_rows(torch.Tensor.__getitem__, (plain, torch.tensor([1, 2])))
    assert not uses_rows(torch.Tensor.view, (plain, -1))
    assert not uses_rows(torch.bmm, (plain, plain))


@pytest.mark.parametrize("with_bias", [False, True])
def test_many_tokens_are_multiplied_in_float32_where_that_is_faster(with_bias: bool) -> None:
    weight, plain = made(dtype=torch.bfloat16, products=Bfloat16Products(widened_tokens=4))
    inputs = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    bias = BIAS.to(torch.bfloat16) if with_bias else None
    with torch.inference_mode():
        expected = F.linear(inputs.float(), plain.float(), None if bias is None else bias.float()).to(torch.bfloat16)
        torch.testing.assert_close(F.linear(inputs, weight, bias), expected, rtol=2**-7, atol=2**-7)
        assert torch.equal(F.linear(inputs[:3], weight, bias), F.linear(inputs[:3], plain, bias))


def test_one_token_may_be_multiplied_with_the_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_LEAST_BLOCK_ROWS", 1)
    inputs = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    called = []
    product = fp8.Fp8Encoding.scaled_product
    monkeypatch.setattr(fp8.Fp8Encoding, "scaled_product", lambda *args: (called.append(1), product(*args))[1])
    for scales_inputs in (False, True):
        weight, plain = made(dtype=torch.bfloat16, products=Bfloat16Products(scales_inputs=scales_inputs))
        with torch.inference_mode():
            exact = F.linear(inputs.float(), plain.float())
            bound = F.linear(inputs.float().abs(), plain.float().abs()) * 2**-7
            assert bool(((F.linear(inputs, weight).float() - exact).abs() <= bound).all())
            F.linear(inputs.expand(2, COLUMNS), weight)
            F.linear(inputs, weight, torch.zeros(ROWS, dtype=torch.bfloat16))
        assert len(called) == scales_inputs  # not with several tokens, nor with a bias
