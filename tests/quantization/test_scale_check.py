"""Scales that would spoil every answer are found when a checkpoint is opened."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from hermes_async import Engine
from hermes_async.errors import CorruptShardError
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import Encoding
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.quantization.scale_check import check_scales
from hermes_async.storage.checkpoint import read_tensors
from tests.quantization.float_formats import SMALL, save

FP8 = torch.float8_e4m3fn


def check(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Checks the scales of an FP8 file with these tensors."""
    save_file(tensors, directory / "model.safetensors")
    matrices = quantized_matrices(directory, "fp8", {}, read_tensors(directory))
    check_scales(EncodedParameter(name, one.shape, torch.float32, (one,)) for name, one in matrices.items())


def fp8(scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three matrices; the second has these scales [4, 2]."""
    good = torch.full((4, 2), 0.5)
    return {
        name: one
        for idx, own in enumerate((good, scale, good))
        for name, one in ((f"{idx}.weight", torch.ones(8, 8).to(FP8)), (f"{idx}.weight_scale_inv", own.clone()))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "is infinite, or not a number"),
        (float("-inf"), "is infinite, or not a number"),
        (0.0, "is zero, which no writer of this format stores"),
    ],
)
def test_a_bad_scale_is_named(tmp_path: Path, dtype: Any, value: float, message: str) -> None:
    scale = torch.full((4, 2), 0.25, dtype=dtype)
    check(tmp_path, fp8(scale))
    scale[2, 1] = value
    with pytest.raises(CorruptShardError, match=rf"'1.weight_scale_inv' \(fp8\), number 5, {message}") as caught:
        check(tmp_path, fp8(scale))
    assert str(caught.value).startswith(str(tmp_path / "model.safetensors"))


def test_scales_of_both_signs(tmp_path: Path) -> None:
    scale = torch.tensor([[-1.0, 2.0]] * 4)
    check(tmp_path, fp8(scale))
    scale[3, 0] = 0
    with pytest.raises(CorruptShardError, match="number 6, is zero"):
        check(tmp_path, fp8(scale))


def test_exponents(tmp_path: Path) -> None:
    exponents = torch.arange(0, 8, dtype=torch.uint8).view(4, 2)
    check(tmp_path, fp8(exponents.view(torch.float8_e8m0fnu)))
    exponents[1, 0] = 255
    with pytest.raises(CorruptShardError, match="number 2, is not a number"):
        check(tmp_path, fp8(exponents.view(torch.float8_e8m0fnu)))


def test_large_scales_are_read_in_pieces(tmp_path: Path) -> None:
    rows = (9 << 20) // 4
    scale = torch.ones(rows, 1)
    tensors = {"a.weight": torch.ones(rows, 1).to(FP8), "a.weight_scale_inv": scale}
    check(tmp_path, tensors)
    scale[rows - 3] = float("inf")
    with pytest.raises(CorruptShardError, match=f"number {rows - 3}, "):
        check(tmp_path, tensors)


def test_a_zero_where_writers_store_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoding, "may_be_zero", lambda self, part: part == "scale")
    check(tmp_path, fp8(torch.zeros(4, 2)))
    with pytest.raises(CorruptShardError, match="number 0, is infinite, or not a number"):
        check(tmp_path, fp8(torch.full((4, 2), float("nan"))))


@pytest.mark.anyio
async def test_an_engine_is_not_entered(tmp_path: Path) -> None:
    def quantize(name: str, weight: torch.Tensor) -> Any:
        if "down_proj" not in name:
            return None
        scale = torch.full((weight.shape[0] // 32, weight.shape[1] // 32), float("nan") if ".1." in name else 1.0)
        return {name: weight.to(FP8), f"{name}_scale_inv": scale}, weight

    save(tmp_path, LlamaConfig(**SMALL), {"quant_method": "fp8"}, quantize)
    with pytest.raises(CorruptShardError, match=r"'model.layers.1.mlp.down_proj.weight_scale_inv'"):
        async with Engine(tmp_path, memory_budget="8MiB"):
            pytest.fail("entered")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensors of hermes")]
