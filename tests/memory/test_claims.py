"""How engines share the machine's memory, in one process and in several."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError
from hermes_async.memory import automatic_budget, claims
from hermes_async.memory.automatic_budget import BudgetFollower
from hermes_async.memory.available import MemoryLimit, headroom
from hermes_async.memory.claims import Claim, refusal
from hermes_async.memory.other_processes import OtherProcess, ProcessClaims


def after_headroom(room: int) -> int:
    return room - headroom(room)


# Several engines of one process


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What claims see: what the machine has for the process, and what the process holds beside its engines."""

    class Process:
        total = 1500 << 20
        rss = 300 << 20

    monkeypatch.setattr(claims, "_CLAIMS", set())
    monkeypatch.setattr(claims, "process_rss_bytes", lambda: Process.rss)
    monkeypatch.setattr(claims, "memory_limits", lambda: [MemoryLimit(Process.total - Process.rss)])
    return Process


def test_growth_that_nobody_leased_is_not_an_engine_s_own(process: Any) -> None:
    claim = Claim(automatic=True)
    assert claim.take() == after_headroom(1200 << 20)
    claim.leased = lambda: 500 << 20
    process.rss += 800 << 20
    seen = claim.look()
    assert (seen.free, seen.held, seen.unleased) == (400 << 20, 500 << 20, 300 << 20)


def test_what_opening_takes_is_not_beside_the_budget(process: Any) -> None:
    claim = Claim(automatic=True)
    process.rss += 20 << 20
    assert claim.take() == after_headroom(1180 << 20)
    claim.leased = lambda: 500 << 20
    process.rss += 510 << 20
    assert claim.look().unleased == 10 << 20


def test_what_is_leased_and_not_yet_touched_is_not_held(process: Any) -> None:
    claim = Claim(automatic=True)
    claim.leased = lambda: 500 << 20
    process.rss += 100 << 20
    assert claim.look().held == 100 << 20


def test_engines_that_open_together_share(process: Any) -> None:
    several = [Claim(automatic=True) for _ in range(3)]
    taken = [claim.take() for claim in several]
    assert sum(taken) <= after_headroom(1200 << 20)
    assert min(taken) >= after_headroom(1200 << 20) // 3 - 1


def test_fixed_budgets_are_taken_off_and_released(process: Any) -> None:
    fixed, automatic = Claim(automatic=False), Claim(automatic=True)
    fixed.change(400 << 20)
    assert automatic.take() == after_headroom(1200 << 20) - (400 << 20)
    fixed.release()
    assert automatic.take() == after_headroom(1200 << 20)


@pytest.mark.parametrize("num_engines", [2, 3, 5])
def test_engines_that_come_later_get_their_share(process: Any, num_engines: int) -> None:
    held: dict[Claim, int] = {}
    followers: dict[Claim, BudgetFollower] = {}
    for _ in range(num_engines):
        new = Claim(automatic=True)
        wanted = new.take()
        for claim, follower in followers.items():
            budget = follower.next_budget(automatic_budget._observe(claim))
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


def test_an_engine_without_a_plan_claims_nothing_yet(process: Any) -> None:
    Claim(automatic=False)
    assert Claim(automatic=True).take() == after_headroom(1200 << 20)


def test_idle_sessions_that_take_more_than_was_claimed_count(process: Any) -> None:
    fixed, automatic = Claim(automatic=False), Claim(automatic=True)
    fixed.change(400 << 20)
    fixed.leased = lambda: 700 << 20
    process.rss += 700 << 20
    assert automatic.look().claimed_by_others == 700 << 20
    assert automatic.take() == after_headroom(1200 << 20) - (700 << 20)


@pytest.mark.parametrize(("claimed", "missing"), [(0, 64), (1100, 1222)])
def test_who_is_refused_is_told_who_has_the_memory_and_how_much_more_works(
    process: Any, claimed: int, missing: int
) -> None:
    fixed, automatic = Claim(automatic=False), Claim(automatic=True)
    fixed.change(claimed << 20)
    budget = automatic.take()
    assert budget == max(0, after_headroom(1200 << 20) - (claimed << 20))
    too_little = MemoryBudgetError(
        "too small", requested_bytes=1200 << 20, budget_bytes=budget, minimum_bytes=1200 << 20
    )
    error = refusal(automatic.look(), budget, too_little)
    assert f"{format_bytes(headroom(1200 << 20))} are kept free" in str(error)
    assert ("other engines may hold 1.07 GiB" in str(error)) == bool(claimed)
    assert f"With {format_bytes(missing << 20)} more" in str(error)
    process.total += missing << 20
    assert automatic.take() >= error.minimum_bytes


# Engines of other processes


class Neighbours:
    """Other processes, as they would be seen."""

    def __init__(self) -> None:
        self.seen: list[OtherProcess] = []
        self.published: list[ProcessClaims | None] = []
        self.on_publish: Callable[[], None] = lambda: None

    def others(self) -> list[OtherProcess]:
        return self.seen

    def publish(self, claimed: ProcessClaims | None) -> None:
        self.published.append(claimed)
        self.on_publish()


@pytest.fixture
def neighbours(process: Any, monkeypatch: pytest.MonkeyPatch) -> Neighbours:
    found = Neighbours()
    monkeypatch.setattr(claims, "PROCESSES", found)
    return found


