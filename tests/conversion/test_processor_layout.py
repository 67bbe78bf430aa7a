"""`--for-this-machine`: the same integers as without it, in the layout of this processor's kernel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hermes_async import ConfigError, Engine, EngineConfig, HermesError, SamplingParams, UnsupportedModelError
from hermes_async.conversion.quantizing import quantize
from hermes_async.quantization import processor_layout
from hermes_async.quantization.kernel_layouts import Int4Layout, int4_block
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import read_tensors

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(int4_block() is None, reason="torch has no kernel for 4-bit weights on this processor"),
]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # whose 32 rows are no whole block
    "head_dim": 32,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def llama(random_model: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    return save_model(random_model(LlamaConfig(**SIZES, tie_word_embeddings=False)))


@pytest.fixture(scope="module")
def laid_out(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("laid out") / "out"
    quantize(llama, path, "int4", 64, for_this_machine=True)
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The dequantized weights of a checkpoint, by this package."""
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    weights = {}
    for name, matrix in quantized_matrices(path, settings["quant_method"], settings, read_tensors(path)).items():
        parts = {part: load_file(spec.file)[spec.name] for part, spec in matrix.parts.items()}
        weights[name] = torch.empty(matrix.shape)
        matrix.encoding.dequantize(parts, 0, matrix.shape[0], weights[name])
    return weights


def test_weights_are_those_of_the_standard_format(llama: Path, laid_out: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "standard", "int4", 64)
    standard, own = weights_of(tmp_path / "standard"), weights_of(laid_out)
    small = {name for name in standard if "k_proj" in name or "v_proj" in name}
    assert own.keys() == standard.keys() - small
    assert all(torch.equal(own[name], standard[name]) for name in own)
    copied, before = load_file(laid_out / "model.safetensors"), load_file(llama / "model.safetensors")
    assert all(torch.equal(copied[name], before[name]) for name in small)


@pytest.mark.parametrize("smallest", [True, False])
async def test_the_engine_computes_with_these_weights(
    llama: Path, laid_out: Path, tmp_path: Path, smallest: bool
) -> None:
    tensors = load_file(llama / "model.safetensors") | weights_of(laid_out)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(llama / "config.json", tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    few, many = torch.arange(3, 10)[None], (torch.arange(100) % 61)[None]  # the kernel, and dequantized blocks
    budget = 2**26
    if smallest:
        async with Engine(laid_out, memory_budget=budget) as engine:
            budget = engine.plan.minimum_budget
    async with Engine(laid_out, memory_budget=budget) as engine:
        for input_ids in (few,) if smallest else (few, many):
            with torch.inference_mode():
                expected = reference(input_ids)
            logits = (await engine.forward(input_ids=input_ids)).logits
            torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        tokens = (await engine.complete(few[0].tolist(), params)).token_ids
    expected_ids = reference.generate(few, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert list(tokens) == expected_ids[0, few.shape[1] :].tolist()


async def test_in_bfloat16_the_kernel_multiplies(
    laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    source = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(llama).bfloat16().save_pretrained(source)
    await anyio.to_thread.run_sync(lambda: quantize(source, tmp_path / "out", "int4", 64, for_this_machine=True))
    kinds, product = set(), Int4Layout.product

    def counted(layout: Int4Layout, parts: Any, inputs: torch.Tensor) -> torch.Tensor | None:
        result = product(layout, parts, inputs)
        kinds.add((len(inputs), result is not None))
        return result

    monkeypatch.setattr(Int4Layout, "product", counted)
    input_ids = torch.arange(3, 10)[None]
    async with Engine(tmp_path / "out", memory_budget="64MiB") as engine:
        logits = (await engine.forward(input_ids=input_ids)).logits
    assert kinds == {(7, True)}
    async with Engine(tmp_path / "out", memory_budget="64MiB", config=EngineConfig(dtype="float32")) as engine:
        exact = (await engine.forward(input_ids=input_ids)).logits
    assert (7, False) in kinds
    assert float((logits.float() - exact).norm() / exact.norm()) < 0.03


async def test_experts(tmp_path: Path, random_model: Callable[..., Any], save_model: Callable[..., Path]) -> None:
    sizes = SIZES | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    source = save_model(random_model(Qwen3MoeConfig(**sizes)))
    await anyio.to_thread.run_sync(lambda: quantize(source, tmp_path / "out", "int4", 32, for_this_machine=True))
    await anyio.to_thread.run_sync(lambda: quantize(source, tmp_path / "standard", "int4", 32))
    names = [name for name in weights_of(tmp_path / "out") if ".experts." in name]
    assert len(names) == 2 * 4 * 3
    found = []
    for path in (tmp_path / "out", tmp_path / "standard"):
        async with Engine(path, memory_budget="8MiB") as engine:
            found.append((await engine.forward(input_ids=[[5, 9, 2, 33]])).logits)
    assert found[0].shape == found[1].shape and torch.isfinite(found[0]).all()


# --- what is refused ---


def changed(laid_out: Path, folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(laid_out, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors") | tensors
    save_file(
        {name: one for name, one in stored.items() if one is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"block": 48}, {}, "says blocks of 48 rows"),
        ({"group_size": None}, {}, "groups of None"),
        ({"group_size": 256}, {}, "no whole number of groups of 256 columns"),
        ({}, {f"{GATE}.weight_scales": None}, f"'{GATE}.weight_scales' of four dimensions, and there is none"),
        ({}, {f"{GATE}.weight_scales": torch.ones(4, 2, 80, 2)}, "chunks of 80 rows"),
        ({}, {f"{GATE}.weight_scales": torch.ones(5, 3, 64, 2)}, r"has shape \[5, 3, 64, 2\]"),
        ({}, {f"{GATE}.weight_scales": torch.full((5, 2, 64, 2), float("nan"))}, "is infinite, or not a number"),
        ({}, {f"{GATE}.weight_numbers": torch.zeros(320, 63, dtype=torch.uint8)}, "weight_numbers"),
        ({}, {f"{GATE}.weight_numbers": torch.zeros(320, 64, dtype=torch.int8)}, "is in int8"),
    ],
)
async def test_bad_files(
    laid_out: Path, tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    path = changed(laid_out, tmp_path / "broken", settings, tensors)
    with pytest.raises(HermesError, match=message) as caught:
        async with Engine(path, memory_budget="64MiB"):
            pass
    assert str(path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(("own", "has"), [(None, "no such layout"), (16, "packs 16")])
async def test_a_machine_with_another_layout_refuses_it_by_name(
    laid_out: Path, monkeypatch: pytest.MonkeyPatch, own: int | None, has: str
) -> None:
    monkeypatch.setattr(processor_layout, "int4_block", lambda: own)
    monkeypatch.setitem(processor_layout.INT4_BLOCKS, 16, "other instructions")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=rf"--for-this-machine, for processors with AVX.*{has}") as caught:
        async with Engine(laid_out, memory_budget="64MiB"):
            pass
    assert str(laid_out) in str(caught.value)


def test_only_int4_has_such_a_layout(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"is for int4\. fp8 has no layout of its own"):
        quantize(llama, tmp_path / "out", "fp8", for_this_machine=True)
    monkeypatch.setattr(processor_layout, "int4_block", lambda: None)
    with pytest.raises(ConfigError, match="no kernel for 4-bit weights on this processor"):
        quantize(llama, tmp_path / "out", "int4", for_this_machine=True)
    assert not (tmp_path / "out").exists()
