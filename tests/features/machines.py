"""A machine with as much memory as a test says, for engines with automatic budgets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from hermes_async import Engine, EngineConfig
from hermes_async.memory import automatic_budget, available, claims
from hermes_async.memory.automatic_budget import Observation
from hermes_async.memory.available import MemoryLimit
from hermes_async.memory.claims import Claim
from hermes_async.serving.lending import HOLDER, SWEEPS_BEFORE_LENDING
from tests.engines import greedy_params, settle, tokens
from tests.inside import inside

CONFIG = EngineConfig(num_loading_agents=1, max_tokens_per_sweep=32, max_sequences=4)


class Machine:
    """Bytes that it would give."""

    total = 8 << 20


def told(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    """What engines are told when they look, which is always."""

    class Told(Machine):
        pass

    def look(claim: Claim) -> Observation:
        seen = claim.look()
        return Observation(Told.total, 0, others=min(seen.claimed_by_others, seen.for_budgets - seen.fair_share))

    monkeypatch.setattr(automatic_budget, "_observe", look)
    monkeypatch.setattr(automatic_budget, "SECONDS_BETWEEN_OBSERVATIONS", 0.0)
    monkeypatch.setattr(available, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(available, "NEIGHBOUR_BYTES", 0)
    monkeypatch.setattr(claims, "memory_limits", lambda: [MemoryLimit(Told.total)])
    monkeypatch.setattr(claims, "process_rss_bytes", lambda: 0)
    return Told


# Loans


@asynccontextmanager
async def lender(model: Any, machine: type[Machine], more: int = 40_000, **config: Any) -> AsyncIterator[Engine]:
    """An engine with an automatic budget in which some stages are streamed. It has lent what it can.

    Args:
        more: Bytes of the budget above the smallest.
        config: Changes `CONFIG`.
    """
    async with Engine(model.path, memory_budget="8MiB", config=CONFIG) as engine:
        least = engine.plan.minimum_budget
    machine.total = round((least + more) / 0.95)
    async with Engine(model.path, config=replace(CONFIG, **config)) as engine:
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
