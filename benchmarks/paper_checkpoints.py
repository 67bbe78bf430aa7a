"""Makes the paper's models with their true shapes and random weights, and deletes them afterwards.

Each is written twice: as safetensors shards, as transformers saves it, and as one file per layer, for the loaders that
deserialise. Only one shard is in memory at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, GPT2Config, GPTJConfig, PreTrainedConfig, PreTrainedModel, ViTConfig

from benchmarks.folders import temporary_folder
from hermes_async import format_bytes

_SHARD_BYTES = 1 << 30

MODELS: dict[str, tuple[str, torch.dtype, Callable[[], PreTrainedConfig]]] = {
    "bert": (
        "BertModel",
        torch.float32,
        lambda: BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "vit": (
        "ViTModel",
        torch.float32,
        lambda: ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "gpt2": ("GPT2LMHeadModel", torch.float32, lambda: GPT2Config(bos_token_id=None, eos_token_id=None)),
    "gptj": ("GPTJForCausalLM", torch.bfloat16, lambda: GPTJConfig(bos_token_id=None, eos_token_id=None)),
}


@contextmanager
def checkpoint(name: str, folder: Path | None) -> Iterator[Path]:
    """Writes model `name` into a temporary directory in `folder`, and deletes it at the end."""
    class_name, dtype, make_config = MODELS[name]
    config = make_config()
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, class_name)._from_config(config, dtype=dtype)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    groups = [{key: shapes[key] for key in group} for group in layer_groups(model)]
    num_bytes = sum(shape.numel() for group in groups for shape in group.values()) * dtype.itemsize
    with temporary_folder(folder) as path:
        free = shutil.disk_usage(path).free
        if free < 2.2 * num_bytes:
            raise SystemExit(f"{name}: {path} has {format_bytes(free)} free, less than twice {format_bytes(num_bytes)}")
        _write(path, groups, dtype)
        config.architectures = [class_name]
        config.dtype = dtype
        config.save_pretrained(path)
        yield path


def layer_groups(model: nn.Module) -> list[list[str]]:
    """Names of the tensors that are loaded together, in the model's order: those of a layer, or of another module."""
    groups: dict[str, list[str]] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in model.state_dict():
        if name not in tied:
            match = re.match(r".*?\.\d+(?=\.)", name)
            groups.setdefault(match.group() if match else name.rpartition(".")[0], []).append(name)
    return list(groups.values())


def _write(path: Path, groups: list[dict[str, torch.Size]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    num_shards = 0

    def save_shard() -> None:
        nonlocal num_shards
        num_shards += 1
        file = f"model-{num_shards:05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    (path / "layers").mkdir()
    for idx, group in enumerate(groups):
        nbytes = sum(shape.numel() for shape in group.values()) * dtype.itemsize
        if shard and sum(tensor.nbytes for tensor in shard.values()) + nbytes > _SHARD_BYTES:
            save_shard()
        state = {name: _random(name, shape, dtype, generator) for name, shape in group.items()}
        torch.save(state, path / "layers" / f"{idx}.pt")
        shard |= state
    save_shard()
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1 and name.endswith("weight"):  # of a norm
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)
