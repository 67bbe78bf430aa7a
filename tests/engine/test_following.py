"""`memory_budget="auto"` follows the machine: at once downwards, and upwards only what lasts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineConfig
from hermes_async.engine import following
from hermes_async.engine.following import BudgetFollower, Look
from hermes_async.pipeload.memory import room_bytes, stalled_share
from tests.engines import check_nothing_is_left, one_loop, until

anyio_backend = one_loop(use_uvloop=True)

GIB = 1 << 30


def budgets(follower: BudgetFollower, looks: Iterator[Look] | list[Look]) -> list[int | None]:
    decided = []
    for look in looks:
        decided.append(follower.next_budget(look))
        if decided[-1] is not None:
            follower.changed(decided[-1])
    return decided


def test_nothing_changes_while_the_room_does_not() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Look(room=10 * GIB - held, held=held) for held in range(0, 9 * GIB, GIB // 4)]
    assert set(budgets(follower, looks)) == {None}


def test_less_room_is_answered_at_once_but_not_every_byte() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    assert budgets(follower, [Look(int(1.6 * GIB), 8 * GIB), Look(GIB, 8 * GIB)]) == [None, int(9 * GIB * 0.9)]


def test_more_room_is_taken_when_it_lasts() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    assert budgets(follower, [Look(10 * GIB, 9 * GIB)] * 10) == [None] * 9 + [int(19 * GIB * 0.9)]


def test_the_least_of_what_there_was_is_taken() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Look((7 + idx % 3) * GIB, 9 * GIB) for idx in range(10)]
    assert budgets(follower, looks)[-1] == int(16 * GIB * 0.9)


def test_room_that_comes_and_goes_is_left_alone() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Look((10 if idx % 5 else 1) * GIB, 9 * GIB) for idx in range(100)]
    assert set(budgets(follower, looks)) == {None}


def test_a_little_more_is_not_worth_it_unless_it_holds_everything() -> None:
    looks = [Look(int(2.5 * GIB), 9 * GIB)] * 20  # 10.35 GiB
    assert set(budgets(BudgetFollower(9 * GIB, 20 * GIB), looks)) == {None}
    assert budgets(BudgetFollower(9 * GIB, 10 * GIB), looks)[9:] == [10 * GIB] + [None] * 10


def test_pressure_takes_a_tenth_each_time() -> None:
    follower = BudgetFollower(10 * GIB, 20 * GIB)
    looks = [Look(20 * GIB, 10 * GIB, stalled=stalled) for stalled in (0.05, 0.2, 0.3, 0.0)]
    assert budgets(follower, looks) == [None, 9 * GIB, int(9 * GIB * 0.9), None]


# What the machine says


def test_pressure_as_the_kernel_tells_it(tmp_path: Path) -> None:
    assert stalled_share(tmp_path) == 0.0
    (tmp_path / "proc" / "pressure").mkdir(parents=True)
    file = tmp_path / "proc" / "pressure" / "memory"
    file.write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=123\nfull avg10=3.00 avg60=0 avg300=0 total=1\n")
    assert stalled_share(tmp_path) == 0.125
    file.write_text("nonsense")
    assert stalled_share(tmp_path) == 0.0


def test_the_room_of_this_machine() -> None:
    assert room_bytes() > 0


# In an engine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the engine is told when it looks."""

    class Machine:
        total = 8 << 20

    def look(baseline_bytes: int) -> Look:
        return Look(room=Machine.total, held=0)

    monkeypatch.setattr(following, "_look", look)
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr("hermes_async.engine.opening.automatic_budget", lambda: int(Machine.total * 0.9))
    return Machine


@pytest.mark.anyio
async def test_an_engine_gives_back_and_takes_again(tiny_model: Any, machine: Any) -> None:
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
            await until(lambda: engine.plan.memory_budget == 450_000)
            assert engine.plan.bytes_per_sweep == 0  # less KV will do
            machine.total = 100_000  # less than there can be: it gives what it has
            await until(lambda: not engine.plan.resident)
            machine.total = 8 << 20
            await until(lambda: engine.plan.bytes_per_sweep == 0)
        assert answers == [tiny_model.references[2]] * 10
        await check_nothing_is_left(engine)
