"""Memory that sequences do not need is lent to weights, and comes back before a request or a sweep needs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineConfig
from hermes_async.serving.lending import HOLDER, SWEEPS_BEFORE_LENDING
from tests.engines import check_nothing_is_left, greedy_params, one_loop, settle, tokens, until
from tests.features.machines import Machine, told
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = one_loop(use_uvloop=True)

CONFIG = EngineConfig(num_loading_agents=1, max_tokens_per_sweep=32, max_sequences=4)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    return told(monkeypatch)


@asynccontextmanager
async def lender(model: Any, machine: type[Machine], **config: Any) -> AsyncIterator[Engine]:
    """An engine with an automatic budget in which some stages are streamed, and has lent what it can."""
    async with Engine(model.path, memory_budget="8MiB", config=CONFIG) as engine:
        least = engine.plan.minimum_budget
    machine.total = round((least + 40_000) / 0.95)
    async with Engine(model.path, config=CONFIG, **config) as engine:
        assert engine.plan.num_buffers > 0
        assert 0 < engine.statistics().bytes_in_use <= engine.plan.memory_budget
        await lend(engine)
        yield engine
        check_leases(engine)


async def lend(engine: Engine) -> None:
    await engine.complete(tokens(1, 1), greedy_params(SWEEPS_BEFORE_LENDING + 1))
    await engine.wait_ready()
    await settle(engine)
    assert engine.statistics().bytes_lent > 0


def check_leases(engine: Engine) -> None:
    """What is leased is what is in memory, and within the budget."""
    statistics, plan = engine.statistics(), engine.plan
    assert statistics.bytes_in_use == sum(statistics.holders.values()) <= plan.memory_budget
    assert statistics.peak_bytes_in_use <= plan.memory_budget
    assert statistics.holders.get(HOLDER, 0) == statistics.bytes_lent <= plan.lendable_bytes
    resident = sum(stage.layout.slot_bytes for stage in inside(engine).stages if stage.resident)
    assert resident == statistics.bytes_resident == plan.resident_bytes + statistics.bytes_lent


async def test_a_stage_on_loan_is_not_read_again(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as engine:
        check_leases(engine)
        before = engine.statistics()
        completion = await engine.complete(tiny_model.prompts[2], tiny_model.params)
        after = engine.statistics()
        assert completion.token_ids == tiny_model.references[2]
        num_sweeps = after.sweeps - before.sweeps
        read = after.bytes_read_by_kind["streamed weights"] - before.bytes_read_by_kind["streamed weights"]
        assert read < num_sweeps * engine.plan.bytes_per_sweep / 2


async def test_a_fixed_budget_lends_nothing(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as automatic:
        budget = automatic.plan.memory_budget
    async with Engine(tiny_model.path, memory_budget=budget, config=CONFIG) as engine:
        await engine.complete(tokens(1, 1), greedy_params(3 * SWEEPS_BEFORE_LENDING))
        assert engine.plan.lendable_bytes == engine.statistics().bytes_lent == 0


async def test_a_request_of_an_idle_engine_gets_all_kv_memory(tiny_model: Any, machine: type[Machine]) -> None:
    """Nothing else would have woken the loop."""
    async with lender(tiny_model, machine) as engine:
        lent = engine.statistics().bytes_lent
        with anyio.fail_after(60):
            completion = await engine.complete(tiny_model.prompts[4], greedy_params(31))  # the whole context
        assert completion.token_ids[: tiny_model.num_tokens] == tiny_model.references[4]
        assert engine.statistics().bytes_lent < lent
        await lend(engine)


async def test_requests_at_once_are_as_alone(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as engine:
        for _ in range(3):
            answers: dict[int, list[int]] = {}

            async def ask(idx: int, answers: dict[int, list[int]]) -> None:
                completion = await engine.complete(tiny_model.prompts[idx], tiny_model.params)
                answers[idx] = list(completion.token_ids)

            async with anyio.create_task_group() as group:
                for idx in range(5):
                    group.start_soon(ask, idx, answers)
            assert answers == {idx: list(tiny_model.references[idx]) for idx in range(5)}
            check_leases(engine)
            await lend(engine)
        await engine.resize(engine.plan.memory_budget)
        await check_nothing_is_left(engine)


async def test_a_long_sweep_gets_its_workspace(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as engine:
        before = engine.statistics().holders["workspace"]
        assert before < engine.plan.workspace_bytes
        async for _ in engine.generate(tiny_model.prompts[4], greedy_params(1)):
            pass
        # A sweep of 32 tokens is the longest.
        assert engine.statistics().holders["workspace"] > before


async def test_what_is_lent_comes_back_before_prefixes_are_dropped(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as engine:
        prompt = tiny_model.prompts[4]
        for expected in (0, 32):
            completion = await engine.complete(prompt, greedy_params(1))
            assert completion.usage.cached_tokens == expected


async def test_another_budget_begins_without_loans(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as engine:
        first = engine.plan
        machine.total -= 30_000
        await until(lambda: engine.plan.memory_budget < first.memory_budget)
        assert engine.statistics().bytes_lent == 0
        check_leases(engine)
        completion = await engine.complete(tiny_model.prompts[3], tiny_model.params)
        assert completion.token_ids == tiny_model.references[3]


async def test_nothing_is_left_of_loans(tiny_model: Any, machine: type[Machine]) -> None:
    async with lender(tiny_model, machine) as engine:
        pass
    statistics = engine.statistics()
    assert statistics.bytes_lent == statistics.bytes_in_use == 0
    assert not statistics.holders
