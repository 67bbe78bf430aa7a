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
from hermes_async.errors import MemoryBudgetError
from hermes_async.pipeload import claims, memory
from hermes_async.pipeload.claims import Claim
from hermes_async.pipeload.memory import headroom, room_bytes, stalled_share
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


def after_headroom(room: int) -> int:
    return room - headroom(room)


def test_less_room_is_answered_at_once_but_not_every_byte() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    assert budgets(follower, [Look(int(1.4 * GIB), 8 * GIB), Look(GIB, 8 * GIB)]) == [None, after_headroom(9 * GIB)]


def test_more_room_is_taken_when_it_lasts() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    assert budgets(follower, [Look(10 * GIB, 9 * GIB)] * 10) == [None] * 9 + [after_headroom(19 * GIB)]


def test_the_least_of_what_there_was_is_taken() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Look((7 + idx % 3) * GIB, 9 * GIB) for idx in range(10)]
    assert budgets(follower, looks)[-1] == after_headroom(16 * GIB)


def test_room_that_comes_and_goes_is_left_alone() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Look((10 if idx % 5 else 1) * GIB, 9 * GIB) for idx in range(100)]
    assert set(budgets(follower, looks)) == {None}


def test_a_little_more_is_not_worth_it_unless_it_holds_everything() -> None:
    looks = [Look(int(1.9 * GIB), 9 * GIB)] * 20  # 10.355 GiB
    assert set(budgets(BudgetFollower(9 * GIB, 20 * GIB), looks)) == {None}
    assert budgets(BudgetFollower(9 * GIB, 10 * GIB), looks)[9:] == [10 * GIB] + [None] * 10


def test_pressure_takes_a_tenth_each_time() -> None:
    follower = BudgetFollower(10 * GIB, 20 * GIB)
    looks = [Look(20 * GIB, 10 * GIB, stalled=stalled) for stalled in (0.05, 0.2, 0.3, 0.0)]
    assert budgets(follower, looks) == [None, 9 * GIB, int(9 * GIB * 0.9), None]


def test_what_other_engines_may_hold_is_not_taken() -> None:
    looks = [Look(10 * GIB, 10 * GIB, others=8 * GIB)]
    assert budgets(BudgetFollower(10 * GIB, 20 * GIB), looks) == [None]
    assert budgets(BudgetFollower(12 * GIB, 20 * GIB), looks) == [after_headroom(20 * GIB) - 8 * GIB]


def test_what_engines_take_beside_their_budgets_is_what_was_set_aside_for_it() -> None:
    """It was set aside for once more, and a tenth of a small budget given back, as soon as it came."""
    total, beside = 120 << 20, 20 << 20
    budget = after_headroom(total)
    look = Look(total - budget - beside, budget, beside=beside)
    assert budgets(BudgetFollower(budget, 1 << 40), [look] * 20) == [None] * 20


@pytest.mark.parametrize("beside", range(0, 60, 4))
@pytest.mark.parametrize("total", [80, 250, 2000])
def test_more_beside_budgets_always_leaves_room(total: int, beside: int) -> None:
    total, beside = total << 20, beside << 20
    follower = BudgetFollower(after_headroom(total), 1 << 40)
    budgets(follower, [Look(total - follower.budget - beside, follower.budget, beside=beside)])
    assert follower.budget + beside + headroom(total) // 4 <= total


class Requests:
    """Resizes to what requests leave, which hold more each time that somebody asks."""

    def __init__(self, *least: int) -> None:
        self._least = list(least)
        self.budget = 100

    async def resize(self, budget: int) -> None:
        least = self._least.pop(0)
        if budget < least:
            raise MemoryBudgetError("", requested_bytes=least, budget_bytes=budget, minimum_bytes=least)
        self.budget = budget


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("least", "budget"), [((40,), 50), ((60, 60), 60), ((60, 70, 90, 90), 90), ((60, 100), 100), ((60, 110), 100)]
)
async def test_what_requests_have_taken_since_the_last_try_is_left_to_them(least: tuple[int, ...], budget: int) -> None:
    """The second try ended the engine."""
    requests = Requests(*least)
    assert await following._resize(50, 100, requests.resize) == budget
    assert requests.budget == budget


