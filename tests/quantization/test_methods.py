"""Methods of quantization that are not built are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.quantization.methods import known_methods, quantized_matrices, refused_methods
from hermes_async.storage.checkpoint import read_tensors
from hermes_async.storage.quantization_settings import quantization


def test_each_method_of_transformers_is_known() -> None:
    named = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING} - {"gguf"}
    assert named <= {*known_methods(), *refused_methods()}
    assert not known_methods() & refused_methods()


@pytest.mark.parametrize("method", [*sorted(refused_methods()), "of tomorrow"])
def test_a_method_is_refused_by_name(tmp_path: Path, method: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"quantized .*{method}.*[Uu]se the model that this") as caught:
        quantized_matrices(tmp_path, method, {}, {})
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("method", sorted(known_methods() - {"torchao"}))
def test_a_file_without_quantized_tensors(tmp_path: Path, method: str) -> None:
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError):
        quantized_matrices(tmp_path, method, {}, read_tensors(tmp_path))


def test_settings_of_old_files_name_bitsandbytes(tmp_path: Path) -> None:
    config = json.loads('{"quantization_config": {"load_in_8bit": true}}')
    assert quantization(tmp_path, config) == ("bitsandbytes", {"load_in_8bit": True})


@pytest.mark.parametrize(
    ("file", "method", "settings"),
    [
        ("hf_quant_config.json", "modelopt", {"quantization": {"quant_algo": "FP8"}}),
        ("quantize_config.json", "gptq", {"bits": 4, "group_size": 128}),
        ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}),
    ],
)
def test_settings_in_a_file_of_their_own(tmp_path: Path, file: str, method: str, settings: dict[str, Any]) -> None:
    (tmp_path / file).write_text(json.dumps(settings))
    assert quantization(tmp_path, {}) == (method, settings.get("quantization", settings))
    assert method in known_methods()
    assert quantization(tmp_path, {"quantization_config": {"quant_method": "fp8"}}) == ("fp8", {"quant_method": "fp8"})
    (tmp_path / file).write_text("[]")
    with pytest.raises(CheckpointError, match=rf"{file}: a JSON list, not an object"):
        quantization(tmp_path, {})
