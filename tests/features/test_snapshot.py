"""`Engine.snapshot`: what an engine does at one moment."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineClosedError, EngineSnapshot, ReadError
from hermes_async.engine.prompt import prepare
from tests.disks import Disk, Read
from tests.engines import greedy_params, open_engine, settle, tokens, until
from tests.inside import inside
from tests.models import TinyModel

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def opened(model: Any, **config: Any) -> AsyncGenerator[Engine, None]:
    async with open_engine(model, **config) as engine:
        await settle(engine)
        yield engine


def check_memory(engine: Engine, snapshot: EngineSnapshot) -> None:
    """The kinds are the governor's holders, and fit into the budget."""
    memory, statistics = snapshot.memory, engine.statistics()
    kinds = memory.weights_bytes + memory.ring_bytes + memory.kv_bytes + memory.workspace_bytes + memory.other_bytes
    kinds += memory.expert_bytes
    assert kinds == sum(statistics.holders.values()) == statistics.bytes_in_use
    assert kinds + memory.free_bytes == memory.budget_bytes == statistics.memory_budget
    assert 0 <= memory.kv_bytes <= memory.kv_budget_bytes
    assert min(memory.free_bytes, memory.other_bytes) >= 0


async def test_an_idle_engine(tiny_model: TinyModel, no_blocking: Any) -> None:
    async with opened(tiny_model) as engine:
        snapshot, plan = engine.snapshot(), engine.plan
        check_memory(engine, snapshot)
    assert (snapshot.engine, snapshot.sweeping, snapshot.sweep, snapshot.stage_idx) == ("open", False, 0, None)
    assert snapshot.requests == ()
    assert snapshot.memory.weights_bytes == plan.resident_bytes
    assert snapshot.memory.ring_bytes == plan.ring_bytes
    assert snapshot.memory.workspace_bytes == plan.workspace_bytes
    assert (snapshot.bytes_per_sweep, snapshot.expert_bytes_per_sweep) == (plan.bytes_per_sweep, 0)
    assert snapshot.disk_sweep_seconds > 0
    assert not snapshot.disk_measured
    streamed = [stage for stage in snapshot.stages if not stage.resident]
    ready = [stage.activity for stage in streamed[: plan.num_buffers]]
    assert ready == ["ready"] * plan.num_buffers
    assert all(stage.activity == "empty" for stage in streamed[plan.num_buffers :])
    loaded, resident = snapshot.resident_bytes
    assert loaded == resident == plan.resident_bytes
    assert str(tiny_model.path) not in json.dumps(snapshot.as_dict())


async def test_a_sweep(tiny_model: TinyModel) -> None:
    async with opened(tiny_model) as engine:
        taken: list[EngineSnapshot] = []

        def take() -> None:
            taken.append(engine.snapshot())
            check_memory(engine, taken[-1])

        inside(engine).on_stage_computed(take)
        prompt = tokens(1, 40)  # three chunks
        completion = await engine.complete(prompt, greedy_params(3), request_id="mine")
        after = engine.snapshot()
    streamed = [idx for idx, stage in enumerate(taken[0].stages) if not stage.resident]
    num_sweeps = after.sweep
    assert [snapshot.stage_idx for snapshot in taken] == streamed * num_sweeps
    for snapshot in taken:
        computing = [idx for idx, stage in enumerate(snapshot.stages) if stage.activity == "computing"]
        assert computing == [snapshot.stage_idx]
        assert snapshot.sweeping
    assert [snapshot.sweep for snapshot in taken] == [sweep for sweep in range(num_sweeps) for _ in streamed]
    requests = [snapshot.requests[0] for snapshot in taken[:: len(streamed)]]
    assert {request.request_id for request in requests} == {"mine"}
    assert [request.activity for request in requests] == ["prefilling"] * 3 + ["generating"] * 2
    assert [request.computed_tokens for request in requests] == [0, 16, 32, 40, 40]
    assert [request.output_tokens for request in requests] == [0, 0, 0, 1, 2]
    assert {(request.prompt_tokens, request.max_output_tokens) for request in requests} == {(40, 3)}
    assert (after.tokens_generated, after.prompt_tokens_computed) == (len(completion.token_ids), 40)
    assert (after.sweeping, after.requests, after.stage_idx) == (False, (), None)
    assert all(stage.activity != "computing" for stage in after.stages)


async def test_requests_that_are_prepared_wait_or_are_paused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tiny_model, max_sequences=1, max_buffered_chunks=1) as engine, engine.session() as session:
        turn = session.generate("w2 w3", greedy_params(8))
        async with contextlib.aclosing(turn), anyio.create_task_group() as tasks:
            await anext(turn)
            await until(lambda: engine.statistics().num_paused == 1)
            (paused,) = engine.snapshot().requests
            assert (paused.activity, paused.in_session, engine.snapshot().num_sessions) == ("paused", True, 1)
            taken: list[list[str]] = []
            inside(engine).on_stage_computed(
                lambda: taken.append([request.activity for request in engine.snapshot().requests])
            )
            async with anyio.create_task_group() as both:
                for seed in (2, 3):
                    both.start_soon(engine.complete, tokens(seed, 3), greedy_params(1))
            assert ["paused", "prefilling", "waiting"] in taken
            may_go_on = threading.Event()

            def prepare_later(*args: Any, **kwargs: Any) -> Any:
                may_go_on.wait()
                return prepare(*args, **kwargs)

            monkeypatch.setattr("hermes_async.engine.streaming.prepare", prepare_later)
            tasks.start_soon(functools.partial(engine.complete, request_id="late"), tokens(4, 3), greedy_params(2))
            await until(lambda: len(engine.snapshot().requests) == 2)
            assert engine.snapshot().requests[1].activity == "preparing"
            assert engine.snapshot().requests[1].request_id == "late"
            may_go_on.set()


async def test_a_stage_that_cannot_be_read(tiny_model: TinyModel, disk: Disk) -> None:
    async with opened(tiny_model) as engine:

        def on_read(path: Path, offset: int, read: Read) -> int:
            if threading.current_thread().name.startswith("hermes-loading-agent"):  # not rows of the embedding
                raise OSError(errno.EIO, "broken")
            return read()

        disk.on_read = on_read
        with pytest.raises(ReadError):
            await engine.complete(tokens(1, 3), greedy_params(9))
        await until(lambda: any(stage.activity == "failed" for stage in engine.snapshot().stages))


async def test_before_and_after(tiny_model: TinyModel) -> None:
    engine = open_engine(tiny_model)
    with pytest.raises(EngineClosedError):
        engine.snapshot()
    async with engine:
        completion = await engine.complete([5], greedy_params(4))
    snapshot = engine.snapshot()
    assert snapshot.engine == "closed"
    assert snapshot.tokens_generated == len(completion.token_ids)
    assert {stage.activity for stage in snapshot.stages} == {"empty"}
    check_memory(engine, snapshot)
    assert snapshot.memory.free_bytes == snapshot.memory.budget_bytes