def neighbour(budget: int = 0, held: int = 0, fixed: int = 0, group: str = "/ours") -> OtherProcess:
    """One engine in a process; without a budget it is about to take one. In MiB."""
    claimed = ProcessClaims(budget << 20, fixed << 20, int(not fixed), int(not budget), 300 << 20)
    return OtherProcess(10, claimed, held << 20, {"memory": group})


def two_heads(room: int) -> int:
    """In MiB, less headroom for two processes."""
    return (room << 20) - headroom(room << 20, num_processes=2)


def test_headroom_is_for_each_process() -> None:
    assert headroom(100 << 20, num_processes=2) == 96 << 20
    assert headroom(100 << 20, num_processes=2, neighbours=False) == 64 << 20
    assert headroom(100 << 30, num_processes=2) == headroom(100 << 30)


def test_processes_that_start_together_share(neighbours: Neighbours) -> None:
    neighbours.seen = [neighbour()]
    assert Claim(automatic=True).take() == two_heads(1200) // 2


def test_a_process_that_comes_between_is_seen(neighbours: Neighbours) -> None:
    """It published its wish after this one had looked, and before this one had said what it takes."""
    claim = Claim(automatic=True)
    neighbours.on_publish = lambda: neighbours.seen.append(neighbour()) if not neighbours.seen else None
    assert claim.take() == two_heads(1200) // 2
    last = neighbours.published[-1]
    assert last is not None
    assert (last.budget, last.num_automatic, last.num_undecided) == (two_heads(1200) // 2, 1, 0)


def test_what_a_neighbour_may_still_come_to_hold_is_not_taken(neighbours: Neighbours) -> None:
    neighbours.seen = [neighbour(fixed=500, budget=500, held=100)]
    assert Claim(automatic=True).take() == two_heads(1200 + 100) - (500 << 20)


def test_a_neighbour_that_has_all_gives_half_of_it_back(
    process: Any, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen by itself, when another comes."""
    monkeypatch.setattr(automatic_budget, "stalled_share", lambda: 0.0)  # whatever else this machine does
    claim = Claim(automatic=True)
    budget = claim.take()
    follower = BudgetFollower(budget, 1 << 40)
    process.rss += budget
    claim.leased = lambda: budget
    assert follower.next_budget(automatic_budget._observe(claim)) is None
    process.total -= 300 << 20  # what the other process takes for itself
    neighbours.seen = [neighbour()]
    neighbours.seen = [neighbour(budget=claim.look().fair_share >> 20)]
    less = follower.next_budget(automatic_budget._observe(claim))
    assert less is not None
    assert less == pytest.approx(two_heads(900) // 2, abs=2 << 20)


def test_a_neighbour_that_does_not_answer_keeps_what_it_holds(neighbours: Neighbours) -> None:
    neighbours.seen = [neighbour(budget=1100, held=200)]
    claim = Claim(automatic=True)
    assert claim.take() == two_heads(1400) // 2
    half = headroom(1400 << 20, num_processes=2) // 2
    assert claim.left_over() == (1400 - 1100 << 20) - half
    assert claim.left_over(ignore_claims=True) == (1400 - 200 << 20) - half


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
    neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch, above: int, near: list[OtherProcess], expected: str
) -> None:
    """With the neighbours that share it."""
    limits = [
        MemoryLimit(9000 << 20),
        MemoryLimit(1200 << 20, "memory", "/ours"),
        MemoryLimit(above << 20, "memory", ""),
    ]
    monkeypatch.setattr(claims, "memory_limits", lambda: limits)
    neighbours.seen = near
    seen = Claim(automatic=True).look()
    assert seen.free == next(room.free for room in limits if (room.hierarchy, room.group) == ("memory", expected))
    assert seen.num_processes == 1 + sum(other.is_in("memory", expected) for other in near)


def test_processes_with_engines_are_no_neighbours(neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they take is known."""
    processes = {os.getpid(), 10}
    monkeypatch.setattr(
        claims, "memory_limits", lambda: [MemoryLimit(1200 << 20, "memory", "/ours", processes=frozenset(processes))]
    )
    claim = Claim(automatic=True)
    assert claim.look().neighbours
    neighbours.seen = [neighbour(budget=100)]
    assert not claim.look().neighbours
    processes.add(11)
    assert claim.look().neighbours


def test_the_most_that_nobody_leased_is_kept(process: Any) -> None:
    claim = Claim(automatic=True)
    claim.leased = lambda: 500 << 20
    for grown, most in ((400, 0), (520, 20), (510, 20)):
        process.rss = (300 + grown) << 20
        claim.look()
        assert claim.most_unleased == most << 20


def test_what_is_claimed_is_published(neighbours: Neighbours) -> None:
    claim, fixed = Claim(automatic=True), Claim(automatic=False)
    assert neighbours.published[-1] == ProcessClaims(0, 0, 1, 1, 300 << 20)
    fixed.change(7 << 20)
    assert neighbours.published[-1] == ProcessClaims(7 << 20, 7 << 20, 1, 1, 300 << 20)
    claim.take()
    claim.change(50 << 20)
    assert neighbours.published[-1] == ProcessClaims(57 << 20, 7 << 20, 1, 0, 300 << 20)
    fixed.release()
    claim.release()
    assert neighbours.published[-1] is None
