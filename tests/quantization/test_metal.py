"""The method "metal" of transformers, beside its own dequantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.integrations.metal_quantization import _affine_dequantize_tensor, _affine_quantize_tensor

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.metal import AffineWordsEncoding
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import read_tensors
from tests.quantization.float_formats import SMALL, check_engine, save


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_those_of_transformers(bits: int, dtype: Any) -> None:
    torch.manual_seed(bits)
    words, scales, offsets = _affine_quantize_tensor(torch.randn(24, 128), 32, bits)
    parts = {"scales": scales.to(dtype), "qbiases": offsets.to(dtype)}
    expected = _affine_dequantize_tensor(words, parts["scales"], parts["qbiases"], 32, bits).to(dtype)
    parts["weight"] = words.view(torch.uint8)
    for out_dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(10, 128, dtype=out_dtype)
        AffineWordsEncoding(bits, 32).dequantize(parts, 7, 17, out)
        assert torch.equal(out, expected[7:17].to(out_dtype))


def quantize(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    if "proj" not in name:
        return None
    words, scales, offsets = _affine_quantize_tensor(weight, 32, 4)
    base = name.removesuffix(".weight")
    values = _affine_dequantize_tensor(words, scales, offsets, 32, 4)
    return {name: words, f"{base}.scales": scales, f"{base}.qbiases": offsets}, values


@pytest.mark.anyio
async def test_a_model(tmp_path: Path) -> None:
    settings = {"quant_method": "metal", "bits": 4, "group_size": 32}
    await check_engine(tmp_path, save(tmp_path, LlamaConfig(**SMALL), settings, quantize), "packed")


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"bits": 3}, {}, "says 3 bits"),
        ({"group_size": 0}, {}, "groups of 0"),
        ({"group_size": 2**60}, {}, "groups of"),
        ({"group_size": 24}, {}, "128 columns are no whole number of groups of 24"),
        ({}, {"a.scales": torch.ones(8, 3)}, r"'a.scales' has shape \[8, 3\]"),
        ({}, {"a.qbiases": torch.ones(8, 2, dtype=torch.int32)}, "its 'qbiases' has no floating-point numbers"),
        ({}, {"a.qbiases": None}, "its 'qbiases' is missing"),
    ],
)
def test_bad_files(tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], message: str) -> None:
    words, scales, offsets = _affine_quantize_tensor(torch.randn(8, 128), 64, 4)
    stored = {"a.weight": words, "a.scales": scales, "a.qbiases": offsets} | tensors
    save_file({name: one for name, one in stored.items() if one is not None}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptShardError, match=message) as caught:
        quantized_matrices(tmp_path, "metal", settings, read_tensors(tmp_path))
    assert str(tmp_path / "model.safetensors") in str(caught.value)
