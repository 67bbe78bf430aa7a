"""Leaving the engine: what still runs is told, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from transformers import AttentionInterface

from hermes_async import Engine, EngineClosedError, EngineConfig
from hermes_async.pipeload.stage import StageState
from tests.engines import both_loops, until
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


class Left:
    """What is there before, to be compared with what is there after."""

    def __init__(self) -> None:
        gc.collect()
        self.fds = self._fds()
        self.tasks = len(asyncio.all_tasks())
        self.attention = set(AttentionInterface._global_mapping)

    def _fds(self) -> list[str]:
        links = []
        for fd in Path("/proc/self/fd").iterdir():
            try:
                links.append(str(fd.readlink()))
            except FileNotFoundError:  # the directory's own
                continue
        return sorted(link for link in links if link.startswith("/") and not link.startswith(("/dev", "/proc")))

    def check_nothing(self) -> None:
        gc.collect()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("hermes")]
        assert self._fds() == self.fds
        assert len(asyncio.all_tasks()) == self.tasks
        assert set(AttentionInterface._global_mapping) == self.attention


async def test_running_and_waiting_requests_are_told(tiny_model: Any) -> None:
    left = Left()
    config = EngineConfig(num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=16, max_sequences=2)
    errors: list[type] = []

    async def user(idx: int) -> None:
        try:
            while True:
                await engine.complete(tiny_model.prompts[idx % 6], tiny_model.params)
        except EngineClosedError:
            errors.append(EngineClosedError)

    async with anyio.create_task_group() as group:
        async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as engine:
            for idx in range(5):
                group.start_soon(user, idx)
            await until(lambda: engine.statistics().num_waiting >= 3 and engine.statistics().tokens_generated >= 3)
        statistics = engine.statistics()
        assert (statistics.num_running, statistics.num_waiting, statistics.num_leases) == (0, 0, 0)
    assert errors == [EngineClosedError] * 5
    assert all(stage.state is StageState.EMPTY and stage.buffer is None for stage in inside(engine).stages)
    with pytest.raises(EngineClosedError, match="left"):
        await engine.complete([5])
    left.check_nothing()


async def test_an_error_of_the_body_comes_out_as_itself_while_requests_run(tiny_model: Any) -> None:
    left = Left()
    told = []

    async def user() -> None:
        try:
            await engine.complete(tiny_model.prompts[4], tiny_model.params)
        except EngineClosedError as error:
            told.append(error)

    async with anyio.create_task_group() as group:
        with pytest.raises(ZeroDivisionError):
            async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
                group.start_soon(user)
                await until(lambda: engine.statistics().num_running > 0)
                raise ZeroDivisionError
    assert len(told) == 1
    left.check_nothing()


async def test_a_cancelled_body(tiny_model: Any) -> None:
    left = Left()
    with anyio.CancelScope() as scope:
        async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
            async for _ in engine.generate(tiny_model.prompts[2], tiny_model.params):
                scope.cancel()
    assert scope.cancelled_caught
    left.check_nothing()


async def test_a_natively_cancelled_task(tiny_model: Any) -> None:
    left = Left()
    started = anyio.Event()

    async def body() -> None:
        async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
            while True:
                await engine.complete(tiny_model.prompts[2], tiny_model.params)
                started.set()

    task = asyncio.ensure_future(body())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    left.check_nothing()


async def test_cancelled_while_it_opens(tiny_model: Any, disk: Any) -> None:
    left = Left()
    reads = 0

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        nonlocal reads
        reads += 1
        anyio.from_thread.run_sync(scope.cancel, token=token)
        return read()

    disk.on_read = on_read
    token = anyio.lowlevel.current_token()
    with anyio.CancelScope() as scope:
        async with Engine(tiny_model.path, memory_budget="8MiB"):
            pytest.fail("entered")
    assert reads
    assert scope.cancelled_caught
    left.check_nothing()


async def test_an_iterator_that_is_kept_ends_with_the_engine(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        chunks = engine.generate(tiny_model.prompts[2], tiny_model.params)
        await anext(chunks)
    with pytest.raises(EngineClosedError):
        async for _ in chunks:
            pass
