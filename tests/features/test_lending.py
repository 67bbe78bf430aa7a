"""Memory that sequences do not need is lent to weights, and comes back before a request or a sweep needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from hermes_async import Engine, MemoryBudgetError
from hermes_async.serving.lending import SWEEPS_BEFORE_LENDING
from hermes_async.storage.buffers import Buffer
from tests.engines import check_nothing_is_left, greedy_params, tokens, until
from tests.features.machines import CONFIG, Machine, check_leases, lend, lender, told

pytestmark = pytest.mark.anyio


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    return told(monkeypatch)


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
        engine.drop_prefixes()
        most, token_ids = 0, []
        with anyio.fail_after(60):
            async for chunk in engine.generate(tiny_model.prompts[4], greedy_params(31)):  # the whole context
                most = max(most, engine.statistics().kv_bytes)
                token_ids += chunk.token_ids
        assert tuple(token_ids[: tiny_model.num_tokens]) == tuple(tiny_model.references[4])
        assert most == engine.plan.kv_bytes
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


async def test_if_the_system_gives_no_memory_nothing_is_lent(
    tiny_model: Any, machine: type[Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with lender(tiny_model, machine) as engine:
        await engine.resize(engine.plan.memory_budget)
        assert engine.statistics().bytes_lent == 0

        def refused(sizes: Sequence[int]) -> list[Buffer]:
            if sizes:
                raise MemoryBudgetError("no memory", requested_bytes=sum(sizes), budget_bytes=0)
            return []

        with monkeypatch.context() as patch:
            patch.setattr(Buffer, "side_by_side", refused)
            completion = await engine.complete(tiny_model.prompts[2], tiny_model.params)
        assert completion.token_ids == tiny_model.references[2]
        assert "not lent to weights: no memory" in caplog.text
        assert engine.statistics().bytes_lent == 0
        check_leases(engine)
        await lend(engine)
