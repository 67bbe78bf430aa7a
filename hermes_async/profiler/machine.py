"""Measures the machine without an engine: the disk by agents and read size, kernels by dtype and tokens."""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path

import anyio
import torch
from torch import nn

from hermes_async.foreign_errors import ungrouped
from hermes_async.modeling.kernels import without_one_dnn
from hermes_async.modeling.skeleton import layers_of
from hermes_async.planning.machine_speeds import DiskRate
from hermes_async.planning.profile import KernelProfile
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_down
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.shard import ReadRange
from hermes_async.storage.threads import DaemonExecutor, run_in_thread

KERNEL_TOKENS = (1, 4, 16, 64, 256)
AGENTS = (1, 2, 3, 4)
READ_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
_DISK_SECONDS = 1.0  # for each number of agents with each read size
_DISK_REST_SECONDS = 0.2  # not counted
_DISK_READS = 2  # the fewest of each agent
_KERNEL_SECONDS = 0.1
_MAX_MATRIX_ELEMENTS = 8 << 20


async def measure_disk(checkpoint: Checkpoint, *, direct: bool = True) -> tuple[DiskRate, ...]:
    """The rates of reading the checkpoint's largest shard, by number of agents and read size."""
    file, size = await run_in_thread(_largest_shard, checkpoint, left_at_exit=True)
    rates = []
    # Of a file that is shorter than all of these, one agent reads the whole.
    sizes = READ_BYTES if size >= min(READ_BYTES) else (size,) if size else ()
    for num_agents, read_bytes in itertools.product(AGENTS, sizes):
        if num_agents * read_bytes <= size:
            rate = await _disk_rate(file, size, num_agents, read_bytes, direct=direct)
            rates.append(DiskRate(num_agents, read_bytes, rate))
    return tuple(rates)


def _largest_shard(checkpoint: Checkpoint) -> tuple[Path, int]:
    sizes = {file: align_down(file.stat().st_size) for file in {spec.file for spec in checkpoint.tensors.values()}}
    file = max(sizes, key=lambda file: sizes[file])
    return file, sizes[file]


async def _disk_rate(file: Path, size: int, num_agents: int, read_bytes: int, *, direct: bool) -> float:
    """Bytes a second without the first reads: an idle disk is faster at first, and new buffers have no pages yet."""
    ended_at: list[list[float]] = [[] for _ in range(num_agents)]  # the end of each read, by agent
    offsets = itertools.cycle(range(0, size - read_bytes + 1, read_bytes))
    async with AsyncExitStack() as exits:
        executor = DaemonExecutor(num_agents, "hermes-profiler")

        async def shutdown() -> None:
            await run_in_thread(executor.shutdown, left_at_exit=True)

        exits.push_async_callback(shutdown)
        reader = await exits.enter_async_context(Reader([file], executor, ReadStatistics(), direct=direct))
        buffers = [Buffer(read_bytes + ALIGNMENT) for _ in ended_at]
        for buffer in buffers:
            exits.callback(buffer.close)

        async def agent(buffer: Buffer, own: list[float]) -> None:
            while len(own) <= _DISK_READS or time.perf_counter() < started + _DISK_SECONDS:
                await reader.read([ReadRange(file, next(offsets), read_bytes, 0)], buffer.view)
                own.append(time.perf_counter())

        started = time.perf_counter()
        with ungrouped():
            async with anyio.create_task_group() as group:
                for buffer, own in zip(buffers, ended_at, strict=True):
                    group.start_soon(agent, buffer, own)
    began = max(started + _DISK_REST_SECONDS, *(own[0] for own in ended_at))
    counted = sorted(moment for own in ended_at for moment in own if moment > began)
    if len(counted) < _DISK_READS:  # all reads ended during the warm-up
        began, counted = started, sorted(itertools.chain(*ended_at))
    return len(counted) * read_bytes / (counted[-1] - began)


def widest_matrix(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the largest matrix of a layer, with fewer rows if it has too many elements."""
    matrices = [
        (parameter.shape[0], parameter.shape[1])
        for layer in layers_of(model) or [model]
        for parameter in layer.parameters()
        if parameter.dim() == 2
    ]
    rows, columns = max(matrices, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))
    return max(1, min(rows, _MAX_MATRIX_ELEMENTS // columns)), columns


def measure_kernels(shape: tuple[int, int], products: Bfloat16Products) -> tuple[KernelProfile, ...]:
    """Times products with a matrix of `shape` in each dtype, with and without oneDNN. Call it on a worker thread.

    Args:
        products: How the engine multiplies with bfloat16 weights.
    """
    profiles = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        for kernel in ("oneDNN", "native"):
            chosen = products if dtype == torch.bfloat16 and kernel == "oneDNN" else LINEAR
            with torch.inference_mode(), without_one_dnn() if kernel == "native" else nullcontext():
                rates = {count: _kernel_rate(weight, count, chosen) for count in KERNEL_TOKENS}
            profiles.append(KernelProfile(str(dtype).removeprefix("torch."), kernel, rates))
    return tuple(profiles)


def _kernel_rate(weight: torch.Tensor, num_tokens: int, products: Bfloat16Products) -> float:
    inputs = torch.randn(num_tokens, weight.shape[1]).to(weight.dtype)
    products.linear(inputs, weight)
    seconds: list[float] = []
    while not seconds or sum(seconds) < _KERNEL_SECONDS:
        started = time.perf_counter()
        products.linear(inputs, weight)
        seconds.append(time.perf_counter() - started)
    return 2 * num_tokens * weight.numel() / statistics.median(seconds)
