"""The engine and the libraries that `benchmarks.peers` compares it with: versions, programs, and files."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.checkpoints import llama_config, random_checkpoint, write_tokenizer
from benchmarks.environments import LLAMA_CPP, Environment, InstallError, environment, llama_cpp_environment
from benchmarks.gguf_files import convert_to_gguf
from benchmarks.side_runs import run_program
from hermes_async import format_bytes

GIB = 2**30

Record = dict[str, Any]

_TORCH = "torch==2.13.0"
_ACCELERATE = Environment("peer-accelerate", (_TORCH, "transformers==5.23.0", "accelerate==1.15.0"), "accelerate")
_AIRLLM = Environment("peer-airllm", (_TORCH, "transformers==5.23.0", "airllm==4.0.0"), "airllm")
# oLLM requires flash-attn, which cannot be built without CUDA. Its documentation says that it is optional.
# oLLM replaces parts of transformers of version 4.
_OLLM = Environment(
    "peer-ollm", (_TORCH, "transformers==4.57.1", "accelerate==1.15.0", "requests==2.32.5"), "ollm", ("ollm==1.0.3",)
)
_LEAST_GIB = 0.4
_COPIES = {"engine": 1, "llama.cpp": 1, "airllm": 1}  # of the weights' bytes on the disk
_KEPT_FREE = 1.05


@dataclass(frozen=True)
class Side:
    """A library.

    Attributes:
        program: What `python -m` runs.
        environment: None stands for this program's own; "llama.cpp" is built.
        shares: "all": with and without a limit on memory; "limited", "unlimited".
        load: How llama.cpp reads its file.
    """

    name: str
    program: str
    environment: Environment | str | None
    shares: str = "all"
    load: str = ""

    @property
    def versions(self) -> str:
        if isinstance(self.environment, Environment):
            return self.environment.versions
        return LLAMA_CPP if self.environment else "this package"

    def runs_in(self, share: float) -> bool:
        return self.shares == "all" or (self.shares == "limited") == bool(share)


_DECODE = "benchmarks.transformers_decode"
SIDES = {
    side.name: side
    for side in (
        Side("engine", "benchmarks.engine_decode", None),
        Side("llama.cpp", "benchmarks.llama_cpp_decode", "llama.cpp"),
        Side("llama.cpp-direct", "benchmarks.llama_cpp_decode", "llama.cpp", load="direct"),
        Side("accelerate", _DECODE, _ACCELERATE, "limited"),
        Side("airllm", _DECODE, _AIRLLM),
        Side("ollm", _DECODE, _OLLM),
        Side("transformers", _DECODE, _ACCELERATE, "unlimited"),
    )
}


@dataclass(frozen=True)
class Files:
    """The same weights for all: a checkpoint, a GGUF file, and a folder for each library that makes its own."""

    checkpoint: Path
    gguf: Path
    own: Path
    weight_bytes: int

    def read_by(self, side: Side) -> Path:
        return self.gguf if side.program.endswith("llama_cpp_decode") else self.checkpoint

    def asked(self, side: Side, share: float, memory_bytes: int | None) -> Record:
        """What the side's program needs to know beside its points."""
        asked: Record = {"path": str(self.read_by(side)), "side": side.name}
        if side.program.endswith("llama_cpp_decode"):
            asked["load"] = side.load or ("mapped" if share else "copied")
        if side.program == _DECODE:
            folder = self.own / side.name
            folder.mkdir(exist_ok=True)
            asked |= {"folder": str(folder), "memory_bytes": memory_bytes}
        return asked


def pythons(sides: Sequence[Side], cache: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The Python of each side that can be installed, and the errors of the others."""
    found: dict[str, Path] = {}
    errors: dict[str, str] = {}
    for side in sides:
        same = next((SIDES[name] for name in (*found, *errors) if SIDES[name].environment == side.environment), None)
        try:
            if same is not None and same.name in errors:
                errors[side.name] = errors[same.name]
            else:
                found[side.name] = found[same.name] if same is not None else _python(side, cache)
        except InstallError as error:
            errors[side.name] = f"not installed: {error}"
        print(f"  {side.name:16} {side.versions}  {errors.get(side.name, '')}", flush=True)
    return found, errors


def _python(side: Side, cache: Path) -> Path:
    if side.environment is None:
        return Path(sys.executable)
    if isinstance(side.environment, Environment):
        return environment(side.environment, cache)
    return llama_cpp_environment(cache)


def fitting_config(size_gib: float, sides: Sequence[str], folder: Path | None) -> LlamaConfig:
    """A Llama of so many GiB in bf16, or of fewer where the disk has not enough space.

    Raises:
        SystemExit: The disk has too little space for any. Nothing was written.
    """
    place = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    copies = sum(_COPIES.get(side, 0) for side in sides) * _KEPT_FREE
    fitting = free / GIB / copies
    if fitting < min(size_gib, _LEAST_GIB):
        raise SystemExit(
            f"{place} has {format_bytes(free)} free, and {copies:.1f} times the weights' bytes are written: at least "
            f"{format_bytes(round(min(size_gib, _LEAST_GIB) * copies * GIB))} are needed; give another --folder"
        )
    if fitting < size_gib:
        print(f"{place} has {format_bytes(free)} free: {fitting:.1f} GiB of weights instead of {size_gib}", flush=True)
    config = llama_config(int(min(size_gib, fitting) * GIB), torch.bfloat16)
    config.max_position_embeddings = 4096
    return config


@contextmanager
def files(config: LlamaConfig, sides: Sequence[str], folder: Path | None) -> Iterator[Files]:
    """Writes the weights for these sides, and deletes them at the end."""
    with (
        random_checkpoint(config, torch.bfloat16, folder) as checkpoint,
        tempfile.TemporaryDirectory(prefix="hermes-benchmark-", dir=folder, ignore_cleanup_errors=True) as own,
    ):
        # Prompts are token ids, but some libraries do not open a model without a tokenizer.
        write_tokenizer(checkpoint, config.vocab_size)
        gguf = Path(own) / "model.gguf"
        if any(SIDES[side].program.endswith("llama_cpp_decode") for side in sides):
            convert_to_gguf(checkpoint, config, gguf)
        weight_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        yield Files(checkpoint, gguf, Path(own), weight_bytes)


def split_for_airllm(made: Files, python: Path, threads: int) -> Record:
    """Lets AirLLM write its files of single layers, which it does when it first opens a checkpoint."""
    side = SIDES["airllm"]
    asked = made.asked(side, 0, None) | {"threads": threads, "points": []}
    return run_program(side.program, asked, python, memory_bytes=None, disk_limit=0, grouped=False)
