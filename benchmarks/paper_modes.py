"""Runs one mode of `benchmarks.paper` once. Everything is imported before the clock starts."""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.disk import limited_disk, read_directly
from benchmarks.paper_checkpoints import layer_groups
from hermes_async import Engine, EngineConfig, MemoryBudgetError, SamplingParams
from hermes_async.memory.available import process_rss_bytes
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.shard import ReadRange

MIB = 2**20
_TOKENS = 128  # of a text, or of a prompt
_PIECE_BYTES = 16 * MIB  # that plain reads read at once
_READERS = 2  # threads
_SPARE_BYTES = 1024 * MIB  # of memory, beside what a run takes
_FURTHER_PASSES = 3  # through an encoder that is open

Inputs = dict[str, torch.Tensor]
Record = dict[str, Any]


def run(mode: str, path: Path, limit: int, new_tokens: int) -> Record:
    """Makes one run and returns its record; for a process of its own.

    Args:
        limit: MiB/s that the disk is held at, or 0.
        new_tokens: Tokens that a model generates.
    """
    transformers.utils.logging.disable_progress_bar()
    inputs = _inputs(path)
    _warm_up(path, inputs)
    _touch_memory(int(_memory_share(mode) * weight_bytes(path)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of RSS begins anew
    with limited_disk(path, limit * MIB or None) as error:
        if limit and error is not None:
            raise SystemExit(f"the disk cannot be held: {error}")
        baseline = process_rss_bytes()
        record = _measure(mode, path, inputs, new_tokens)
    return record | {"rss_bytes": max(0, _peak_rss_bytes() - baseline)}


def _measure(mode: str, path: Path, inputs: Inputs, new_tokens: int) -> Record:
    kind, _, option = mode.partition("-")
    if kind == "disk":
        return measure_disk(path)
    if kind in ("pipeload", "budget"):
        return anyio.run(_hermes, path, inputs, new_tokens, kind, option, backend_options={"use_uvloop": True})
    if kind == "overlapped":
        return _overlapped(path, inputs, new_tokens)
    kinds = {"transformers": _transformers, "compute": _compute, "baseline": _baseline, "pipeswitch": _pipeswitch}
    return kinds[kind](path, inputs, new_tokens)


def weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _inputs(path: Path) -> Inputs:
    config = transformers.AutoConfig.from_pretrained(path)
    torch.manual_seed(1)
    if config.model_type == "vit":
        return {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size)}
    return {"input_ids": torch.randint(10, 20_000, (1, _TOKENS))}


def _peak_rss_bytes() -> int:
    """The peak of this process alone. `getrusage` also counts the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _warm_up(path: Path, inputs: Inputs) -> None:
    """Runs one layer of the model, so that no mode pays for threads and kernels that all need.

    With an empty page cache, a kernel's code is read when it first runs, behind the weights on a held disk.
    """
    model_class, config = _model_class(path)
    config.num_hidden_layers = 1
    if hasattr(config, "vocab_size"):
        config.vocab_size = 1000
    inputs = {name: value % 1000 if name == "input_ids" else value for name, value in inputs.items()}
    model = model_class._from_config(config, dtype=config.dtype).eval()
    with torch.inference_mode():
        model(**inputs)


def _memory_share(mode: str) -> float:
    """The most memory that a mode takes, as a share of the weights."""
    kind, _, option = mode.partition("-")
    if kind == "budget":
        return 1.25 * float(option)
    return {"disk": 0.1, "pipeload": 0.5}.get(kind, 1.25)


def _touch_memory(nbytes: int) -> None:
    """Writes to this much memory and `_SPARE_BYTES` more, and gives it back.

    A virtual machine may have to get each page from its host when it is used, at a tenth of the rate at which it has
    pages of its own; and one that reports free memory gives pages back that were free for two seconds, so that without
    `_SPARE_BYTES` they would be gone again before a run needs them. A machine of one's own has its memory.
    """
    with mmap.mmap(-1, nbytes + _SPARE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1


def measure_disk(path: Path) -> Record:
    """The rate of plain direct reads."""
    tensors = Checkpoint.open(path).tensors.values()
    file = max((spec.file for spec in tensors), key=lambda file: file.stat().st_size)
    return {"bytes_per_s": file.stat().st_size / read_directly(_pieces([file]), _READERS)}


def _pieces(files: Iterable[Path]) -> list[list[ReadRange]]:
    sizes = {file: file.stat().st_size for file in files}
    return [
        [ReadRange(file, offset, min(_PIECE_BYTES, size - offset), 0)]
        for file, size in sizes.items()
        for offset in range(0, size, _PIECE_BYTES)
    ]


def _overlapped(path: Path, inputs: Inputs, new_tokens: int) -> Record:
    """Plain reads of all weights and inference from memory, started together without any dependence.

    Both share processors, and a virtual disk takes some too: no pipeline on this machine overlaps better than that.
    """
    model = _load(path)
    pieces = _pieces(path.glob("*.safetensors"))

    with torch.inference_mode(), ThreadPoolExecutor(1) as reader:

        def beside_reads(compute: Callable[[], object]) -> float:
            started = time.perf_counter()
            reading = reader.submit(read_directly, pieces, _READERS)
            compute()
            reading.result()
            return time.perf_counter() - started

        model(**inputs)
        record = {"latency_s": statistics.median(beside_reads(lambda: model(**inputs)) for _ in range(3))}
        if model.can_generate():
            seen = model(**inputs, use_cache=True).past_key_values
            last = inputs["input_ids"][:, -1:]
            seconds = [beside_reads(lambda: model(last, past_key_values=seen)) for _ in range(new_tokens)]
            record["per_token_s"] = statistics.median(seconds)
    return record


# --- with transformers: all at once, or layer by layer ---


def _transformers(path: Path, inputs: Inputs, new_tokens: int) -> Record:
    started = time.perf_counter()
    model = _load(path)
    return _finish(model, inputs, new_tokens, started) | {"memory_bytes": _model_bytes(model)}


def _compute(path: Path, inputs: Inputs, new_tokens: int) -> Record:
    model = _load(path)
    _finish(model, inputs, new_tokens, time.perf_counter())
    records = [_finish(model, inputs, new_tokens, time.perf_counter()) for _ in range(3)]
    return sorted(records, key=lambda record: record["latency_s"])[1]


def _load(path: Path) -> PreTrainedModel:
    model_class, _ = _model_class(path)
    return model_class.from_pretrained(path, local_files_only=True, dtype="auto").eval()


def _model_class(path: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    config = transformers.AutoConfig.from_pretrained(path)
    return getattr(transformers, config.architectures[0]), config


def _baseline(path: Path, inputs: Inputs, new_tokens: int) -> Record:
    started = time.perf_counter()
    model = _empty_model(path)
    groups = layer_groups(model)
    _load_groups(model, path, len(groups), lambda idx: None)
    load_s = time.perf_counter() - started
    memory = {"memory_bytes": _model_bytes(model) + _largest_bytes(model, groups)}
    return _finish(model, inputs, new_tokens, started) | memory | {"load_s": load_s}


def _pipeswitch(path: Path, inputs: Inputs, new_tokens: int) -> Record:
    """As the baseline, with the loader on a thread of its own."""
    started = time.perf_counter()
    model = _empty_model(path)
    groups = layer_groups(model)
    loaded = [threading.Event() for _ in groups]
    _await_groups(model, groups, loaded)
    loader = threading.Thread(target=_load_groups, args=(model, path, len(groups), lambda idx: loaded[idx].set()))
    loader.start()
    record = _finish(model, inputs, new_tokens, started)
    loader.join()
    return record | {"memory_bytes": _model_bytes(model) + _largest_bytes(model, groups)}


def _empty_model(path: Path) -> PreTrainedModel:
    """A model with memory for its weights, and with buffers that no checkpoint has (such as GPT-J's rotary table)."""
    model_class, config = _model_class(path)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=config.dtype).eval()
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for weight in model.state_dict(keep_vars=True).values():
        weight._is_hf_initialized = True  # as `from_pretrained` marks what it has loaded
    model.initialize_weights()
    return model


def _load_groups(model: nn.Module, path: Path, count: int, done: Callable[[int], None]) -> None:
    parameters = model.state_dict()
    for idx in range(count):
        with torch.inference_mode():
            # Mapped, so that copying reads the file: half again as fast as reading it into memory first.
            state = torch.load(path / "layers" / f"{idx}.pt", weights_only=True, mmap=True)
            for name, value in state.items():
                parameters[name].copy_(value)
        done(idx)


def _await_groups(model: nn.Module, groups: list[list[str]], loaded: list[threading.Event]) -> None:
    """Each module waits for the groups that its own parameters are in."""
    event_of = {name: event for group, event in zip(groups, loaded, strict=True) for name in group}
    for path, module in model.named_modules():
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        events = {event_of[name] for name in names if name in event_of}
        if events:
            module.register_forward_pre_hook(lambda _, args, events=events: [event.wait() for event in events] and None)


def _model_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _largest_bytes(model: nn.Module, groups: list[list[str]]) -> int:
    parameters = model.state_dict()
    return max(sum(parameters[name].nbytes for name in group) for group in groups)


def _finish(model: PreTrainedModel, inputs: Inputs, new_tokens: int, started: float) -> Record:
    """Runs the model, and times it from `started`."""
    with torch.inference_mode():
        if "pixel_values" in inputs or not model.can_generate():
            output = model(**inputs).last_hidden_state
            return {"latency_s": time.perf_counter() - started, "output": output[0, -1, :8].tolist()}
        moments: list[float] = []
        streamer = _Moments(moments)
        tokens = model.generate(
            inputs["input_ids"], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, streamer=streamer,
            attention_mask=torch.ones_like(inputs["input_ids"]),
        )  # fmt: skip
    per_token = (moments[-1] - moments[0]) / (new_tokens - 1)
    new = [float(token_id) for token_id in tokens[0, _TOKENS:]]
    return {"latency_s": moments[0] - started, "per_token_s": per_token, "output": new}


class _Moments:
    """The times of new tokens; `generate` first passes the prompt."""

    def __init__(self, moments: list[float]) -> None:
        self._moments = moments
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls > 1:
            self._moments.append(time.perf_counter())

    def end(self) -> None:
        pass


# --- with this library ---


async def _hermes(path: Path, inputs: Inputs, new_tokens: int, kind: str, option: str) -> Record:
    weights = weight_bytes(path)
    budget = int(weights * float(option)) if kind == "budget" else 2 * weights
    config = EngineConfig(prompt_lookup=False)
    if kind == "pipeload":
        agents = int(option)
        config = EngineConfig(
            prompt_lookup=False, num_loading_agents=agents, max_resident_layers=agents + 1, max_tokens_per_sweep=256
        )
    started = time.perf_counter()
    try:
        async with Engine(path, memory_budget=budget, config=config) as engine:
            open_s = time.perf_counter() - started
            return {"open_s": open_s} | await _run_engine(engine, inputs, new_tokens, started)
    except MemoryBudgetError as error:
        return {"refused": str(error)}


async def _run_engine(engine: Engine, inputs: Inputs, new_tokens: int, started: float) -> Record:
    record: Record
    if engine.plan.kv_bytes_per_token:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        moments, new, sweeps = [], [], []
        async for chunk in engine.generate(inputs["input_ids"][0].tolist(), params):
            moments.append(time.perf_counter())
            sweeps.append(engine.statistics().sweeps)
            new += [float(token_id) for token_id in chunk.token_ids]
        record = {"latency_s": moments[0] - started, "output": new, "prompt_sweeps": sweeps[0]}
        record["per_token_s"] = (moments[-1] - moments[0]) / (new_tokens - 1)
    else:
        output = (await engine.forward(**inputs)).last_hidden_state
        record = {"latency_s": time.perf_counter() - started, "output": output[0, -1, :8].tolist()}
        further = []
        for _ in range(_FURTHER_PASSES):
            started = time.perf_counter()
            await engine.forward(**inputs)
            further.append(time.perf_counter() - started)
        record["per_pass_s"] = statistics.median(further)
    plan, done = engine.plan, engine.statistics()
    record["memory_bytes"] = plan.resident_bytes + plan.ring_bytes
    record["leased_bytes"] = done.peak_bytes_in_use
    record["bytes_per_sweep"] = plan.bytes_per_sweep
    record["bytes_read"] = plan.resident_bytes + plan.bytes_per_sweep
    return record
