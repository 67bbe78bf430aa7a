"""What the machine gives, measured alone: the disk by agents and read size, kernels by dtype and tokens."""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path

import anyio
import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.foreign_errors import ungrouped
from hermes_async.modeling.kernels import without_one_dnn
from hermes_async.modeling.skeleton import layers_of
from hermes_async.planning.profile import KernelProfile
from hermes_async.planning.speeds import DiskSpeed
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_down
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.reader import Reader, ReadRange, ReadStatistics
from hermes_async.storage.threads import DaemonExecutor, run_in_thread

KERNEL_TOKENS = (1, 4, 16, 64, 256)
AGENTS = (1, 2, 3, 4)
READ_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
_DISK_SECONDS = 1.0  # that each pair of agents and read size is measured for
_DISK_REST_SECONDS = 0.2  # of them that do not count
_DISK_READS = 2  # of each agent at the least, that count
_KERNEL_SECONDS = 0.1
_MAX_KERNEL_NUMBERS = 8 << 20  # of the matrix that kernels are measured with


async def measure_disk(checkpoint: Checkpoint, *, direct: bool = True) -> tuple[DiskSpeed, ...]:
    """Reads the checkpoint's largest shard with so many agents, so much at once."""
    file, size = await run_in_thread(_largest_shard, checkpoint, left_at_exit=True)
    profiles = []
    for num_agents in AGENTS:
        for read_bytes in READ_BYTES:
            if num_agents * read_bytes <= size:
                rate = await _disk_rate(file, size, num_agents, read_bytes, direct=direct)
                profiles.append(DiskSpeed(num_agents, read_bytes, rate))
    return tuple(profiles)


def _largest_shard(checkpoint: Checkpoint) -> tuple[Path, int]:
    sizes = {file: align_down(file.stat().st_size) for file in {spec.file for spec in checkpoint.tensors.values()}}
    file = max(sizes, key=lambda file: sizes[file])
    return file, sizes[file]


async def _disk_rate(file: Path, size: int, num_agents: int, read_bytes: int, *, direct: bool) -> float:
    """From when each agent has read once: a disk that rested gives more at first, and buffers wait for their pages."""
    ended: list[list[float]] = [[] for _ in range(num_agents)]
    offsets = itertools.cycle(range(0, size - read_bytes + 1, read_bytes))
    async with AsyncExitStack() as exits:
        executor = DaemonExecutor(num_agents, "hermes-profiler")

        async def shutdown() -> None:
            await run_in_thread(executor.shutdown, left_at_exit=True)

        exits.push_async_callback(shutdown)
        reader = await exits.enter_async_context(Reader([file], executor, ReadStatistics(), direct=direct))

        async def agent(buffer: Buffer, moments: list[float]) -> None:
            while len(moments) <= _DISK_READS or time.perf_counter() < started + _DISK_SECONDS:
                await reader.read([ReadRange(file, next(offsets), read_bytes, 0)], buffer.view)
                moments.append(time.perf_counter())

        agents = []
        for moments in ended:
            buffer = Buffer(read_bytes + ALIGNMENT)
            exits.callback(buffer.close)
            agents.append((buffer, moments))
        started = time.perf_counter()
        with ungrouped():
            async with anyio.create_task_group() as group:
                for one in agents:
                    group.start_soon(agent, *one)
    began = max(started + _DISK_REST_SECONDS, *(moments[0] for moments in ended))
    counted = sorted(moment for moments in ended for moment in moments if moment > began)
    if len(counted) < _DISK_READS:  # a fast disk, or short measurements
        began, counted = started, sorted(itertools.chain(*ended))
    return len(counted) * read_bytes / (counted[-1] - began)


def widest_matrix(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the largest matrix of a layer, with fewer rows where it would take much memory."""
    matrices = [
        (parameter.shape[0], parameter.shape[1])
        for layer in layers_of(model) or [model]
        for parameter in layer.parameters()
        if parameter.dim() == 2
    ]
    rows, columns = max(matrices, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))
    return max(1, min(rows, _MAX_KERNEL_NUMBERS // columns)), columns


def measure_kernels(shape: tuple[int, int]) -> tuple[KernelProfile, ...]:
    """Multiplies a matrix of `shape` in each dtype, with oneDNN and without; for a worker thread."""
    profiles = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        for kernel in ("oneDNN", "native"):
            with torch.inference_mode(), without_one_dnn() if kernel == "native" else nullcontext():
                rates = {count: _kernel_rate(weight, count) for count in KERNEL_TOKENS}
            profiles.append(KernelProfile(str(dtype).removeprefix("torch."), kernel, rates))
    return tuple(profiles)


def _kernel_rate(weight: torch.Tensor, num_tokens: int) -> float:
    inputs = torch.randn(num_tokens, weight.shape[1]).to(weight.dtype)
    F.linear(inputs, weight)
    seconds: list[float] = []
    while not seconds or sum(seconds) < _KERNEL_SECONDS:
        started = time.perf_counter()
        F.linear(inputs, weight)
        seconds.append(time.perf_counter() - started)
    return 2 * num_tokens * weight.numel() / statistics.median(seconds)
