"""What tests of a running engine share: how one is opened, waited for, and found to hold nothing at the end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from hermes_async import Engine, RequestEvent, SamplingParams
from tests.inside import inside

BLOCK_BYTES = 8192
"""Of the small models here: 3 layers, 2 heads of keys and values, 8 numbers of 4 bytes, 16 tokens; in whole pages."""

RESIDENT_LEASES = 4
"""What an engine holds that does nothing: weights, ring, workspace, shared prefixes."""


def both_loops() -> Any:
    """The fixture `anyio_backend` for a module of tests that run on asyncio's own loop, and once more on uvloop."""

    @pytest.fixture(name="anyio_backend", params=[False, True], ids=["asyncio", "uvloop"])
    def fixture(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
        return "asyncio", {"use_uvloop": request.param}

    return fixture


def open_engine(model: Any, on_event: Callable[[RequestEvent], None] | None = None, **config: Any) -> Engine:
    """An engine for a small model; `config` changes the model's own."""
    return Engine(
        model.path, memory_budget="8MiB", config=dataclasses.replace(model.config, **config), on_event=on_event
    )


async def until(condition: Callable[[], bool]) -> None:
    """Polls. It sleeps in between, as a loop that never rests leaves the compute thread no time."""
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.002)


async def settle(engine: Engine) -> None:
    """Returns when the ring is full and nobody waits for anything but the next request."""
    while True:
        await anyio.wait_all_tasks_blocked()
        statistics = engine.statistics()
        if not (statistics.num_running or statistics.num_waiting or inside(engine).is_loading):
            return
        await anyio.lowlevel.checkpoint()


async def check_nothing_is_left(engine: Engine) -> None:
    """No request, session, KV, lease or slot of the parking file, once what was left has ended."""
    await until(lambda: not engine.statistics().num_running)
    engine.drop_prefixes()
    statistics = engine.statistics()
    assert (statistics.num_paused, statistics.num_waiting) == (0, 0)
    assert (statistics.num_sessions, statistics.num_parked) == (0, 0)
    num_leases = RESIDENT_LEASES + ("experts" in statistics.holders)
    assert (statistics.kv_bytes, statistics.num_leases) == (0, num_leases)
    assert inside(engine).request_ids == set()
    assert inside(engine).num_parking_slots == 0


def drafts_cost_nothing(engine: Engine) -> None:
    """From now on sweeps count as limited by the disk, however fast it is."""
    times = inside(engine).sweep_times
    times.record_read(1.0)
    times.record(1, 1e-6)
    inside(engine).freeze_sweep_times()


def tokens(seed: int, length: int) -> list[int]:
    """Random ones, of the small models' vocabulary."""
    chosen = random.Random(seed)
    return [chosen.randrange(2, 96) for _ in range(length)]


def greedy_params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
