"""FP8 weights become exactly the numbers that the format defines, and what is no FP8 matrix is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.block_scales import BlockSize
from hermes_async.quantization.fp8 import Fp8Encoding
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.quantization.mxfp4 import Mxfp4Encoding
from hermes_async.storage.tensor_spec import TensorSpec
from tests.quantization.float_formats import SMALL, check_engine, e2m1, save

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
NUMBERS = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]


def scales(lowest: int, highest: int) -> torch.Tensor:
    """Numbers of each sign and of each exponent between these, with several mantissas."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(lowest, highest + 1).repeat_interleave(4)
    mantissas = 1 + torch.rand(len(exponents), generator=generator)
    mantissas[::4] = 1
    values = torch.ldexp(mantissas, exponents)
    return torch.cat([values, -values, torch.zeros(1)])


def dequantized(encoding: Any, parts: dict[str, torch.Tensor], shape: tuple[int, int], dtype: Any) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    encoding.dequantize(parts, 0, shape[0], out)
    return out


def check_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each bit is the same, but for those of NaN."""
    bits = {4: torch.int32, 2: torch.int16}[found.element_size()]
    same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    assert bool(same.all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (NUMBERS, scales(-149, 7)),
        (NUMBERS, scales(8, 126)),
        (NUMBERS, torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0, 2.0**127])),
        (ALL_BYTES, scales(-149, 126)),
    ],
    ids=["scales of models", "huge scales", "no scales", "NaN among the numbers"],
)
def test_every_number_times_every_scale(dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor) -> None:
    rows = weight.view(FP8).expand(len(scale), -1).contiguous()
    expected = (rows.float() * scale[:, None]).to(dtype)
    one_each = Fp8Encoding(BlockSize(1, None))
    parts = {"weight": rows, "scale": scale[:, None]}
    check_equal(dequantized(one_each, parts, tuple(rows.shape), dtype), expected)
    for row, value in enumerate(scale.tolist()):  # a scale that needs a slower way must not change the others' way
        parts = {"weight": rows[row : row + 1], "scale": scale[row : row + 1, None]}
        check_equal(dequantized(one_each, parts, (1, len(weight)), dtype), expected[row : row + 1])
        assert value == value or bool(expected[row].isnan().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 32), (5, 32), (16, 7), (1, 32), (1, None), (None, 1), (None, None), (7, None)])
def test_blocks_of_each_size(block: tuple[int | None, int | None], dtype: torch.dtype) -> None:
    rows, columns = 48, 96
    encoding, generator = Fp8Encoding(BlockSize(*block)), torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator).to(FP8)
    scale = torch.randn(*encoding.shapes(rows, columns)["scale"], generator=generator)
    height, width = block[0] or rows, block[1] or columns
    each = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    expected = (weight.float() * each).to(dtype)
    parts = {"weight": weight, "scale": scale}
    check_equal(dequantized(encoding, parts, (rows, columns), dtype), expected)
    start, stop = encoding.row_step, min(rows, 3 * encoding.row_step)
    part = torch.empty(stop - start, columns, dtype=dtype)
    encoding.dequantize(parts, start, stop, part)
    check_equal(part, expected[start:stop])


@pytest.mark.parametrize("piece", [96, 96 * 5, 96 * 40])
@pytest.mark.parametrize("block", [(16, 32), (5, 32), (None, None), (1, None)])
def test_a_matrix_in_pieces(block: tuple[int | None, int | None], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 48, 96
    encoding, generator = Fp8Encoding(BlockSize(*block)), torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator).to(FP8)
    weight.view(torch.uint8)[20, 3] = 0x7F  # NaN: its piece is computed another way
    parts = {"weight": weight, "scale": torch.randn(*encoding.shapes(rows, columns)["scale"], generator=generator)}
    expected = dequantized(encoding, parts, (rows, columns), torch.bfloat16)
    monkeypatch.setattr("hermes_async.quantization.fp8.FLOAT16_ELEMENTS", piece)
    check_equal(dequantized(encoding, parts, (rows, columns), torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [E8M0, torch.uint8])
def test_scales_that_are_exponents(dtype: torch.dtype) -> None:
    exponents = torch.arange(90, 160, dtype=torch.uint8)[:, None]
    weight = NUMBERS.view(FP8).expand(len(exponents), -1).contiguous()
    parts = {"weight": weight, "scale": exponents.view(dtype)}
    found = dequantized(Fp8Encoding(BlockSize(1, None)), parts, tuple(weight.shape), torch.bfloat16)
    check_equal(found, (weight.double() * 2.0 ** (exponents.double() - 127)).bfloat16())


# --- a model ---


def blocks_of(weight: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers in e4m3, their blocks' scales, and what they stand for."""
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // height), -(-columns // width)) / 400 + 1 / 800
    each = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    numbers = (weight / each).to(FP8)
    return numbers, scale, numbers.float() * each


