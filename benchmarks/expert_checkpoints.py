"""Makes mixtures of experts with true widths, random weights and chosen routes, and deletes them afterwards.

Routers of random weights choose all experts about as often. `set_routes` makes some experts more popular: the choices
of a token are then about draws without replacement, with probabilities of `rank ** -zipf`. A router of Qwen3 has no
bias to do it with. So the first channel of the embeddings is the same for all tokens, and the router weighs it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from benchmarks.folders import temporary_folder
from hermes_async import format_bytes

FORMATS = ("bf16", "fp8", "mxfp4")

_SHARD_BYTES = 4 << 30
_NOISE_BYTES = 1 << 25
_BLOCK = 128  # rows and columns of an FP8 block
_SCALE = 3e-5  # of FP8: numbers of up to 448 then are weights of up to 0.013
_MXFP4_SCALE = 118  # an exponent: numbers of up to 6 then are weights of up to 0.012
_LARGEST_FP8 = 448.0
_STD = 0.01  # of bf16 weights: so small that the residual stream stays about what the embedding is
_ROUTER_STD = 1.28  # of a router's logits: that of the Gumbel distribution, which makes logits into draws
_CONSTANT = 8.0  # the first channel of all embeddings; of the others, the standard deviation is 1
_ROUTERS_WITHOUT_BIAS = (".mlp.gate.weight",)
_ROUTERS = (*_ROUTERS_WITHOUT_BIAS, ".mlp.router.weight", ".mlp.router.bias")
_DTYPES = {"BF16": 2, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, and what fills it: a kind of noise, or values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    filling: str | torch.Tensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype]


def mixture_config(name: str, num_layers: int) -> PreTrainedConfig:
    """Widths of Qwen3-30B-A3B; for MXFP4, those of gpt-oss-120b."""
    if name == "mxfp4":
        return GptOssConfig(num_hidden_layers=num_layers, dtype=torch.bfloat16)  # its defaults are gpt-oss-120b
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def config_of_size(name: str, num_bytes: int) -> PreTrainedConfig:
    """True widths, and the number of layers that makes the files' size closest to `num_bytes`."""
    one, two = (sum(tensor.nbytes for tensor in _tensors(name, mixture_config(name, layers))) for layers in (1, 2))
    return mixture_config(name, max(1, 1 + round((num_bytes - one) / (two - one))))


@contextmanager
def mixture_checkpoint(name: str, config: PreTrainedConfig, folder: Path | None = None) -> Iterator[Path]:
    """Writes a checkpoint into a temporary directory in `folder`, and deletes it at the end.

    Its routers choose all experts about as often, until `set_routes`.

    Args:
        name: One of `FORMATS`.

    Raises:
        SystemExit: The disk has too little room.
    """
    tensors = list(_tensors(name, config))
    total = sum(one.nbytes for one in tensors)
    with temporary_folder(folder) as path:
        free = shutil.disk_usage(path).free
        if free < total + (2 << 30):
            raise SystemExit(f"{path} has {format_bytes(free)} free; the checkpoint takes {format_bytes(total)}")
        _write(path, tensors)
        set_routes(path, 0)
        config.architectures = ["GptOssForCausalLM" if name == "mxfp4" else "Qwen3MoeForCausalLM"]
        config.save_pretrained(path)
        _add_settings(path / "config.json", name)
        yield path


def set_routes(path: Path, zipf: float) -> None:
    """Writes the routers of a checkpoint anew.

    Args:
        zipf: The exponent by which some experts are chosen more often than others; 0: all about as often.
    """
    generator = torch.Generator().manual_seed(0)
    for shard in sorted(path.glob("*.safetensors")):
        with shard.open("r+b") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
            for name in sorted(name for name in header if name.endswith(_ROUTERS)):
                file.seek(8 + header_bytes + header[name]["data_offsets"][0])
                file.write(_bytes_of(_router(name, header[name]["shape"], zipf, generator)))
            file.flush()
            os.fdatasync(file.fileno())


def _router(name: str, shape: list[int], zipf: float, generator: torch.Generator) -> torch.Tensor:
    ranks = 1 + torch.randperm(shape[0], generator=generator)
    biases = -zipf * ranks.float().log()
    if name.endswith(".bias"):
        return biases.bfloat16()
    router = torch.randn(shape, generator=generator).mul_(_ROUTER_STD / math.sqrt(shape[1]))
    router[:, 0] = biases / _CONSTANT if name.endswith(_ROUTERS_WITHOUT_BIAS) else 0
    return router.bfloat16()


# --- what the files have ---


def _tensors(name: str, config: PreTrainedConfig) -> Iterator[_Tensor]:
    hidden, vocab_size = config.hidden_size, config.vocab_size
    yield _Tensor("model.embed_tokens.weight", "BF16", (vocab_size, hidden), "embedding")
    for idx in range(config.num_hidden_layers):
        for tensor in _gpt_oss_layer(config) if name == "mxfp4" else _qwen3_layer(config, fp8=name == "fp8"):
            yield _Tensor(f"model.layers.{idx}.{tensor.name}", tensor.dtype, tensor.shape, tensor.filling)
    yield _ones("model.norm.weight", hidden)
    yield _Tensor("lm_head.weight", "BF16", (vocab_size, hidden), "bf16")


