"""When `memory_budget="auto"` changes the budget: at once downwards, and upwards only what lasts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hermes_async.errors import MemoryBudgetError
from hermes_async.memory import automatic_budget
from hermes_async.memory.automatic_budget import BudgetFollower, Observation
from hermes_async.memory.available import headroom

GIB = 1 << 30


def budgets(follower: BudgetFollower, looks: Iterator[Observation] | list[Observation]) -> list[int | None]:
    decided = []
    for look in looks:
        decided.append(follower.next_budget(look))
        if decided[-1] is not None:
            follower.changed(decided[-1])
    return decided


def test_nothing_changes_while_the_room_does_not() -> None:
    follower = BudgetFollower(after_headroom(10 * GIB), 20 * GIB)
    looks = [Observation(free=10 * GIB - held, held=held) for held in range(0, 9 * GIB, GIB // 4)]
    assert set(budgets(follower, looks)) == {None}


def after_headroom(room: int) -> int:
    return room - headroom(room)


def test_less_room_is_answered_at_once_but_not_every_byte() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    assert budgets(follower, [Observation(int(1.4 * GIB), 8 * GIB), Observation(GIB, 8 * GIB)]) == [
        None,
        after_headroom(9 * GIB),
    ]


def test_more_room_is_taken_when_it_lasts() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    assert budgets(follower, [Observation(10 * GIB, 9 * GIB)] * 10) == [None] * 9 + [after_headroom(19 * GIB)]


def test_the_least_of_what_there_was_is_taken() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Observation((7 + idx % 3) * GIB, 9 * GIB) for idx in range(10)]
    assert budgets(follower, looks)[-1] == after_headroom(16 * GIB)


def test_room_that_comes_and_goes_is_left_alone() -> None:
    follower = BudgetFollower(9 * GIB, 20 * GIB)
    looks = [Observation(10 * GIB if idx % 5 else GIB // 2, 9 * GIB) for idx in range(100)]
    assert set(budgets(follower, looks)) == {None}


def test_a_little_more_is_not_worth_it_unless_it_holds_everything() -> None:
    looks = [Observation(int(0.6 * GIB), 9 * GIB)] * 20  # 9.12 GiB
    assert set(budgets(BudgetFollower(9 * GIB, 20 * GIB), looks)) == {None}
    assert budgets(BudgetFollower(9 * GIB, int(9.1 * GIB)), looks)[9:] == [int(9.1 * GIB)] + [None] * 10


def test_pressure_takes_a_tenth_each_time() -> None:
    follower = BudgetFollower(10 * GIB, 20 * GIB)
    looks = [Observation(20 * GIB, 10 * GIB, stalled=stalled) for stalled in (0.05, 0.2, 0.3, 0.0)]
    assert budgets(follower, looks) == [None, 9 * GIB, int(9 * GIB * 0.9), None]


def test_what_other_engines_may_hold_is_not_taken() -> None:
    looks = [Observation(10 * GIB, 10 * GIB, others=8 * GIB)]
    assert budgets(BudgetFollower(10 * GIB, 20 * GIB), looks) == [None]
    assert budgets(BudgetFollower(12 * GIB, 20 * GIB), looks) == [after_headroom(20 * GIB) - 8 * GIB]


def test_what_engines_take_beside_their_budgets_is_what_was_set_aside_for_it() -> None:
    """It was set aside for once more, and a tenth of a small budget given back, as soon as it came."""
    total, beside = 120 << 20, 20 << 20
    budget = after_headroom(total)
    look = Observation(total - budget - beside, budget, headroom=headroom(total - beside, beside))
    assert budgets(BudgetFollower(budget, 1 << 40), [look] * 20) == [None] * 20


@pytest.mark.parametrize("beside", range(0, 60, 4))
@pytest.mark.parametrize("total", [80, 250, 2000])
def test_more_beside_budgets_always_leaves_room(total: int, beside: int) -> None:
    total, beside = total << 20, beside << 20
    follower = BudgetFollower(after_headroom(total), 1 << 40)
    left = headroom(total - beside, beside)
    budgets(follower, [Observation(total - follower.budget - beside, follower.budget, headroom=left)])
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
