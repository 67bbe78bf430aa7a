"""BitNet's packed numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from hermes_async.errors import CheckpointError, CorruptShardError, UnsupportedModelError
from hermes_async.quantization.bitnet import TernaryEncoding
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import read_tensors
from tests.quantization.float_formats import SMALL, check_engine, save


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """Each byte has the numbers of four rows, one of each quarter."""
    quarters = (numbers + 1).to(torch.uint8).view(4, -1, numbers.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


@pytest.mark.parametrize("divides", [False, True])
def test_rows_of_each_quarter(divides: bool) -> None:
    numbers = torch.randint(-1, 2, (24, 8), dtype=torch.int8)
    scale = torch.tensor([0.3], dtype=torch.bfloat16)
    parts = {"weight": packed(numbers), "scale": scale}
    expected = numbers / scale.float() if divides else numbers * scale.float()
    for start, stop in ((0, 24), (5, 19), (6, 12), (23, 24)):
        out = torch.empty(stop - start, 8)
        TernaryEncoding(divides).dequantize(parts, start, stop, out)
        assert torch.equal(out, expected[start:stop])


def quantize(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    if "proj" not in name:
        return None
    numbers, scale = torch.randint(-1, 2, weight.shape, dtype=torch.int8), torch.rand(1) / 10 + 0.1
    return {name: packed(numbers), f"{name}_scale": scale}, numbers * scale


@pytest.mark.anyio
async def test_a_model(tmp_path: Path) -> None:
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    await check_engine(tmp_path, save(tmp_path, LlamaConfig(**SMALL), settings, quantize), "packed")


@pytest.mark.parametrize(
    ("settings", "tensors", "error", "message"),
    [
        ({}, {"a.weight_scale": None}, CorruptShardError, r"its scale \('a.weight_scale'\) is missing"),
        ({}, {"a.weight_scale": torch.ones(2)}, CorruptShardError, "'a.weight_scale' has shape"),
        ({}, {"a.weight_scale": torch.ones(1, dtype=torch.int8)}, CorruptShardError, "has no floating-point number"),
        ({}, {"a.weight": torch.ones(8, 8)}, UnsupportedModelError, "'a.weight', of BitNet, is not packed"),
        ({"use_rms_norm": True}, {}, UnsupportedModelError, "has layers that normalize their inputs"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], error: type[CheckpointError], message: str
) -> None:
    stored = {"a.weight": torch.ones(2, 8, dtype=torch.uint8), "a.weight_scale": torch.ones(1)} | tensors
    save_file({name: one for name, one in stored.items() if one is not None}, tmp_path / "model.safetensors")
    with pytest.raises(error, match=message) as caught:
        quantized_matrices(tmp_path, "bitnet", settings, read_tensors(tmp_path))
    assert str(tmp_path / "model.safetensors") in str(caught.value)