def stored(name: str, weight: torch.Tensor) -> Any:
    """Attention has blocks of the configuration's size. Experts are in FP4 in layer 0, and have other blocks in 1."""
    if "proj" not in name:
        return None
    if "self_attn" in name:
        numbers, scale, values = blocks_of(weight, 24, 40)
    elif "layers.1" in name:
        numbers, scale, values = blocks_of(weight, 16, 16)
    else:
        packed = torch.randint(-128, 128, (weight.shape[0], weight.shape[1] // 2), dtype=torch.int8)
        exponents = torch.randint(121, 125, (weight.shape[0], weight.shape[1] // 32), dtype=torch.uint8)
        values = e2m1(packed.view(torch.uint8)) * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 1)
        return {name: packed, name.replace(".weight", ".scale"): exponents.view(E8M0)}, values
    return {name: numbers, f"{name}_scale_inv": scale}, values


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of layer 1 in one tensor each, as transformers saves them."""
    prefix, names = "model.layers.1.mlp.experts", ("gate", "up", "down")
    stacked: dict[str, torch.Tensor] = {name: one for name, one in tensors.items() if not name.startswith(prefix)}
    for end in ("", "_scale_inv"):
        each = [[tensors[f"{prefix}.{idx}.{name}_proj.weight{end}"] for idx in range(64)] for name in names]
        gate, up, down = (torch.stack([one.view(torch.uint8) for one in of_name]) for of_name in each)
        dtype = each[0][0].dtype
        stacked[f"{prefix}.gate_up_proj{end}"] = torch.cat((gate, up), dim=1).view(dtype)
        stacked[f"{prefix}.down_proj{end}"] = down.view(dtype)
    return stacked


@pytest.mark.anyio
@pytest.mark.parametrize("batching", ["packed", "turns"])
async def test_a_mixture_of_experts(tmp_path: Path, batching: str) -> None:
    config = Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    settings = {"quant_method": "fp8", "weight_block_size": [24, 40], "modules_to_not_convert": ["lm_head"]}
    await check_engine(tmp_path, save(tmp_path, config, settings, stored, stack_experts), batching)


# --- which tensors are matrices ---


def spec(name: str, dtype: torch.dtype, *shape: int) -> TensorSpec:
    return TensorSpec(name, Path("model.safetensors"), 0, 0, dtype, shape)


def found_in(tensors: list[TensorSpec], method: str = "fp8", **settings: Any) -> dict[str, Any]:
    return quantized_matrices(Path("m"), method, settings, {one.name: one for one in tensors})


@pytest.mark.parametrize(
    ("weight", "scale", "block"),
    [
        ((256, 512), ("m.weight_scale_inv", torch.float32, 2, 4), (128, 128)),
        ((256, 512), ("m.weight_scale_inv", torch.bfloat16, 4, 4), (64, 128)),
        ((300, 520), ("m.weight_scale_inv", torch.float32, 3, 5), (128, 128)),  # cut below and on the right
        ((256, 512), ("m.scale", E8M0, 2, 4), (128, 128)),
        ((256, 512), ("m.qscale_weight", torch.float32), (None, None)),
        ((256, 512), ("m.weight_scale", torch.uint8, 256, 16), (1, 32)),
        ((256, 512), ("m.weight_scale", torch.float32, 256, 1), (1, None)),
        ((256, 512), ("m.weight_scale", torch.float32, 256), (1, None)),
        ((256, 512), ("m.weight_scale", torch.float32, 1), (None, None)),
        ((3, 256, 512), ("m.weight_scale_inv", torch.float32, 3, 2, 4), (128, 128)),
        ((3, 256, 512), ("m.weight_scale_inv", torch.float32, 3), (None, None)),
        ((3, 256, 512), ("m.weight_scale_inv", torch.float32, 3, 256), (1, None)),
    ],
)
def test_the_grid_of_scales_tells_the_blocks(weight: Any, scale: Any, block: Any) -> None:
    matrices = found_in([spec("m.weight", FP8, *weight), spec(*scale)], weight_block_size=[128, 128])
    assert matrices["m.weight"].encoding == Fp8Encoding(BlockSize(*block))
    assert matrices["m.weight"].shape == weight
    assert all(len(one.shape) == 2 for one in matrices["m.weight"].matrices())


@pytest.mark.parametrize(
    ("scale", "start", "stop"),
    [((2, 4), 128, 256), ((256, 1), 3, 200), ((1, 1), 3, 200), ((3, 4), 128, 300)],
    ids=["blocks", "rows", "one scale", "cut blocks"],
)
def test_rows_of_a_matrix_are_a_matrix(scale: tuple[int, int], start: int, stop: int) -> None:
    tensors = [spec("m.weight", FP8, max(256, stop), 512), spec("m.weight_scale_inv", torch.float32, *scale)]
    matrix = found_in(tensors, weight_block_size=[128, 128])["m.weight"]
    assert matrix.divisible
    assert matrix.can_give_rows(128)
    part = matrix.rows(start, stop)
    part.check()
    assert part.shape == (stop - start, 512)


def test_stacked_experts_and_modules_left_out() -> None:
    tensors = [
        spec("experts.gate_up_proj", FP8, 4, 64, 32),
        spec("experts.gate_up_proj_scale_inv", torch.float32, 4, 2, 1),
        spec("lm_head.weight", torch.bfloat16, 64, 32),
        spec("norm.weight", torch.float32, 32),
        spec("m.input_scale", torch.float32),
    ]
    assert list(found_in(tensors, modules_to_not_convert=["lm_head", "re:.*norm"])) == ["experts.gate_up_proj"]


def test_scales_of_stacked_columns_that_fbgemm_writes_as_rows() -> None:
    tensors = [spec("e.down_proj", FP8, 4, 64, 32), spec("e.down_proj_scale", torch.float32, 4, 32, 1)]
    matrix = found_in(tensors, "fbgemm_fp8")["e.down_proj"]
    assert matrix.encoding == Fp8Encoding(BlockSize(None, 1))
    assert matrix.parts["scale"].shape == (4, 1, 32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_experts_in_fp4(dtype: torch.dtype) -> None:
    tensors = [spec("e.w1.weight", dtype, 8, 32), spec("e.w1.scale", E8M0, 8, 2)]
    matrix = found_in(tensors, weight_block_size=[128, 128])["e.w1.weight"]
    assert (matrix.encoding, matrix.shape) == (Mxfp4Encoding(), (8, 64))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([("m.weight", FP8, 256, 256)], CorruptShardError, r"'m.weight' is quantized .*'m.weight_scale_inv'.* missing"),
        ([("m.weight", torch.int8, 256, 256)], CorruptShardError, "scale .* is missing"),
        (
            [("m.weight", FP8, 256, 256), ("m.weight_scale_inv", torch.float32, 3, 2)],
            CorruptShardError,
            r"'m.weight_scale_inv' has shape \[3, 2\].* FP8 matrix 'm.weight' of shape \[256, 256\] into blocks",
        ),
        (
            [("m.weight", FP8, 256, 256), ("m.weight_scale_inv", torch.float32, 2, 2, 2)],
            CorruptShardError,
            "does not divide",
        ),
        (
            [("m.weight", FP8, 256, 256), ("m.weight_scale_inv", torch.float32, 0, 2)],
            CorruptShardError,
            "does not divide",
        ),
        (
            [("m.weight", FP8, 3, 256, 256), ("m.weight_scale_inv", torch.float32, 2, 2, 2)],
            CorruptShardError,
            r"has shape \[2, 2, 2\], but as the scale .* it would have \[3, 2, 2\]",
        ),
        (
            [("m.weight", FP8, 256, 256), ("m.weight_scale_inv", torch.int32, 2, 2)],
            CorruptShardError,
            "int32.* cannot be the scale",
        ),
        ([("m.weight", FP8, 256), ("m.weight_scale", torch.float32)], CorruptShardError, "cannot be the scale"),
        (
            [("m.weight", torch.float8_e5m2, 256, 256), ("m.weight_scale", torch.float32)],
            UnsupportedModelError,
            "float8_e5m2; .* reads e4m3fn",
        ),
    ],
)
def test_bad_tensors(tensors: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        found_in([spec(*one) for one in tensors])
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("block", [(32, 32), (64, 7), (None, 16), (None, None), (40, None)])
@pytest.mark.parametrize("size", [1.0, 1e-20, 3e4])
def test_one_token_is_multiplied_with_the_scales(block: tuple[int | None, int | None], size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    rows, columns, encoding = 150, 96, Fp8Encoding(BlockSize(*block))
    weight = torch.randn(rows, columns, generator=generator).mul_(40).to(FP8)
    scale = torch.rand(encoding.block.grid(rows, columns), generator=generator) + 0.01
    inputs = torch.randn(columns, generator=generator).mul_(size).to(torch.bfloat16)
    assert encoding.scales_inputs
    with torch.inference_mode():
        found = encoding.scaled_product({"weight": weight, "scale": scale}, inputs)
        exact = torch.empty(rows, columns)
        encoding.dequantize({"weight": weight, "scale": scale}, 0, rows, exact)
    assert found is not None
    products = exact.double() * inputs.double()
    # Each product has one rounding to bfloat16, and so has the sum.
    bound = (products.sum(1).abs() + products.abs().sum(1)) * 2**-8
    assert bool(((found.double() - products.sum(1)).abs() <= bound).all())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 2.0**31, -(2.0**31)])
def test_one_token_and_scales_that_are_too_large(scale: float) -> None:
    encoding = Fp8Encoding(BlockSize(32, 32))
    parts = {"weight": torch.ones(64, 32).to(FP8), "scale": torch.tensor([[1.0], [scale]])}
    assert encoding.scaled_product(parts, torch.ones(32, dtype=torch.bfloat16)) is None


def test_one_token_and_a_weight_that_is_no_number() -> None:
    parts = {"weight": torch.ones(64, 32).to(FP8), "scale": torch.ones(2, 1)}
    parts["weight"][40, 3] = float("nan")
    assert Fp8Encoding(BlockSize(32, 32)).scaled_product(parts, torch.ones(32, dtype=torch.bfloat16)) is None


def test_small_blocks_multiply_weights() -> None:
    assert not Fp8Encoding(BlockSize(1, None)).scales_inputs
    assert not Fp8Encoding(BlockSize(32, 1)).scales_inputs
