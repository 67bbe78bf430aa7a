"""`memory_budget="auto"` follows the machine: at once downwards, and upwards only what lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from hermes_async import Engine, EngineConfig
from hermes_async.errors import MemoryBudgetError
from hermes_async.memory import automatic_budget, available, claims
from hermes_async.memory.automatic_budget import BudgetFollower, Look
from hermes_async.memory.available import Room, headroom, room_bytes, stalled_share
from hermes_async.memory.claims import Claim
from hermes_async.memory.other_processes import Claimed, Neighbour
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
    look = Look(total - budget - beside, budget, headroom=headroom(total - beside, beside))
    assert budgets(BudgetFollower(budget, 1 << 40), [look] * 20) == [None] * 20


@pytest.mark.parametrize("beside", range(0, 60, 4))
@pytest.mark.parametrize("total", [80, 250, 2000])
def test_more_beside_budgets_always_leaves_room(total: int, beside: int) -> None:
    total, beside = total << 20, beside << 20
    follower = BudgetFollower(after_headroom(total), 1 << 40)
    left = headroom(total - beside, beside)
    budgets(follower, [Look(total - follower.budget - beside, follower.budget, headroom=left)])
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
    assert await automatic_budget._resize(50, 100, requests.resize) == budget
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
    monkeypatch.setattr(claims, "rooms", lambda: [Room(Process.total - Process.rss)])
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
            budget = follower.next_budget(automatic_budget._look(claim))
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


# Engines of other processes


class Neighbours:
    """Other processes, as they would be seen."""

    def __init__(self) -> None:
        self.seen: list[Neighbour] = []
        self.published: list[Claimed | None] = []
        self.on_publish: Callable[[], None] = lambda: None

    def look(self) -> list[Neighbour]:
        return self.seen

    def publish(self, claimed: Claimed | None) -> None:
        self.published.append(claimed)
        self.on_publish()


@pytest.fixture
def neighbours(process: Any, monkeypatch: pytest.MonkeyPatch) -> Neighbours:
    found = Neighbours()
    monkeypatch.setattr(claims, "NEIGHBOURHOOD", found)
    return found


def neighbour(budget: int = 0, held: int = 0, fixed: int = 0, group: str = "/ours") -> Neighbour:
    """One engine in a process; without a budget it is about to take one. In MiB."""
    claimed = Claimed(budget << 20, fixed << 20, int(not fixed), int(not budget), 300 << 20)
    return Neighbour(claimed, held << 20, {"memory": group})


def two_heads(room: int) -> int:
    """In MiB, less headroom for two processes."""
    return (room << 20) - headroom(room << 20, num_processes=2)


def test_headroom_is_for_each_process() -> None:
    assert headroom(100 << 20, num_processes=2) == 64 << 20
    assert headroom(100 << 30, num_processes=2) == headroom(100 << 30)


def test_processes_that_start_together_share(neighbours: Neighbours) -> None:
    neighbours.seen = [neighbour()]
    assert Claim(None).take() == two_heads(1200) // 2


def test_a_process_that_comes_between_is_seen(neighbours: Neighbours) -> None:
    """It published its wish after this one had looked, and before this one had said what it takes."""
    claim = Claim(None)
    neighbours.on_publish = lambda: neighbours.seen.append(neighbour()) if not neighbours.seen else None
    assert claim.take() == two_heads(1200) // 2
    last = neighbours.published[-1]
    assert last is not None
    assert (last.budget, last.num_automatic, last.num_undecided) == (two_heads(1200) // 2, 1, 0)


def test_what_a_neighbour_may_still_come_to_hold_is_not_taken(neighbours: Neighbours) -> None:
    neighbours.seen = [neighbour(fixed=500, budget=500, held=100)]
    assert Claim(None).take() == two_heads(1200 + 100) - (500 << 20)


def test_a_neighbour_that_has_all_gives_half_of_it_back(process: Any, neighbours: Neighbours) -> None:
    """As seen by itself, when another comes."""
    claim = Claim(None)
    budget = claim.take()
    follower = BudgetFollower(budget, 1 << 40)
    process.rss += budget
    claim.leased = lambda: budget
    assert follower.next_budget(automatic_budget._look(claim)) is None
    process.total -= 300 << 20  # what the other process takes for itself
    neighbours.seen = [neighbour()]
    neighbours.seen = [neighbour(budget=claim.look().share >> 20)]
    less = follower.next_budget(automatic_budget._look(claim))
    assert less is not None
    assert less == pytest.approx(two_heads(900) // 2, abs=2 << 20)


def test_a_neighbour_that_does_not_answer_keeps_what_it_holds(neighbours: Neighbours) -> None:
    neighbours.seen = [neighbour(budget=1100, held=200)]
    claim = Claim(None)
    assert claim.take() == two_heads(1400) // 2
    half = headroom(1400 << 20, num_processes=2) // 2
    assert claim.left_over() == (1400 - 1100 << 20) - half
    assert claim.left_over(whatever_is_claimed=True) == (1400 - 200 << 20) - half


@pytest.mark.parametrize(
    ("above", "near", "expected"),
    [
        (5000, [], "/ours"),
        (5000, [neighbour(budget=3000, group="/theirs"), neighbour(budget=3000, group="/ours2")], "/ours"),
        (2000, [neighbour(budget=3000, group="/theirs")], ""),
        (2000, [neighbour(budget=3000, group="/ours/below")], "/ours"),
    ],
)
def test_of_several_limits_the_one_that_leaves_the_least_counts(
    neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch, above: int, near: list[Neighbour], expected: str
) -> None:
    """With the neighbours that share it."""
    limits = [Room(9000 << 20), Room(1200 << 20, "memory", "/ours"), Room(above << 20, "memory", "")]
    monkeypatch.setattr(claims, "rooms", lambda: limits)
    neighbours.seen = near
    seen = Claim(None).look()
    assert seen.room == next(room.free for room in limits if (room.hierarchy, room.group) == ("memory", expected))
    assert seen.num_processes == 1 + sum(other.is_in("memory", expected) for other in near)


def test_what_is_claimed_is_published(neighbours: Neighbours) -> None:
    claim, fixed = Claim(None), Claim(7 << 20)
    assert neighbours.published[-1] == Claimed(7 << 20, 7 << 20, 1, 1, 300 << 20)
    claim.take()
    claim.change(50 << 20)
    assert neighbours.published[-1] == Claimed(57 << 20, 7 << 20, 1, 0, 300 << 20)
    fixed.release()
    claim.release()
    assert neighbours.published[-1] is None


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

    monkeypatch.setattr(automatic_budget, "_look", look)
    monkeypatch.setattr(automatic_budget, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(available, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(claims, "rooms", lambda: [Room(Machine.total)])
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
