"""NVFP4: its numbers are those of the format, and a model in ModelOpt's layout gives a plain model's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.fp8 import Fp8Encoding
from hermes_async.quantization.methods import notes_of, quantized_matrices
from hermes_async.quantization.mxfp4 import Mxfp4Encoding
from hermes_async.quantization.nvfp4 import Nvfp4Encoding
from hermes_async.storage.quantization_settings import quantization
from hermes_async.storage.tensor_spec import TensorSpec
from tests.quantization.float_formats import SMALL, check_engine, e2m1, save

FP8, U8, F32 = torch.float8_e4m3fn, torch.uint8, torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_all", [0.0031, 1.0, 3000.7, 1e-37, 1e37])
@pytest.mark.parametrize("divides", [False, True])
def test_every_byte_times_every_scale(divides: bool, of_all: float, dtype: torch.dtype) -> None:
    scale = torch.arange(256, dtype=U8)
    scale = scale[(scale & 0x7F) != 0x7F].view(FP8)[:, None].expand(-1, 32)
    packed = torch.arange(256, dtype=U8).expand(len(scale), -1).contiguous()
    one = torch.tensor([of_all])
    each = scale.float() / one if divides else scale.float() * one
    expected = (e2m1(packed[0]) * each.repeat_interleave(16, 1)).to(dtype)
    out = torch.empty(len(scale), 512, dtype=dtype)
    parts = {"weight": packed, "scale": scale.contiguous(), "global_scale": one}
    Nvfp4Encoding(divides).dequantize(parts, 0, len(scale), out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    part = torch.empty(3, 512, dtype=dtype)
    Nvfp4Encoding(divides).dequantize(parts, 100, 103, part)
    torch.testing.assert_close(part, expected[100:103], rtol=0, atol=0, equal_nan=True)


@pytest.mark.anyio
async def test_a_mixture_of_experts_in_the_layout_of_modelopt(tmp_path: Path) -> None:
    def quantize(name: str, weight: torch.Tensor) -> Any:
        if "experts" not in name and "_proj" not in name:
            return None
        if "self_attn" in name:  # in FP8, with one scale
            numbers, scale = (weight * 400).to(FP8), torch.tensor(1 / 400)
            own = {name: numbers, f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.ones(())}
            return own, numbers.float() * scale
        packed = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 2), dtype=U8)
        scale = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 50 + 10).to(FP8)
        of_all = torch.tensor(0.003)
        values = e2m1(packed) * (scale.float() * of_all).repeat_interleave(16, 1)
        packed = packed.view(torch.float4_e2m1fn_x2) if "down_proj" in name else packed  # F4 in safetensors
        return {name: packed, f"{name}_scale": scale, f"{name}_scale_2": of_all}, values

    config = Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=48, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    plain = save(tmp_path, config, {}, quantize)
    settings = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))  # and not in config.json
    await check_engine(tmp_path, plain, "packed")
    assert "keys and values keep the model's dtype" in notes_of(*quantization(tmp_path, {}))[-1]  # type: ignore[misc]


def found_in(*tensors: tuple[str, torch.dtype, tuple[int, ...]]) -> dict[str, Any]:
    specs = {name: TensorSpec(name, Path("m.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    return quantized_matrices(Path("m"), "modelopt", {}, specs)


def test_formats_of_modelopt_side_by_side() -> None:
    found = found_in(
        ("a.weight", U8, (8, 16)),
        ("a.weight_scale", FP8, (8, 2)),
        ("a.weight_scale_2", F32, ()),
        ("b.weight", FP8, (8, 16)),
        ("b.weight_scale", F32, ()),
        ("c.weight", U8, (8, 32)),
        ("c.weight_scale", U8, (8, 2)),
        ("d.weight", torch.bfloat16, (8, 16)),
        ("e.weight", U8, (3, 8, 16)),
        ("e.weight_scale", FP8, (3, 8, 2)),
        ("e.weight_scale_2", F32, (3,)),
    )
    encodings = {name: type(matrix.encoding) for name, matrix in found.items()}
    assert encodings == {
        "a.weight": Nvfp4Encoding,
        "b.weight": Fp8Encoding,
        "c.weight": Mxfp4Encoding,
        "e.weight": Nvfp4Encoding,
    }
    assert [one.shape for one in found["e.weight"].matrices()] == [(8, 32)] * 3


WEIGHT = ("m.weight", U8, (8, 16))
SCALE = ("m.weight_scale", FP8, (8, 2))
OF_ALL = ("m.weight_scale_2", F32, ())


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([WEIGHT, OF_ALL], CorruptShardError, "'m.weight' is packed, and its scale .'m.weight_scale'. is missing"),
        ([WEIGHT, SCALE], CorruptShardError, "its second scale .'m.weight_scale_2'. is missing"),
        ([WEIGHT, ("m.weight_scale", torch.bfloat16, (8, 2))], UnsupportedModelError, "scales are in bfloat16; of Mod"),
        (
            [WEIGHT, SCALE, OF_ALL, ("m.pre_quant_scale", F32, (32,))],
            UnsupportedModelError,
            "'m.pre_quant_scale' changes what a layer multiplies with",
        ),
        (
            [WEIGHT, ("m.weight_scale", FP8, (8, 4)), OF_ALL],
            CorruptShardError,
            r"has shape \[8, 4\], but as the scale .* it would have \[8, 2\]",
        ),
        (
            [WEIGHT, SCALE, ("m.weight_scale_2", F32, (8,))],
            CorruptShardError,
            r"'m.weight_scale_2' has shape \[8\], but as the global_scale",
        ),
        (
            [WEIGHT, SCALE, ("m.weight_scale_2", torch.float16, ())],
            CorruptShardError,
            "'m.weight_scale_2' is in float16; NVFP4 has it in float32",
        ),
        (
            [("m.weight", U8, (8, 12)), SCALE, OF_ALL],
            CorruptShardError,
            "groups of 16 numbers do not divide rows of 24",
        ),
    ],
)
def test_bad_tensors(tensors: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        found_in(*tensors)
    assert "m.safetensors" in str(caught.value)
