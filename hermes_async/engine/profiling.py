"""The Layer Profiler: what each stage takes to load and to compute, what the disk gives, and which kernels are fast.

Stages are measured where they run: in an engine, by its own trace. So a profile holds for the budget that it was made
in, and says which that was.

Source: Hermes (arXiv 2409.04249), section IV (Layer Profiler).
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.config import EngineConfig, SamplingParams
from hermes_async.engine.engine import Engine
from hermes_async.engine.opening import OpenedModel
from hermes_async.modeling.inputs import example_inputs
from hermes_async.modeling.skeleton import layers_of
from hermes_async.pipeload.pipeline import ungrouped
from hermes_async.pipeload.trace import Event, Timeline, Trace
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_down
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.reader import Reader, ReadRange, ReadStatistics

STAGE_TOKENS = (1, 16, 64)
KERNEL_TOKENS = (1, 4, 16, 64, 256)
AGENTS = (1, 2, 4)
READ_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
_REPEATS = 3  # sweeps of each number of tokens; the middle one counts
_DISK_SECONDS = 0.5  # that each pair of agents and read size is measured for
_KERNEL_SECONDS = 0.1
_MAX_KERNEL_NUMBERS = 8 << 20  # of the matrix that kernels are measured with


@dataclass(frozen=True, slots=True)
class StageProfile:
    """One stage.

    Attributes:
        nbytes: What is read.
        resident: It was loaded once, and stayed.
        load_s: One load, beside those of the other agents.
        compute_s: One computation, by the tokens in the sweep.
    """

    name: str
    nbytes: int
    resident: bool
    load_s: float
    compute_s: dict[int, float]


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """What the disk gives: bytes a second, with so many agents that read so much at once."""

    num_agents: int
    read_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """How fast the model's widest matrix is multiplied: operations a second, by tokens.

    Attributes:
        kernel: "oneDNN", which torch takes by itself, or "native", without it.
    """

    dtype: str
    kernel: str
    flops: dict[int, float]


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured.

    Attributes:
        memory_budget: Of the engine that the stages ran in, bytes.
        dtype: What the model computes in.
        created_at: Seconds since 1970.
    """

    memory_budget: int
    dtype: str
    created_at: float
    stages: tuple[StageProfile, ...]
    disk: tuple[DiskProfile, ...]
    kernels: tuple[KernelProfile, ...]


async def measure(source: str | os.PathLike[str], memory_budget: int | str, config: EngineConfig) -> Profile:
    """Measures a model on this machine: some sweeps, and some seconds more.

    Args:
        config: Sharing and drafting are left out.

    Raises:
        HermesError: As `Engine` on entering, and on running.

    Cancellation: ends within one stage, or one read.
    """
    checkpoint = await anyio.to_thread.run_sync(Checkpoint.open, source)
    disk = await measure_disk(checkpoint, direct=config.direct_io)
    config = replace(config, share_prefixes=False, prompt_lookup=False)
    trace = Trace()
    async with Engine(checkpoint.path, memory_budget=memory_budget, config=config, trace=trace) as engine:
        opened = engine._model().running.opened
        compute_s, load_s = await _measure_stages(engine, opened, trace)
    stages = tuple(
        StageProfile(
            stage.name,
            stage.read_bytes,
            idx in opened.plan.resident,
            load_s.get(stage.name, 0.0),
            compute_s[stage.name],
        )
        for idx, stage in enumerate(opened.plan.stages)
    )
    kernels = await anyio.to_thread.run_sync(_measure_kernels, _widest(opened.skeleton.model))
    dtype = str(opened.skeleton.dtype).removeprefix("torch.")
    return Profile(opened.plan.memory_budget, dtype, time.time(), stages, disk, kernels)