# Several engines of one process


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What claims see: what the machine has for the process, and what the process holds beside its engines."""

    class Process:
        total = 1500 << 20
        rss = 300 << 20

    monkeypatch.setattr(claims, "_CLAIMS", set())
    monkeypatch.setattr(claims, "process_rss_bytes", lambda: Process.rss)
    monkeypatch.setattr(claims, "room_bytes", lambda: Process.total - Process.rss)
    return Process


def test_growth_that_nobody_leased_is_not_an_engine_s_own(process: Any) -> None:
    claim = Claim(None)
    assert claim.take() == after_headroom(1200 << 20)
    claim.leased = lambda: 500 << 20
    process.rss += 800 << 20
    seen = claim.look()
    assert (seen.room, seen.held, seen.beside) == (400 << 20, 500 << 20, 300 << 20)


def test_what_opening_takes_is_not_beside_the_budget(process: Any) -> None:
    claim = Claim(None)
    process.rss += 20 << 20
    assert claim.take() == after_headroom(1180 << 20)
    claim.leased = lambda: 500 << 20
    process.rss += 510 << 20
    assert claim.look().beside == 10 << 20


def test_what_is_leased_and_not_yet_touched_is_not_held(process: Any) -> None:
    claim = Claim(None)
    claim.leased = lambda: 500 << 20
    process.rss += 100 << 20
    assert claim.look().held == 100 << 20


def test_engines_that_open_together_share(process: Any) -> None:
    several = [Claim(None) for _ in range(3)]
    taken = [claim.take() for claim in several]
    assert sum(taken) <= after_headroom(1200 << 20)
    assert min(taken) >= after_headroom(1200 << 20) // 3 - 1


def test_fixed_budgets_are_taken_off_and_released(process: Any) -> None:
    fixed, automatic = Claim(400 << 20), Claim(None)
    assert automatic.take() == after_headroom(1200 << 20) - (400 << 20)
    fixed.release()
    assert automatic.take() == after_headroom(1200 << 20)


@pytest.mark.parametrize("num_engines", [2, 3, 5])
def test_engines_that_come_later_get_their_share(process: Any, num_engines: int) -> None:
    held: dict[Claim, int] = {}
    followers: dict[Claim, BudgetFollower] = {}
    for _ in range(num_engines):
        new = Claim(None)
        wanted = new.take()
        for claim, follower in followers.items():
            budget = follower.next_budget(following._look(claim))
            if budget is not None:
                process.rss += budget - held[claim]
                held[claim] = budget
                claim.change(budget)
                follower.changed(budget)
        assert new.left_over() >= wanted
        held[new] = wanted
        process.rss += wanted
        new.leased = lambda new=new: held[new]
        followers[new] = BudgetFollower(wanted, 1 << 40)
    assert process.rss <= process.total - headroom(1200 << 20) // 2
    assert min(held.values()) >= after_headroom(1200 << 20) // num_engines - num_engines


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

    def look(claim: Claim) -> Look:
        seen = claim.look()
        return Look(Machine.total, 0, others=min(seen.others, seen.for_budgets - seen.share))

    monkeypatch.setattr(following, "_look", look)
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(memory, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(claims, "room_bytes", lambda: Machine.total)
    monkeypatch.setattr(claims, "process_rss_bytes", lambda: 0)
    return Machine


@pytest.mark.anyio
async def test_a_second_engine_waits_for_its_share(tiny_model: Any, machine: Any) -> None:
    machine.total = 1_000_000
    config = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4)
    async with Engine(tiny_model.path, config=config) as first:
        assert first.plan.memory_budget == 950_000
        async with Engine(tiny_model.path, config=config) as second:
            assert first.plan.memory_budget + second.plan.memory_budget <= 975_000
            assert second.plan.memory_budget >= 0.45 * 950_000
            completions = [
                await engine.complete(tiny_model.prompts[2], tiny_model.params) for engine in (first, second)
            ]
            assert [completion.token_ids for completion in completions] == [tiny_model.references[2]] * 2


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
            await until(lambda: engine.plan.memory_budget == 475_000)
            assert engine.plan.bytes_per_sweep == 0  # less KV will do
            machine.total = 100_000  # less than there can be: it gives what it has
            await until(lambda: not engine.plan.resident)
            machine.total = 8 << 20
            await until(lambda: engine.plan.bytes_per_sweep == 0)
        assert answers == [tiny_model.references[2]] * 10
        await check_nothing_is_left(engine)
