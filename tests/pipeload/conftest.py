"""A small file cut into stages, a disk that can hold and fail its reads, and a pipeline over both."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from anyio.lowlevel import checkpoint

from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import Stage, StageLayout, StageState
from hermes_async.pipeload.trace import Trace
from hermes_async.storage.buffers import BufferPool
from hermes_async.storage.reader import ReadStatistics
from hermes_async.storage.tensor_spec import TensorSpec
from tests.disks import Disk


class Rig:
    """A pipeline over `num_stages` stages of a few pages each, and what its sweeps must see."""

    def __init__(
        self,
        directory: Path,
        num_stages: int,
        *,
        resident: Sequence[int],
        agents: int,
        num_buffers: int,
        trace: Trace | None = None,
        groups: Sequence[str | None] = (),
    ) -> None:
        path = directory / "weights"
        generator = random.Random(0)
        specs = []
        data = bytearray(generator.randbytes(77))  # nothing is aligned
        for idx in range(num_stages):
            nbytes = 5000 + 777 * idx
            specs.append(TensorSpec(f"{idx}", path, len(data), nbytes, torch.uint8, (nbytes,)))
            data += generator.randbytes(nbytes)
        path.write_bytes(data)
        self.path = path
        self.expected = [bytes(data[spec.offset : spec.offset + spec.nbytes]) for spec in specs]
        layouts = [
            StageLayout.of(spec.name, [("weight", spec)], group)
            for spec, group in zip(specs, groups or [None] * num_stages, strict=True)
        ]
        self.stages = [Stage(idx, layout, resident=idx in resident) for idx, layout in enumerate(layouts)]
        slot_bytes = max(layout.slot_bytes for layout in layouts)
        self.governor = MemoryGovernor(num_buffers * slot_bytes)
        self.ring = self.governor.part("ring buffers", num_buffers * slot_bytes, max_leases=num_buffers)
        self.pool = BufferPool(num_buffers, slot_bytes)
        self.buffers = tuple(self.pool._free)
        self.pipeline = Pipeline(
            self.stages,
            num_loading_agents=agents,
            ring=self.ring,
            buffers=self.pool,
            statistics=ReadStatistics(),
            trace=trace,
        )

    def compute(
        self, order: Sequence[int] | None = None, on_stage: Callable[[int], None] = lambda idx: None
    ) -> Callable[[], list[bool]]:
        """A forward pass that visits `order`, and tells of each stage whether its bytes were right."""

        def forward() -> list[bool]:
            right = []
            for idx in range(len(self.stages)) if order is None else order:
                stage = self.stages[idx]
                assert self.pipeline.enter([stage]) is stage
                on_stage(idx)
                (placement,) = stage.layout.placements
                view = stage.loaded.tensor(placement.position, placement.dtype, placement.shape)
                right.append(view.numpy().tobytes() == self.expected[idx])
                self.pipeline.leave(stage)
            return right

        return forward

    async def settle(self) -> None:
        """Returns when the agents have filled the ring and wait for a buffer."""
        busy = (StageState.LOADING, StageState.SPENT)
        await anyio.wait_all_tasks_blocked()
        while any(stage.state in busy for stage in self.stages):
            while any(stage.state in busy for stage in self.stages):
                await checkpoint()
            await anyio.wait_all_tasks_blocked()

    def states(self) -> list[str]:
        return [stage.state.value for stage in self.stages]

    def check_integrity(self) -> None:
        """Every buffer of the ring is free or in a READY stage, once the agents are idle, and so is every lease."""
        held = [stage.buffer for stage in self.stages if not stage.resident and stage.buffer is not None]
        assert all(stage.state is StageState.READY for stage in self.stages if stage.buffer is not None)
        everything = [*held, *self.pool._free]
        assert len(set(map(id, everything))) == len(everything)
        assert set(map(id, everything)) <= set(map(id, self.buffers))
        streamed = [stage for stage in self.stages if stage.lease is not None]
        assert streamed == [stage for stage in self.stages if not stage.resident and stage.buffer is not None]
        statistics = self.ring.statistics()
        assert statistics.holders == {stage.name: stage.layout.slot_bytes for stage in streamed}
        assert statistics.num_leases == len(streamed) <= len(self.buffers)
        assert statistics.num_waiting <= 1
        assert self.governor.statistics().num_leases == 1


@pytest.fixture
def make_rig(tmp_path: Path) -> Callable[..., Rig]:
    numbers = iter(range(1000))

    def make(
        num_stages: int = 6,
        *,
        resident: Sequence[int] = (),
        agents: int = 1,
        num_buffers: int | None = None,
        trace: Trace | None = None,
        groups: Sequence[str | None] = (),
    ) -> Rig:
        directory = tmp_path / f"rig{next(numbers)}"
        directory.mkdir()
        return Rig(
            directory,
            num_stages,
            resident=resident,
            agents=agents,
            num_buffers=agents + 1 if num_buffers is None else num_buffers,
            trace=trace,
            groups=groups,
        )

    return make


class Gate:
    """Holds reads of one place in a file until it is opened; the test sees when a read has come to it."""

    def __init__(self, disk: Disk, stage: Stage) -> None:
        self.offset = stage.layout.ranges[0].offset // 4096 * 4096
        self.entered = threading.Event()
        self.may_pass = threading.Event()
        self._disk = disk

    def __enter__(self) -> Gate:
        def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
            if offset == self.offset:
                self.entered.set()
                assert self.may_pass.wait(30)
            return read()

        self._disk.on_read = on_read
        return self

    def __exit__(self, *_: object) -> None:
        self.may_pass.set()

    async def wait_entered(self) -> None:
        assert await anyio.to_thread.run_sync(self.entered.wait, 30)


@pytest.fixture
def gate(disk: Disk) -> Iterator[Callable[[Stage], Gate]]:
    with contextlib.ExitStack() as gates:
        yield lambda stage: gates.enter_context(Gate(disk, stage))


@contextlib.asynccontextmanager
async def _sweeping(rig: Rig, *args: Any) -> AsyncIterator[list[Any]]:
    result: list[Any] = []

    async def sweep() -> None:
        try:
            result.append(await rig.pipeline.sweep(rig.compute(*args)))
        except BaseException as error:
            result.append(type(error))
            if isinstance(error, Exception) or type(error).__name__ == "SweepAbandoned":
                return
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(sweep)
        yield result


@pytest.fixture
def sweeping() -> Callable[..., contextlib.AbstractAsyncContextManager[list[Any]]]:
    """Runs a sweep beside the block; the list then holds its result or its error's class."""
    return _sweeping
