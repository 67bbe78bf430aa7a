"""Bad checkpoints and options: one error of ours each, when the engine opens, and nothing left behind."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AttentionInterface, BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2Model

from hermes_async import (
    CheckpointError,
    ConfigError,
    CorruptShardError,
    Engine,
    MemoryBudgetError,
    MissingTensorError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def directory(tiny_model: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.path, tmp_path / "checkpoint"))


def shard(directory: Path) -> Path:
    return directory / "model.safetensors"


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = shard(directory).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard(directory).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_length(directory: Path, length: int) -> None:
    data = bytearray(shard(directory).read_bytes())
    data[:8] = length.to_bytes(8, "little")
    shard(directory).write_bytes(data)


def missing_shard(directory: Path) -> None:
    write_index(directory, dict.fromkeys(load_file(shard(directory)), "model-00001-of-00002.safetensors"))
    shard(directory).unlink()


def no_weights(directory: Path) -> None:
    shard(directory).unlink()


def truncated_shard(directory: Path) -> None:
    shard(directory).write_bytes(shard(directory).read_bytes()[:-100])


def empty_shard(directory: Path) -> None:
    shard(directory).write_bytes(b"")


def header_longer_than_the_file(directory: Path) -> None:
    set_length(directory, shard(directory).stat().st_size)


def header_length_of_2_63(directory: Path) -> None:
    set_length(directory, 2**63)


def overlapping_offsets(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name.endswith("q_proj.weight")]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    rewrite_header(directory, change)


def unknown_dtype(directory: Path) -> None:
    rewrite_header(directory, lambda header: header["model.norm.weight"].update(dtype="F12"))


def shape_that_is_not_its_bytes(directory: Path) -> None:
    rewrite_header(directory, lambda header: header["model.norm.weight"].update(shape=[33]))


def index_that_leaves_the_directory(directory: Path) -> None:
    shutil.copy(shard(directory), directory.parent / "x.safetensors")
    write_index(directory, dict.fromkeys(load_file(shard(directory)), "../x.safetensors"))
    shard(directory).unlink()


def missing_tensor(directory: Path) -> None:
    tensors = load_file(shard(directory))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shard(directory))


def only_a_pickle(directory: Path) -> None:
    torch.save(load_file(shard(directory)), directory / "pytorch_model.bin")
    shard(directory).unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def config_that_is_no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def no_model_type(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def unknown_model_type(directory: Path) -> None:
    change_config(directory, model_type="no_such_model")


def remote_code(directory: Path) -> None:
    change_config(directory, model_type="no_such_model", auto_map={"AutoConfig": "code.Config"})
    (directory / "code.py").write_text("raise SystemExit('code from a checkpoint was run')")


def an_encoder_that_is_said_to_generate(directory: Path) -> None:
    shutil.rmtree(directory)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    change_config(directory, architectures=["BertLMHeadModel"])


def a_model_of_speech(directory: Path) -> None:
    shutil.rmtree(directory)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[16],
        conv_stride=[5], conv_kernel=[10], num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(directory)


def quantized_by_mlx(directory: Path) -> None:
    change_config(directory, quantization={"group_size": 64, "bits": 4})


def quantized_by_gptq_before_configs_told_it(directory: Path) -> None:
    (directory / "quantize_config.json").write_text('{"bits": 4}')


def adapter_beside_weights(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


def packed_weight(directory: Path) -> None:
    change_tensor(directory, dtype="F4", bytes_of=lambda elements: elements // 2)


def complex_weight(directory: Path) -> None:
    change_tensor(directory, dtype="C64", bytes_of=lambda elements: elements * 8)


def change_tensor(directory: Path, dtype: str, bytes_of: Callable[[int], int], name: str = "lm_head.weight") -> None:
    """Puts a tensor of zeros in another dtype in the place of `name`, or beside the others."""
    tensors = load_file(shard(directory))
    shape = list(tensors.pop(name, torch.zeros(4, 2)).shape)
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    nbytes = bytes_of(math.prod(shape))
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(rest), len(rest) + nbytes]}
    text = json.dumps(header).encode()
    shard(directory).write_bytes(len(text).to_bytes(8, "little") + text + rest + bytes(nbytes))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("C64", 64)],
)
async def test_dtypes_that_the_model_does_not_use(tiny_model: Any, directory: Path, dtype: str, bits: int) -> None:
    change_tensor(directory, dtype, lambda elements: elements * bits // 8, name="vision.weight")
    async with Engine(directory, memory_budget="8MiB", config=tiny_model.config) as engine:
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]


def quantized(directory: Path) -> None:
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})


def other_hidden_size(directory: Path) -> None:
    change_config(directory, hidden_size=64)


def other_vocab_size(directory: Path) -> None:
    change_config(directory, vocab_size=97)


def heads_that_do_not_divide(directory: Path) -> None:
    change_config(directory, num_attention_heads=5, head_dim=None)


def hidden_size_that_is_no_number(directory: Path) -> None:
    change_config(directory, hidden_size="large")


BAD = [
    (missing_shard, CheckpointError),
    (no_weights, CheckpointError),
    (truncated_shard, CorruptShardError),
    (empty_shard, CorruptShardError),
    (header_longer_than_the_file, CorruptShardError),
    (header_length_of_2_63, CorruptShardError),
    (overlapping_offsets, CorruptShardError),
    (unknown_dtype, CorruptShardError),
    (shape_that_is_not_its_bytes, CorruptShardError),
    (index_that_leaves_the_directory, CorruptShardError),
    (missing_tensor, MissingTensorError),
    (only_a_pickle, UnsupportedModelError),
    (no_config, CheckpointError),
    (config_that_is_no_json, CheckpointError),
    (no_model_type, CheckpointError),
    (unknown_model_type, UnsupportedModelError),
    (remote_code, UnsupportedModelError),
    (an_encoder_that_is_said_to_generate, (UnsupportedModelError, MissingTensorError)),
    (a_model_of_speech, UnsupportedModelError),
    (quantized, UnsupportedModelError),
    (quantized_by_mlx, UnsupportedModelError),
    (quantized_by_gptq_before_configs_told_it, UnsupportedModelError),
    (adapter_beside_weights, UnsupportedModelError),
    (packed_weight, UnsupportedModelError),
    (complex_weight, UnsupportedModelError),
    (other_hidden_size, CheckpointError),
    (other_vocab_size, CheckpointError),
    (heads_that_do_not_divide, (CheckpointError, UnsupportedModelError)),
    (hidden_size_that_is_no_number, UnsupportedModelError),
]


@pytest.mark.parametrize(("spoil", "expected"), BAD, ids=[case[0].__name__ for case in BAD])
async def test_a_bad_checkpoint(directory: Path, spoil: Callable[[Path], None], expected: Any) -> None:
    spoil(directory)
    before = set(AttentionInterface._global_mapping)
    with pytest.raises(CheckpointError) as caught:
        async with Engine(directory, memory_budget="8MiB"):
            pytest.fail("entered")
    assert type(caught.value) in (expected if isinstance(expected, tuple) else (expected,))
    assert str(directory) in str(caught.value) or type(caught.value) is UnsupportedModelError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes")]
    assert set(AttentionInterface._global_mapping) == before


async def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint directory"):
        async with Engine(tmp_path):
            pytest.fail("entered")


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        async with Engine(tmp_path / "nothing"):
            pytest.fail("entered")


async def test_a_file_in_place_of_its_directory(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="give the directory"):
        async with Engine(shard(directory)):
            pytest.fail("entered")


@pytest.mark.parametrize("config", ["streamed", "default"])
async def test_a_budget_too_small_tells_the_smallest_that_works(tiny_model: Any, config: str) -> None:
    options = {"config": tiny_model.config} if config == "streamed" else {}
    with pytest.raises(MemoryBudgetError) as caught:
        async with Engine(tiny_model.path, memory_budget="1KiB", **options):
            pytest.fail("entered")
    minimum = caught.value.minimum_bytes
    assert minimum is not None
    assert caught.value.budget_bytes == 1024
    assert str(minimum) in str(caught.value)
    with pytest.raises(MemoryBudgetError) as caught:
        async with Engine(tiny_model.path, memory_budget=minimum - 1, **options):
            pytest.fail("entered")
    assert caught.value.minimum_bytes == minimum
    async with Engine(tiny_model.path, memory_budget=minimum, **options) as engine:
        assert engine.plan.minimum_budget == minimum
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        assert engine.statistics().peak_bytes_in_use <= minimum


@pytest.mark.parametrize("budget", ["lots", "", "-1", 0, -5, "0", 1.5, None, True, "3 XiB"])
async def test_a_budget_that_is_no_size(tiny_model: Any, budget: Any) -> None:
    with pytest.raises(ConfigError):
        async with Engine(tiny_model.path, memory_budget=budget):
            pytest.fail("entered")


async def test_a_config_that_is_none_of_ours(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match="EngineConfig"):
        Engine(tiny_model.path, config={"max_sequences": 4})  # type: ignore[arg-type]
