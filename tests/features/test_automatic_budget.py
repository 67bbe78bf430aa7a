"""`memory_budget="auto"` in an engine: it gives back, takes again, and shares with others."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineConfig, MemoryBudgetError
from tests.engines import check_nothing_is_left, until
from tests.features.machines import Machine, told


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    return told(monkeypatch)


@pytest.mark.anyio
async def test_a_second_engine_waits_for_its_share(tiny_model: Any, machine: type[Machine]) -> None:
    machine.total = 600_000
    config = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4)
    async with Engine(tiny_model.path, config=config) as first:
        assert first.plan.memory_budget == 570_000
        assert first.plan.usable_bytes > 570_000 // 2
        async with Engine(tiny_model.path, config=config) as second:
            assert first.plan.memory_budget + second.plan.memory_budget <= 585_000
            assert second.plan.memory_budget >= 0.45 * 570_000
            completions = [
                await engine.complete(tiny_model.prompts[2], tiny_model.params) for engine in (first, second)
            ]
            assert [completion.token_ids for completion in completions] == [tiny_model.references[2]] * 2


@pytest.mark.anyio
async def test_a_budget_larger_than_the_machine_leaves_others_what_its_engine_cannot_use(
    tiny_model: Any, machine: type[Machine]
) -> None:
    config = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4)
    async with Engine(tiny_model.path, memory_budget="1TiB", config=config) as first:
        assert first.plan.usable_bytes < 2_000_000
        machine.total = first.plan.usable_bytes + 1_000_000
        async with Engine(tiny_model.path, config=config) as second:
            assert second.plan.memory_budget == round(0.95 * machine.total) - first.plan.usable_bytes
        machine.total = first.plan.usable_bytes
        with pytest.raises(MemoryBudgetError, match="other engines may hold") as caught:
            await Engine(tiny_model.path, config=config).__aenter__()
        assert caught.value.holders["other engines"] == first.plan.usable_bytes
        machine.total += 1_000_000
        before = first.plan.usable_bytes
        await first.resize(300_000)
        assert first.plan.usable_bytes <= 300_000 < before
        async with Engine(tiny_model.path, config=config) as second:
            assert second.plan.memory_budget == round(0.95 * machine.total) - first.plan.usable_bytes


@pytest.mark.anyio
async def test_an_engine_gives_back_and_takes_again(tiny_model: Any, machine: type[Machine]) -> None:
    config = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4)
    async with Engine(tiny_model.path, config=config) as engine:
        assert engine.plan.bytes_per_sweep == 0
        answers: list[Any] = []

        async def ask() -> None:
            for _ in range(10):
                answers.append((await engine.complete(tiny_model.prompts[2], tiny_model.params)).token_ids)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            machine.total = 500_000
            await until(lambda: engine.plan.memory_budget == 475_000)
            assert engine.plan.bytes_per_sweep == 0  # less KV will do
            machine.total = 100_000  # less than there can be: it gives what it has
            await until(lambda: not engine.plan.resident)
            machine.total = 8 << 20
            await until(lambda: engine.plan.bytes_per_sweep == 0)
        assert answers == [tiny_model.references[2]] * 10
        await check_nothing_is_left(engine)
