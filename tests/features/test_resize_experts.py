"""Another budget for a mixture of experts: fewer or more experts stay, with a ring or without, and no token changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineConfig, MemoryBudgetError, Plan
from hermes_async.planning.expert_use import all_expert_bytes
from hermes_async.storage.buffers import Buffer
from tests.engines import check_nothing_is_left, greedy_params
from tests.inside import inside
from tests.models import mixture_config

pytestmark = pytest.mark.anyio

CONFIG = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4, kv_budget="64KiB")
PROMPTS = [[5, 6, 7], [9, 8, 7, 6]]


def check(engine: Engine) -> Plan:
    """What is leased, planned and in memory is the same. Returns the plan."""
    statistics, plan = engine.statistics(), engine.plan
    assert statistics.bytes_in_use <= statistics.memory_budget == plan.memory_budget
    assert statistics.holders["resident weights"] == plan.resident_bytes
    assert statistics.holders.get("ring buffers", 0) == plan.ring_bytes
    assert statistics.holders["experts"] == plan.expert_bytes >= plan.least_expert_bytes
    resident = [stage for stage in inside(engine).stages if stage.resident]
    assert sum(stage.layout.slot_bytes for stage in resident) == plan.resident_bytes
    return plan


def refuse(sizes: Sequence[int]) -> list[Buffer]:
    if sizes:
        raise MemoryBudgetError("the system does not give it", requested_bytes=sum(sizes), budget_bytes=0)
    return []


async def test_a_mixture_is_resized_while_it_generates(
    random_model: Any, save_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, params = save_model(random_model(mixture_config())), replace(greedy_params(12), ignore_eos=True)
    async with Engine(path, memory_budget="16MiB", config=CONFIG) as engine:
        assert not engine.plan.reads_weights
        expected = [(await engine.complete(prompt, params)).token_ids for prompt in PROMPTS]
        least = engine.plan.minimum_budget
    async with Engine(path, memory_budget=least, config=CONFIG) as engine:
        opened = check(engine)
        assert opened.num_buffers and not opened.resident and opened.expert_bytes == opened.least_expert_bytes
        answers: list[Any] = []

        async def ask() -> None:
            for prompt in PROMPTS * 6:
                answers.append((await engine.complete(prompt, params)).token_ids)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            for budget in ("8MiB", least + 200_000, "3MiB", least, least + 600_000, "2MiB", least):
                await engine.resize(budget)
                plan = check(engine)
                assert plan.cached_share < 1 or plan.resident == frozenset(range(len(plan.stages)))
                await anyio.wait_all_tasks_blocked()
        assert answers == expected * 6
        before = engine.plan
        with monkeypatch.context() as patch:
            patch.setattr(Buffer, "side_by_side", refuse)
            with pytest.raises(MemoryBudgetError, match="the system does not give"):
                await engine.resize("8MiB")
        assert check(engine) == before
        plan = await engine.resize("8MiB")
        assert (plan.num_buffers, plan.bytes_per_sweep, plan.cached_share) == (0, 0, 1)
        assert plan.expert_bytes == all_expert_bytes(plan.expert_layers)
        for _ in range(2):  # the first time, experts come into the cache
            before = engine.statistics().bytes_read
            await engine.complete(PROMPTS[0], params)
        rows = 16 * 4096
        assert engine.statistics().bytes_read - before <= rows
        with pytest.raises(MemoryBudgetError, match="for experts"):
            await engine.resize(least // 2)
        assert check(engine) == plan
        await check_nothing_is_left(engine)
