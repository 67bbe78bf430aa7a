"""Makes quantized checkpoints with true shapes and layouts and random numbers, and deletes them afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.folders import temporary_folder
from hermes_async.quantization.processor_layout import ProcessorInt4

_SHARD_BYTES = 1 << 30
_BLOCK = 128  # rows and columns of an FP8 block
_GROUP = 128  # columns of an int4 group
_LARGEST_FP8 = 448.0
_SCALE = 1e-4  # of FP8: numbers of up to 448 then are weights of up to 0.04

Tensors = dict[str, torch.Tensor]


class Noise:
    """Random bytes, of which tensors are made. The same bytes come again after some MiB, at other places."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._bytes = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8, generator=self._generator)
        normal = torch.randn(1 << 24, generator=self._generator).mul_(_LARGEST_FP8 / 4)
        self._fp8 = normal.clamp_(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn).view(torch.uint8)

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """`num_bytes` random bytes."""
        return self._some(self._bytes, num_bytes)

    def fp8(self, count: int) -> torch.Tensor:
        """Numbers as weights have them. Of random bytes, a sixteenth would be so small that processors are slow."""
        return self._some(self._fp8, count).view(torch.float8_e4m3fn)

    def _some(self, noise: torch.Tensor, count: int) -> torch.Tensor:
        shift = int(torch.randint(noise.numel(), (1,), generator=self._generator))
        return noise.roll(shift).repeat(-(-count // noise.numel()))[:count]


@dataclass(frozen=True)
class Format:
    """A way in which the linear layers of a checkpoint are stored.

    Attributes:
        settings: The configuration's `quantization_config`, or what gives it; None for bf16.
        stored: From a weight's name without its ending, and its rows and columns, to its tensors; None for bf16.
        gguf: Of a GGUF file, its recipe.
    """

    name: str
    settings: dict[str, Any] | Callable[[], dict[str, Any]] | None = None
    stored: Callable[[str, int, int, Noise], Tensors] | None = None
    gguf: str | None = None


def _fp8(name: str, rows: int, columns: int, noise: Noise) -> Tensors:
    scales = torch.full((-(-rows // _BLOCK), -(-columns // _BLOCK)), _SCALE)
    weight = noise.fp8(rows * columns).view(rows, columns)
    return {f"{name}.weight": weight, f"{name}.weight_scale_inv": scales}


def _int4(name: str, rows: int, columns: int, noise: Noise) -> Tensors:
    return {
        f"{name}.weight_packed": noise.tensor(rows * columns // 2).view(torch.int32).view(rows, columns // 8),
        f"{name}.weight_scale": torch.full((rows, columns // _GROUP), 0.005, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def _int4_machine(name: str, rows: int, columns: int, noise: Noise) -> Tensors:
    chunk = ProcessorInt4.for_this_machine(_GROUP).block_rows(rows, columns)
    scales = torch.zeros((rows // chunk, columns // _GROUP, chunk, 2), dtype=torch.bfloat16)
    scales[..., 0] = 0.005
    return {
        f"{name}.weight_numbers": noise.tensor(rows * columns // 2).view(rows, columns // 2),
        f"{name}.weight_scales": scales,
    }


def _int8(name: str, rows: int, columns: int, noise: Noise) -> Tensors:
    return {
        f"{name}.weight": noise.tensor(rows * columns).view(torch.int8).view(rows, columns),
        f"{name}.weight_scale": torch.full((rows, 1), 0.0003, dtype=torch.bfloat16),
    }


def _compressed(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme | {"input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"],
    }


def _machine_settings() -> dict[str, Any]:
    return dict(ProcessorInt4.for_this_machine(_GROUP).settings(["lm_head"]))


FORMATS = {
    one.name: one
    for one in (
        Format("bf16"),
        Format(
            "fp8",
            {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [_BLOCK, _BLOCK],
                "modules_to_not_convert": ["lm_head"],
            },
            _fp8,
        ),
        Format(
            "int4",
            _compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": _GROUP}),
            _int4,
        ),
        Format("int4_machine", _machine_settings, _int4_machine),
        Format("int8", _compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}), _int8),
        Format("q4_k_m", gguf="Q4_K_M"),
    )
}


@contextmanager
def quantized_checkpoint(chosen: Format, config: LlamaConfig, folder: Path | None = None) -> Iterator[Path]:
    """Writes a Llama whose layers are stored in the format. Embedding and norms are in bf16; the head is tied.

    Yields a folder, or a GGUF file. All of it is deleted at the end.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items() if name not in tied}
    with temporary_folder(folder) as path:
        if chosen.gguf:
            from benchmarks.gguf_files import write_gguf  # needs the package `gguf`

            file = path / "model.gguf"
            write_gguf(file, config, chosen.gguf)
            yield file
        else:
            _write_shards(path, _tensors(chosen, shapes))
            config.architectures = [type(model).__name__]
            config.save_pretrained(path)
            _add_settings(path / "config.json", chosen.settings)
            yield path


def _tensors(chosen: Format, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    noise = Noise()
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        elif chosen.stored is not None and name.endswith("_proj.weight"):
            yield from chosen.stored(name.removesuffix(".weight"), *shape, noise).items()
        else:
            rows, columns = shape
            numbers = noise.tensor(rows * columns).view(torch.int8).view(rows, columns)
            yield name, numbers.to(torch.bfloat16).mul_(0.0003)


def _write_shards(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    weight_map: dict[str, str] = {}
    shard: Tensors = {}

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > _SHARD_BYTES:
            write()
        shard[name] = tensor.contiguous()
    write()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _add_settings(file: Path, settings: dict[str, Any] | Callable[[], dict[str, Any]] | None) -> None:
    settings = settings() if callable(settings) else settings
    if settings is not None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