def _qwen3_layer(config: Any, *, fp8: bool) -> Iterator[_Tensor]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def linear(name: str, rows: int, columns: int) -> Iterator[_Tensor]:
        if not fp8:
            yield _Tensor(f"{name}.weight", "BF16", (rows, columns), "bf16")
            return
        yield _Tensor(f"{name}.weight", "F8_E4M3", (rows, columns), "fp8")
        scales = torch.full((-(-rows // _BLOCK), -(-columns // _BLOCK)), _SCALE, dtype=torch.bfloat16)
        yield _Tensor(f"{name}.weight_scale_inv", "BF16", tuple(scales.shape), scales)

    yield from linear("self_attn.q_proj", queries, hidden)
    yield from linear("self_attn.k_proj", keys, hidden)
    yield from linear("self_attn.v_proj", keys, hidden)
    yield from linear("self_attn.o_proj", hidden, queries)
    for norm, width in (("q_norm", config.head_dim), ("k_norm", config.head_dim)):
        yield _ones(f"self_attn.{norm}.weight", width)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _ones(f"{norm}.weight", hidden)
    yield _Tensor("mlp.gate.weight", "BF16", (config.num_experts, hidden), "bf16")
    for idx in range(config.num_experts):
        yield from linear(f"mlp.experts.{idx}.gate_proj", inner, hidden)
        yield from linear(f"mlp.experts.{idx}.up_proj", inner, hidden)
        yield from linear(f"mlp.experts.{idx}.down_proj", hidden, inner)


def _gpt_oss_layer(config: Any) -> Iterator[_Tensor]:
    hidden, inner, num_experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for name, rows, columns in (
        ("q", queries, hidden),
        ("k", keys, hidden),
        ("v", keys, hidden),
        ("o", hidden, queries),
    ):
        yield _Tensor(f"self_attn.{name}_proj.weight", "BF16", (rows, columns), "bf16")
        yield _Tensor(f"self_attn.{name}_proj.bias", "BF16", (rows,), "bf16")
    yield _Tensor("self_attn.sinks", "BF16", (config.num_attention_heads,), "bf16")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _ones(f"{norm}.weight", hidden)
    yield _Tensor("mlp.router.weight", "BF16", (num_experts, hidden), "bf16")
    yield _Tensor("mlp.router.bias", "BF16", (num_experts,), "bf16")
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        yield _Tensor(f"mlp.experts.{name}_bias", "BF16", (num_experts, rows), "bf16")
        yield _Tensor(f"mlp.experts.{name}_blocks", "U8", (num_experts, rows, columns // 32, 16), "bytes")
        scales = torch.full((num_experts, rows, columns // 32), _MXFP4_SCALE, dtype=torch.uint8)
        yield _Tensor(f"mlp.experts.{name}_scales", "U8", tuple(scales.shape), scales)


def _ones(name: str, width: int) -> _Tensor:
    return _Tensor(name, "BF16", (width,), torch.ones(width, dtype=torch.bfloat16))


# --- writing ---


class _Noise:
    """Random numbers of each kind. The same ones come again after 32 MiB, at other places."""

    def __init__(self, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._generator = generator
        normal = torch.randn(_NOISE_BYTES // 2, generator=generator)
        embedding = normal[: normal.numel() // hidden * hidden].view(-1, hidden).clone()
        embedding[:, 0] = _CONSTANT
        fp8 = torch.cat([normal, normal]).mul_(_LARGEST_FP8 / 4).clamp_(-_LARGEST_FP8, _LARGEST_FP8)
        self._kinds = {
            "bf16": _bytes_of((normal * _STD).bfloat16()),
            "fp8": _bytes_of(fp8.to(torch.float8_e4m3fn)),
            "bytes": _bytes_of(torch.randint(0, 256, (_NOISE_BYTES,), dtype=torch.uint8, generator=generator)),
            "embedding": _bytes_of(embedding.bfloat16()),
        }

    def chunks(self, kind: str, num_bytes: int) -> Iterator[memoryview]:
        noise = self._kinds[kind]
        start = 0
        if kind != "embedding":  # whose rows begin where the noise begins
            start = 2 * int(torch.randint(len(noise) // 2, (1,), generator=self._generator))
        while num_bytes:
            chunk = noise[start : start + num_bytes]
            yield chunk
            num_bytes -= len(chunk)
            start = 0


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _write(path: Path, tensors: list[_Tensor]) -> None:
    hidden = next(one.shape[1] for one in tensors if one.name == "lm_head.weight")
    noise = _Noise(hidden)
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for one in tensors:
        size += one.nbytes
        if size > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = one.nbytes
        shards[-1].append(one)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # The order of the safetensors library: wide dtypes first, and then by name.
        shard.sort(key=lambda one: (-_DTYPES[one.dtype], one.name))
        _write_shard(path / file, shard, noise)
        weight_map |= dict.fromkeys((one.name for one in shard), file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, shard: list[_Tensor], noise: _Noise) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in shard:
        begin, end = end, end + one.nbytes
        header[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=1 << 20) as file:
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.write(struct.pack("<Q", len(text)) + text)
        for one in shard:
            if isinstance(one.filling, torch.Tensor):
                file.write(_bytes_of(one.filling))
                continue
            for chunk in noise.chunks(one.filling, one.nbytes):
                file.write(chunk)
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _add_settings(file: Path, name: str) -> None:
    settings: dict[str, Any] | None = None
    if name == "fp8":
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
        settings["modules_to_not_convert"] = ["lm_head"]
    elif name == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        settings = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    if settings is not None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
