"""`ready` and `wait_ready`: whether the weights that stay are in memory, before any request asks for them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineClosedError, EngineConfig, EngineError, EngineFailedError, ReadError
from tests.engines import until
from tests.inside import inside

pytestmark = pytest.mark.anyio

RESIDENT = EngineConfig(num_loading_agents=1)
"""With a budget for all of the small model."""


class HeldDisk:
    """Holds all reads until `go` is set, and fails those that come while `fails`."""

    def __init__(self, disk: Any) -> None:
        self.go = threading.Event()
        self.num_reads = 0
        self.fails = False
        disk.on_read = self.on_read

    def on_read(self, path: Path, offset: int, read: Callable[[], int]) -> int:
        self.go.wait(30)
        self.num_reads += 1
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")
        return read()


async def test_an_engine_becomes_ready_without_a_request(tiny_model: Any, disk: Any) -> None:
    held = HeldDisk(disk)
    engine = Engine(tiny_model.path, memory_budget="8MiB", config=RESIDENT)
    assert not engine.ready
    with pytest.raises(EngineClosedError, match="not entered"):
        await engine.wait_ready()
    async with engine:
        assert not engine.ready
        with anyio.move_on_after(0) as waited:  # another user's wait may end
            await engine.wait_ready()
        assert waited.cancelled_caught
        held.go.set()
        await engine.wait_ready()
        assert engine.ready
        num_reads = held.num_reads
        await engine.wait_ready()
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        assert held.num_reads == num_reads  # all was there
    assert not engine.ready
    with pytest.raises(EngineClosedError):
        await engine.wait_ready()


async def test_streamed_weights_do_not_count(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        assert engine.plan.streamed
        await engine.wait_ready()
        assert engine.ready


async def test_weights_that_could_not_be_read_are_read_again(tiny_model: Any, disk: Any) -> None:
    held = HeldDisk(disk)
    held.go.set()
    held.fails = True
    async with Engine(tiny_model.path, memory_budget="8MiB", config=RESIDENT) as engine:
        for _ in range(2):
            with pytest.raises(ReadError, match="Input/output error"):
                await engine.wait_ready()
            assert not engine.ready
        await until(lambda: not inside(engine).is_loading)  # all have failed
        held.fails = False
        await engine.wait_ready()
        assert engine.ready
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        assert engine.ready


async def test_a_request_reads_them_again_too(tiny_model: Any, disk: Any) -> None:
    held = HeldDisk(disk)
    held.go.set()
    held.fails = True
    async with Engine(tiny_model.path, memory_budget="8MiB", config=RESIDENT) as engine:
        with pytest.raises(ReadError):
            await engine.wait_ready()
        await until(lambda: not inside(engine).is_loading)
        held.fails = False
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]
        await engine.wait_ready()
        assert engine.ready


@pytest.mark.parametrize("fails", [False, True])
async def test_an_end_of_the_engine_ends_the_wait(tiny_model: Any, disk: Any, fails: bool) -> None:
    held = HeldDisk(disk)
    errors: list[Exception] = []

    async def wait() -> None:
        try:
            await engine.wait_ready()
        except EngineError as error:
            errors.append(error)

    def is_over() -> bool:
        try:
            return not engine.plan
        except EngineError:
            return True

    async def let_reads_end() -> None:
        await until(is_over)
        held.go.set()

    engine = Engine(tiny_model.path, memory_budget="8MiB", config=RESIDENT)
    async with anyio.create_task_group() as tasks, engine:
        tasks.start_soon(wait)
        tasks.start_soon(let_reads_end)
        await anyio.wait_all_tasks_blocked()
        if fails:
            inside(engine).fail(ValueError("broken"))
            await until(lambda: bool(errors))
    assert [type(error) for error in errors] == [EngineFailedError if fails else EngineClosedError]
    assert not engine.ready