async def _measure_stages(
    engine: Engine, opened: OpenedModel, trace: Trace
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Medians of computing and loading, by stage; resident stages were loaded when the engine opened."""
    compute_s: dict[str, dict[int, float]] = defaultdict(dict)
    loads: dict[str, list[float]] = defaultdict(list)
    names: list[Event] = []  # what the rows are called is told once
    for num_tokens in _token_counts(opened):
        spans: dict[str, list[float]] = defaultdict(list)
        for repeat in range(1 + _REPEATS):
            await _run_sweep(engine, opened, num_tokens)
            events = trace.drain()
            names += [event for event in events if event["ph"] == "M"]
            timeline = Timeline.of([*names, *(event for event in events if event["ph"] != "M")])
            for row, row_spans in timeline.rows.items():
                for span in row_spans:
                    if row.startswith("loading agent"):
                        loads[span.name].append(span.end - span.start)
                    elif row == "inference agent" and repeat > 0 and not span.name.startswith("wait for "):
                        spans[span.name].append(span.end - span.start)
        for name, seconds in spans.items():
            compute_s[name][num_tokens] = statistics.median(seconds)
    return compute_s, {name: statistics.median(seconds) for name, seconds in loads.items()}


def _token_counts(opened: OpenedModel) -> list[int]:
    if opened.seen.tokens_per_image:
        return [opened.seen.tokens_per_image]
    context = (opened.skeleton.context_length or STAGE_TOKENS[-1] + 1) - 1  # one is left to generate
    return [count for count in STAGE_TOKENS if count <= min(context, opened.plan.max_tokens_per_sweep)]


async def _run_sweep(engine: Engine, opened: OpenedModel, num_tokens: int) -> None:
    if opened.skeleton.generates:
        await engine.complete([0] * num_tokens, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        return
    inputs = example_inputs(opened.skeleton.model)
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.zeros(1, num_tokens, dtype=torch.long)
    await engine.forward(**inputs)


async def measure_disk(checkpoint: Checkpoint, *, direct: bool = True) -> tuple[DiskProfile, ...]:
    """Reads the checkpoint's largest shard with so many agents, so much at once."""
    file, size = await anyio.to_thread.run_sync(_largest_shard, checkpoint)
    profiles = []
    for num_agents in AGENTS:
        for read_bytes in READ_BYTES:
            if num_agents * read_bytes <= size:
                rate = await _disk_rate(file, size, num_agents, read_bytes, direct=direct)
                profiles.append(DiskProfile(num_agents, read_bytes, rate))
    return tuple(profiles)


def _largest_shard(checkpoint: Checkpoint) -> tuple[Path, int]:
    sizes = {file: align_down(file.stat().st_size) for file in {spec.file for spec in checkpoint.tensors.values()}}
    file = max(sizes, key=lambda file: sizes[file])
    return file, sizes[file]


async def _disk_rate(file: Path, size: int, num_agents: int, read_bytes: int, *, direct: bool) -> float:
    read = ReadStatistics()
    async with AsyncExitStack() as exits:
        executor = ThreadPoolExecutor(num_agents, "hermes-profiler")

        async def shutdown() -> None:
            await anyio.to_thread.run_sync(executor.shutdown)

        exits.push_async_callback(shutdown)
        offsets = itertools.cycle(range(0, size - read_bytes + 1, read_bytes))
        started = time.perf_counter()

        async def agent(reader: Reader, buffer: Buffer) -> None:
            while time.perf_counter() < started + _DISK_SECONDS:
                await reader.read([ReadRange(file, next(offsets), read_bytes, 0)], buffer.view)

        agents = []
        for _ in range(num_agents):
            buffer = Buffer(read_bytes + ALIGNMENT)
            exits.callback(buffer.close)
            reader = await exits.enter_async_context(Reader(executor, read, direct=direct))
            await reader.open([file])
            # The first read of a buffer also waits for its pages.
            await reader.read([ReadRange(file, next(offsets), read_bytes, 0)], buffer.view)
            agents.append((reader, buffer))
        before, started = read.bytes_read, time.perf_counter()
        with ungrouped():
            async with anyio.create_task_group() as group:
                for reader, buffer in agents:
                    group.start_soon(agent, reader, buffer)
        return (read.bytes_read - before) / (time.perf_counter() - started)


def _widest(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the largest matrix of a layer, with fewer rows where it would take much memory."""
    matrices = [
        (parameter.shape[0], parameter.shape[1])
        for layer in layers_of(model) or [model]
        for parameter in layer.parameters()
        if parameter.dim() == 2
    ]
    rows, columns = max(matrices, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))
    return max(1, min(rows, _MAX_KERNEL_NUMBERS // columns)), columns


def _measure_kernels(shape: tuple[int, int]) -> tuple[KernelProfile, ...]:
    profiles = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        for kernel in ("oneDNN", "native"):
            with torch.inference_mode(), _one_dnn(kernel == "oneDNN"):
                rates = {count: _kernel_rate(weight, count) for count in KERNEL_TOKENS}
            profiles.append(KernelProfile(str(dtype).removeprefix("torch."), kernel, rates))
    return tuple(profiles)


@contextmanager
def _one_dnn(enabled: bool) -> Iterator[None]:
    """Process-wide. As `torch.backends.mkldnn.flags`, which also asks for settings of other devices, and warns."""
    torch_c: Any = torch._C
    before = torch_c._get_mkldnn_enabled()
    torch_c._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch_c._set_mkldnn_enabled(before)


def _kernel_rate(weight: torch.Tensor, num_tokens: int) -> float:
    inputs = torch.randn(num_tokens, weight.shape[1]).to(weight.dtype)
    F.linear(inputs, weight)
    seconds: list[float] = []
    while not seconds or sum(seconds) < _KERNEL_SECONDS:
        started = time.perf_counter()
        F.linear(inputs, weight)
        seconds.append(time.perf_counter() - started)
    return 2 * num_tokens * weight.numel() / statistics.median(seconds)
