"""Makes checkpoints with true shapes and random weights, and deletes them afterwards."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from benchmarks.folders import temporary_folder
from hermes_async import format_bytes

_SHARD_BYTES = 1 << 30
_INDEX = "model.safetensors.index.json"


def llama_config(num_bytes: int, dtype: torch.dtype) -> LlamaConfig:
    """A Llama with layers of Llama 3.2's 3B (192 MiB in bf16); their number makes the size closest to `num_bytes`."""
    hidden, intermediate, vocab_size = 3072, 8192, 32000
    layer = 2 * hidden * hidden + 2 * hidden * (hidden // 3) + 3 * hidden * intermediate + 2 * hidden
    num_layers = round((num_bytes / dtype.itemsize - vocab_size * hidden) / layer)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, num_layers),
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=dtype,
    )


@contextmanager
def random_checkpoint(config: PreTrainedConfig, dtype: torch.dtype, folder: Path | None = None) -> Iterator[Path]:
    """Writes a sharded checkpoint of `config` into a temporary directory in `folder`, and deletes it at the end."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    num_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    with temporary_folder(folder) as path:
        free = shutil.disk_usage(path).free
        if free < 1.2 * num_bytes:
            raise SystemExit(f"{path} has {format_bytes(free)} free; the checkpoint takes {format_bytes(num_bytes)}")
        _write(path, shapes, dtype)
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
        yield path


@contextmanager
def shortened(path: Path, num_layers: int) -> Iterator[Path]:
    """The first layers of a checkpoint of `random_checkpoint`, as a checkpoint beside it that has the same files."""
    index = json.loads((path / _INDEX).read_text())
    kept = {
        name: file
        for name, file in index["weight_map"].items()
        if (layer := re.search(r"\.layers\.(\d+)\.", name)) is None or int(layer[1]) < num_layers
    }
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": num_layers}
    with temporary_folder(path.parent) as short:
        for file in set(kept.values()):
            (short / file).symlink_to(path / file)
        (short / _INDEX).write_text(json.dumps(index | {"weight_map": kept}))
        (short / "config.json").write_text(json.dumps(config))
        yield short


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Adds a tokenizer of so many tokens to a checkpoint."""
    vocabulary = {"<unk>": 0} | {f"token{idx}": idx for idx in range(1, vocab_size)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@contextmanager
def sparse_checkpoint(config: PreTrainedConfig, folder: Path | None = None) -> Iterator[Path]:
    """A checkpoint of `config` in bf16, in one sparse file that takes no disk space. Its weights are zeros."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with temporary_folder(folder) as path:
        with (path / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
        yield path


def _write(path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).mul_(0.02).to(dtype)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += shape.numel() * dtype.itemsize
        if size > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = shape.numel() * dtype.itemsize
        shards[-1].append(name)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name]
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=dtype)
            else:
                tensors[name] = _numbers(shape.numel(), noise, generator).view(shape)
            weight_map[name] = file
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (path / _INDEX).write_text(json.dumps(index))


def _numbers(count: int, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A copy of so many of the numbers in `noise`, from a drawn one on; after the last comes the first again."""
    start = int(torch.randint(noise.numel(), (1,), generator=generator))
    numbers = torch.empty(count, dtype=noise.dtype)
    done = 0
    while done < count:
        piece = noise[start : start + count - done]
        numbers[done : done + len(piece)] = piece
        done, start = done + len(piece), 0
    return numbers
