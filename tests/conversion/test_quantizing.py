"""A quantized checkpoint: its weights by plain arithmetic, the engine's logits, and what is never written over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from hermes_async import CheckpointError, ConfigError, Engine, UnsupportedModelError
from hermes_async.conversion.output_folder import STATE_NAME, open_output, other_files
from hermes_async.conversion.quantizing import quantize

pytestmark = pytest.mark.anyio

IDS = [5, 9, 2, 33, 17, 40, 8]


@pytest.fixture(scope="module")
def llama(random_model: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    path = save_model(random_model(config))
    (path / "chat_template.jinja").write_text("a template")
    return path


@pytest.fixture(scope="module")
def mixture(random_model: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    return save_model(random_model(config))


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a quantized checkpoint, by numpy's arithmetic on its bytes."""
    tensors = stored(path)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        scale = tensors.get(f"{base}.weight_scale")
        if part in ("weight_scale", "weight_shape"):
            continue
        if scale is None or part not in ("weight", "weight_packed"):
            weights[name] = tensor
            continue
        values = tensor.float()
        if part == "weight_packed":
            rows, columns = tensors[f"{base}.weight_shape"].tolist()
            octets = tensor.numpy().view(np.uint8).astype(np.int32)
            halves = np.stack([octets & 15, octets >> 4], -1).reshape(rows, -1)
            values = torch.from_numpy(octets - 128 if octets.shape[1] == columns else halves - 8).float()
        weights[f"{base}.weight"] = values * scale.float().repeat_interleave(values.shape[1] // scale.shape[1], 1)
    return weights


def files(path: Path) -> dict[str, bytes]:
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def reference_of(source: Path, out: Path, folder: Path) -> PreTrainedModel:
    """transformers' model with the weights that the quantized checkpoint stands for."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(dequantized(out), folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)


# --- what is written ---


@pytest.mark.parametrize(
    ("model", "name", "group"),
    [
        ("llama", "int4", 32),
        ("llama", "int8", None),
        ("llama", "fp8", None),
        ("mixture", "int4", 32),
        ("mixture", "fp8", None),
    ],
)
async def test_the_engine_computes_with_the_stored_weights(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, name: str, group: int | None
) -> None:
    source: Path = request.getfixturevalue(model)
    out = tmp_path / "out"
    await anyio.to_thread.run_sync(lambda: quantize(source, out, name, group))
    reference = reference_of(source, out, tmp_path / "reference")
    with torch.inference_mode():
        expected = reference(torch.tensor([IDS])).logits
    async with Engine(out, memory_budget="16MiB") as engine:
        logits = (await engine.forward(input_ids=[IDS])).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_only_linear_layers_change(llama: Path, tmp_path: Path) -> None:
    written = quantize(llama, tmp_path / "out", "int4")
    before, after = stored(llama), stored(tmp_path / "out")
    linear = {name for name in before if "_proj.weight" in name}
    assert (written.num_quantized, written.title) == (14, "int4, groups of 32")
    for name in before.keys() - linear:
        assert torch.equal(before[name], after[name])
    assert after.keys() == (before.keys() - linear) | {
        name.replace("weight", part) for name in linear for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    weights = dequantized(tmp_path / "out")
    assert max(float((weights[name] - before[name]).norm() / before[name].norm()) for name in linear) < 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == json.loads((llama / "config.json").read_text())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "a template"
    assert sorted(files(tmp_path / "out")) == sorted(files(llama))


def test_experts_are_quantized_and_routers_are_not(mixture: Path, tmp_path: Path) -> None:
    written = quantize(mixture, tmp_path / "out", "fp8")
    assert written.num_quantized == 2 * (4 + 4 * 3)
    assert set(written.ignored) == {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert stored(tmp_path / "out")["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_merged_experts_are_cut(mixture: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(mixture, merged)
    tensors = load_file(mixture / "model.safetensors")
    for layer in range(2):
        names = [f"model.layers.{layer}.mlp.experts.{idx}." for idx in range(4)]
        down = [tensors.pop(f"{name}down_proj.weight") for name in names]
        gate, up = ([tensors.pop(f"{name}{which}_proj.weight") for name in names] for which in ("gate", "up"))
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], 1)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    quantize(mixture, tmp_path / "apart", "int4", 32)
    quantize(merged, tmp_path / "cut", "int4", 32)
    apart, cut = stored(tmp_path / "apart"), stored(tmp_path / "cut")
    assert apart.keys() == cut.keys() and all(torch.equal(apart[name], cut[name]) for name in apart)


def test_files_are_of_the_size_that_is_asked_for(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "one", "int4", 32)
    quantize(llama, tmp_path / "out", "int4", 32, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    whole, parts = stored(tmp_path / "one"), stored(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


# --- interruptions ---


def interrupted(source: Path, out: Path, after_files: int) -> None:
    """Writes a quantized checkpoint until this many files are whole."""

    def stop(done: int, total: int) -> None:
        if len(list(out.glob("*.safetensors"))) >= after_files:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, "int4", 32, shard_bytes=20_000, on_progress=stop)


def test_an_interrupted_run_goes_on(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(llama, out, 2)
    assert not (out / "config.json").exists()
    first, second = sorted(out.glob("*.safetensors"))
    kept = first.stat().st_ino
    second.write_bytes(second.read_bytes()[:-1])  # half of a file is not taken for a whole one
    (out / ".config.json.abc.unfinished").write_text("{")  # of a run that was killed
    quantize(llama, out, "int4", 32, shard_bytes=20_000)
    assert first.stat().st_ino == kept
    quantize(llama, tmp_path / "at once", "int4", 32, shard_bytes=20_000)
    assert files(out) == files(tmp_path / "at once")


def test_other_settings_do_not_go_on(llama: Path, mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(llama, out, 1)
    before = files(out)
    with pytest.raises(ConfigError, match=r"another format: int4, groups of 32, now int8, one scale a row"):
        quantize(llama, out, "int8", shard_bytes=20_000)
    with pytest.raises(ConfigError, match="another model"):
        quantize(mixture, out, "int4", 32, shard_bytes=20_000)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"has 'notes.txt', which this command did not write"):
        quantize(llama, out, "int4", 32, shard_bytes=20_000)
    assert files(out) == before | {"notes.txt": b"mine"}


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        open_output(tmp_path / "out", {"format": "a"}, ()),
        pytest.raises(ConfigError, match="another process writes"),
        open_output(tmp_path / "out", {"format": "a"}, ()),
    ):
        pass
    assert files(tmp_path / "out") == {}


# --- what is refused ---


def test_nothing_is_written_over(llama: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    done = tmp_path / "done"
    quantize(llama, done, "fp8")
    before = files(tmp_path)
    for out, message in (
        (full, "not empty"),
        (done, "not empty"),
        (tmp_path / "file", "no folder"),
        (tmp_path / "link", "link to nothing"),
        (tmp_path / "file" / "below", "cannot be written"),
        (llama, "must not be in each other"),
        (llama / "below", "must not be in each other"),
        (llama.parent, "must not be in each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(llama, out, "fp8")
    assert files(tmp_path) == before


def test_a_link_in_the_place_of_a_file_is_not_followed(llama: Path, tmp_path: Path) -> None:
    interrupted(llama, tmp_path / "out", 1)
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "out" / "config.json").symlink_to(target)
    with pytest.raises(ConfigError, match=r"config.json"):
        quantize(llama, tmp_path / "out", "int4", 32, shard_bytes=20_000)
    assert target.read_text() == "mine"


def test_disk_space_is_checked_first(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigError, match=r"needs .* has 1.00 MiB free"):
        quantize(llama, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"groups of 64 do not divide the 96 columns of .*down_proj.*groups of 32"):
        quantize(llama, tmp_path / "out", "int4", 64)
    with pytest.raises(ConfigError, match="fp8 has one scale a row"):
        quantize(llama, tmp_path / "out", "fp8", 32)


def test_a_model_without_linear_layers(
    tmp_path: Path, random_model: Callable[..., Any], save_model: Callable[..., Path]
) -> None:
    path = save_model(random_model(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)))
    with pytest.raises(UnsupportedModelError, match="no linear layers"):
        quantize(path, tmp_path / "out", "int4")


def test_models_that_are_quantized_already(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "first", "fp8")
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(compressed-tensors\)"):
        quantize(tmp_path / "first", tmp_path / "out", "int4")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(GGUF\)"):
        quantize(tmp_path / "model.gguf", tmp_path / "out", "int4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(llama: Path, tmp_path: Path, value: float) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' has"):
        quantize(broken, tmp_path / "out", "int4")
    assert sorted(files(tmp_path / "out")) == [STATE_NAME]


# --- the other files ---


def test_links_and_pickles_are_left_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "revision"
    (snapshot / "folder").mkdir(parents=True)
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/abc"))
    (snapshot / "link.json").symlink_to(tmp_path / "secret")
    (snapshot / "linked").symlink_to(tmp_path, target_is_directory=True)
    (snapshot / "folder" / "own.json").write_text("{}")
    for name in ("pytorch_model.bin", "a.pkl", "model.safetensors", "config.json", ".hidden"):
        (snapshot / name).write_text("x")
    os.mkfifo(snapshot / "pipe")
    found, left_out = other_files(snapshot)
    assert sorted(found) == ["folder/own.json", "tokenizer.json"]
    assert sorted(left_out) == ["a.pkl", "link.json", "pipe", "pytorch_model.bin"]
