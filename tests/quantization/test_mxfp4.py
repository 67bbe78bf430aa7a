"""MXFP4, as gpt-oss has it: its numbers are those of transformers, and a model gives transformers' answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.block_scales import BlockSize
from hermes_async.quantization.encoded_weight import EncodedWeight
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.quantization.mxfp4 import Mxfp4Encoding
from hermes_async.storage.tensor_spec import TensorSpec
from tests.quantization.float_formats import SMALL, check_engine, e2m1, save

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U8 = torch.uint8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lowest", "highest"), [(100, 128), (0, 255)], ids=["scales of models", "all scales"])
def test_every_byte_times_every_scale(dtype: torch.dtype, lowest: int, highest: int) -> None:
    scale = torch.arange(lowest, highest, dtype=U8).view(-1, 1).expand(-1, 16).contiguous()
    packed = torch.arange(256, dtype=U8).expand(len(scale), -1).contiguous()
    out = torch.empty(len(scale), 512, dtype=dtype)
    Mxfp4Encoding().dequantize({"weight": packed, "scale": scale}, 0, len(scale), out)
    numbers = e2m1(packed[0])
    expected = (numbers * 2.0 ** (scale[:, :1].double() - 127)).to(dtype)
    assert torch.equal(out, expected)
    of_transformers = convert_moe_packed_tensors(packed.view(1, len(scale), 16, 16), scale[None], dtype=dtype)
    assert torch.equal(out, of_transformers[0].T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 32), (8, 64), (1, None), (None, None)])
def test_experts_in_fp4_with_scales_of_any_kind(dtype: torch.dtype, block: tuple[int | None, int | None]) -> None:
    encoding, generator = Mxfp4Encoding(BlockSize(*block)), torch.Generator().manual_seed(2)
    packed = torch.randint(0, 256, (16, 64), generator=generator, dtype=U8)
    scale = torch.randn(*encoding.shapes(16, 128)["scale"], generator=generator)
    each = scale.repeat_interleave(block[0] or 16, 0).repeat_interleave(block[1] or 128, 1)
    out = torch.empty(8, 128, dtype=dtype)
    encoding.dequantize({"weight": packed.view(torch.int8), "scale": scale}, 8, 16, out)
    assert torch.equal(out, (e2m1(packed) * each).to(dtype)[8:])


def gpt_oss(path: Path) -> Any:
    def quantize(name: str, weight: torch.Tensor) -> Any:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        num_experts, columns, rows = weight.shape
        blocks = torch.randint(0, 256, (num_experts, rows, columns // 32, 16), dtype=U8)
        scales = torch.randint(121, 125, blocks.shape[:-1], dtype=U8)
        values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        return {"_".join((name, "blocks")): blocks, "_".join((name, "scales")): scales}, values

    config = GptOssConfig(
        **SMALL,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return save(path, config, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, quantize)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("gpt-oss")
    return path, gpt_oss(path)


@pytest.mark.anyio
@pytest.mark.parametrize("batching", ["packed", "turns"])
async def test_gpt_oss(model: tuple[Path, Any], batching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: EncodedWeight) -> torch.Tensor:
        raise AssertionError(f"all {list(self.shape)} numbers of a weight were dequantized at once")

    monkeypatch.setattr(EncodedWeight, "dequantized", refuse)
    await check_engine(*model, batching)


def found_in(*tensors: tuple[str, torch.dtype, tuple[int, ...]]) -> dict[str, Any]:
    specs = {name: TensorSpec(name, Path("m.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    return quantized_matrices(Path("m"), "mxfp4", {}, specs)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("e.w_blocks", U8, (2, 8, 3, 16))], "'e.w_blocks' is in MXFP4, and its scales .'e.w_scales'. are missing"),
        ([("e.w_blocks", U8, (2, 8, 3, 8)), ("e.w_scales", U8, (2, 8, 3))], r"shape \[2, 8, 3, 8\]; blocks of MXFP4"),
        (
            [("e.w_blocks", U8, (2, 8, 48)), ("e.w_scales", U8, (2, 8, 3))],
            r"have the shape \[experts, rows, groups, 16",
        ),
        (
            [("e.w_blocks", U8, (2, 8, 3, 16)), ("e.w_scales", U8, (2, 8, 2))],
            r"'e.w_scales' has shape \[2, 8, 2\], .* it would have \[2, 8, 3\]",
        ),
        (
            [("e.w_blocks", U8, (2, 8, 3, 16)), ("e.w_scales", torch.float32, (2, 8, 3))],
            "'e.w_scales' is in float32; MXFP4 is stored as uint8",
        ),
        (
            [("e.w_blocks", torch.int8, (2, 8, 3, 16)), ("e.w_scales", U8, (2, 8, 3))],
            "'e.w_blocks' is in int8; MXFP4 is stored as uint8",
        ),
    ],
)
def test_bad_tensors(tensors: Any, message: str) -> None:
    with pytest.raises(CorruptShardError, match=message) as caught:
        found_in(*tensors)
    assert "m.safetensors" in str(caught.value)
