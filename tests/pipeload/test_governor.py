"""The governor: first come, first served, and never more than the budget."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from hermes_async.errors import MemoryBudgetError
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from tests.engines import both_loops

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


async def test_acquire_takes_and_release_gives_back() -> None:
    governor = MemoryGovernor(100)
    with await governor.acquire("a", 60) as lease:
        assert governor.free_bytes == 40
        assert (lease.holder, lease.nbytes, lease.released) == ("a", 60, False)
        assert "a" in repr(lease)
    assert lease.released
    assert "released" in repr(lease)
    assert governor.free_bytes == 100


async def test_a_second_release_does_nothing() -> None:
    governor = MemoryGovernor(100)
    lease = governor.acquire_nowait("a", 60)
    lease.release()
    lease.release()
    assert governor.free_bytes == 100


async def test_statistics() -> None:
    governor = MemoryGovernor(100)
    first = governor.acquire_nowait("a", 10)
    governor.acquire_nowait("b", 50)
    governor.acquire_nowait("a", 30)
    statistics = governor.statistics()
    assert statistics.holders == {"a": 40, "b": 50}
    assert (statistics.budget_bytes, statistics.bytes_in_use, statistics.num_leases) == (100, 90, 3)
    first.release()
    statistics = governor.statistics()
    assert (statistics.bytes_in_use, statistics.peak_bytes_in_use, statistics.num_leases) == (80, 90, 2)
    assert statistics.num_waiting == 0


async def test_more_than_the_budget_is_refused_at_once_with_the_holders() -> None:
    governor = MemoryGovernor(100)
    governor.acquire_nowait("weights", 70)
    for refused in (governor.acquire_nowait, governor.acquire):
        with pytest.raises(MemoryBudgetError, match="KV") as caught:
            lease = refused("KV", 101)
            if not isinstance(lease, Lease):
                await lease
        assert (caught.value.requested_bytes, caught.value.budget_bytes) == (101, 100)
        assert caught.value.holders == {"weights": 70}
    assert governor.statistics().num_waiting == 0


async def test_the_whole_budget_can_be_leased() -> None:
    governor = MemoryGovernor(100)
    governor.acquire_nowait("a", 100)
    assert governor.acquire_nowait("nothing", 0).nbytes == 0
    with pytest.raises(anyio.WouldBlock):
        governor.acquire_nowait("b", 1)


async def test_a_lease_grows_and_shrinks() -> None:
    governor = MemoryGovernor(100)
    lease = governor.acquire_nowait("a", 10)
    lease.grow_nowait(90)
    assert (lease.nbytes, governor.free_bytes) == (100, 0)
    with pytest.raises(anyio.WouldBlock):
        lease.grow_nowait(1)
    lease.shrink(70)
    assert (lease.nbytes, governor.free_bytes) == (30, 70)
    statistics = governor.statistics()
    assert (statistics.peak_bytes_in_use, statistics.holders) == (100, {"a": 30})
    lease.release()
    assert governor.free_bytes == 100


async def test_a_lease_gives_to_another_even_when_nothing_is_free() -> None:
    governor = MemoryGovernor(100)
    giver, taker = governor.acquire_nowait("giver", 100), governor.acquire_nowait("taker", 0)
    giver.give(60, taker)
    assert governor.statistics().holders == {"taker": 60, "giver": 40}
    giver.release()
    assert governor.free_bytes == 40


async def test_a_lease_that_was_released_cannot_change() -> None:
    governor = MemoryGovernor(100)
    lease, other = governor.acquire_nowait("a", 10), governor.acquire_nowait("b", 10)
    lease.release()
    for change in (lambda: lease.grow_nowait(1), lambda: lease.shrink(1), lambda: other.give(1, lease)):
        with pytest.raises(RuntimeError, match="after its release"):
            change()
    for change in (lambda: other.shrink(11), lambda: other.give(11, governor.acquire_nowait("c", 1))):
        with pytest.raises(RuntimeError, match="does not have 11 bytes"):
            change()
    assert governor.statistics().holders == {"b": 10, "c": 1}


class Queue:
    """Starts waiters one after another and tells in which order they were served."""

    def __init__(self, governor: MemoryGovernor, group: Any) -> None:
        self.governor, self.group = governor, group
        self.served: list[str] = []
        self.leases: dict[str, Lease] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}

    async def add(self, name: str, nbytes: int) -> None:
        async def wait() -> None:
            with anyio.CancelScope() as self.scopes[name]:
                self.leases[name] = await self.governor.acquire(name, nbytes)
                self.served.append(name)

        self.group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()


async def test_a_large_request_is_not_overtaken() -> None:
    governor = MemoryGovernor(100)
    half, rest = governor.acquire_nowait("x", 50), governor.acquire_nowait("y", 50)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("large", 80)
        await queue.add("small", 10)
        await queue.add("smaller", 5)
        assert governor.statistics().num_waiting == 3
        half.release()
        await anyio.wait_all_tasks_blocked()
        assert queue.served == []
        with pytest.raises(anyio.WouldBlock):
            governor.acquire_nowait("pushing in", 1)
        rest.release()
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["large", "small", "smaller"]
    assert governor.free_bytes == 5


async def test_who_grows_does_not_push_in_and_who_shrinks_lets_the_next_one_on() -> None:
    governor = MemoryGovernor(100)
    first = governor.acquire_nowait("x", 60)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("large", 80)
        with pytest.raises(anyio.WouldBlock):
            first.grow_nowait(1)
        first.shrink(30)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == []
        first.shrink(10)
        with pytest.raises(anyio.WouldBlock):  # large has not run yet, but it is its turn
            first.grow_nowait(1)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["large"]
    assert governor.free_bytes == 0


async def test_a_cancelled_waiter_holds_nothing_and_lets_the_next_one_on() -> None:
    governor = MemoryGovernor(100)
    first = governor.acquire_nowait("x", 90)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("large", 100)
        await queue.add("small", 10)
        queue.scopes["large"].cancel()
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["small"]
    first.release()
    assert governor.statistics().num_waiting == 0
    assert governor.free_bytes == 90


async def test_cancelled_in_the_moment_it_is_served() -> None:
    governor = MemoryGovernor(100)
    first = governor.acquire_nowait("x", 100)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("a", 100)
        await queue.add("b", 100)
        first.release()
        queue.scopes["a"].cancel()
        await anyio.wait_all_tasks_blocked()
        # Served or not: nothing is lost, and b is served in the end.
        if "a" in queue.leases:
            queue.leases["a"].release()
            await anyio.wait_all_tasks_blocked()
        assert queue.served[-1] == "b"
        queue.leases["b"].release()
    assert governor.free_bytes == 100
    assert governor.statistics().num_leases == 0


async def test_released_between_grant_and_wake_up_nobody_pushes_in() -> None:
    governor = MemoryGovernor(100)
    first = governor.acquire_nowait("x", 100)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("a", 60)
        first.release()
        with pytest.raises(anyio.WouldBlock):  # a has not run yet, but it is its turn
            governor.acquire_nowait("b", 60)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["a"]
        assert governor.acquire_nowait("b", 40)
    assert governor.statistics().peak_bytes_in_use == 100


async def test_a_cancelled_call_takes_nothing() -> None:
    governor = MemoryGovernor(100)
    governor.acquire_nowait("x", 100)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await governor.acquire("a", 10)
    assert scope.cancelled_caught
    assert governor.statistics().num_waiting == 0
    assert governor.statistics().num_leases == 1


# Parts


async def test_a_part_is_one_lease_of_the_governor_and_grants_its_own() -> None:
    governor = MemoryGovernor(100)
    with governor.part("ring", 60) as part:
        for name in ("a", "b"):
            part.acquire_nowait(name, 20)
        assert part.statistics().holders == {"a": 20, "b": 20}
        assert (part.free_bytes, governor.free_bytes) == (20, 40)
        statistics = governor.statistics()
        assert (statistics.holders, statistics.num_leases) == ({"ring": 60}, 1)
    assert governor.statistics().num_leases == 0
    with pytest.raises(MemoryBudgetError, match="ring"):
        governor.part("ring", 101)


async def test_a_part_grants_no_more_leases_than_it_may() -> None:
    part = MemoryGovernor(100).part("ring", 100, max_leases=2)
    first, _ = part.acquire_nowait("a", 1), part.acquire_nowait("b", 1)
    with pytest.raises(anyio.WouldBlock):
        part.acquire_nowait("c", 1)
    async with anyio.create_task_group() as group:
        queue = Queue(part, group)
        await queue.add("c", 1)
        await queue.add("d", 0)
        assert queue.served == []
        first.release()
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["c"]
        part.resize(100, max_leases=3)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["c", "d"]


async def test_the_lease_of_a_part_grows_and_shrinks_with_it() -> None:
    governor = MemoryGovernor(100)
    part = governor.part("ring", 10)
    other = governor.acquire_nowait("other", 50)
    part.resize(50)
    assert governor.statistics().holders == {"ring": 50, "other": 50}
    with pytest.raises(anyio.WouldBlock):
        part.resize(51)
    assert (part.budget_bytes, governor.free_bytes) == (50, 0)
    part.resize(20)
    assert (part.budget_bytes, governor.free_bytes) == (20, 30)
    other.release()
    part.release()
    assert governor.free_bytes == 100


async def test_who_waits_for_more_than_a_part_has_is_served_when_it_grows() -> None:
    part = MemoryGovernor(100).part("ring", 0, max_leases=0)
    async with anyio.create_task_group() as group:
        queue = Queue(part, group)
        await queue.add("a", 30)
        part.resize(20, max_leases=1)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == []
        part.resize(30, max_leases=1)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["a"]


async def test_several_waiters_are_served_by_one_release_and_the_last_may_leave_in_that_moment() -> None:
    governor = MemoryGovernor(100)
    first = governor.acquire_nowait("x", 100)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        for name in ("a", "b", "c"):
            await queue.add(name, 30)
        first.release()
        assert governor.statistics().holders == {"a": 30, "b": 30, "c": 30}  # before any of them has run
        with governor.closed():
            queue.scopes["c"].cancel()
            await anyio.wait_all_tasks_blocked()
        assert queue.served[:2] == ["a", "b"]
    for lease in queue.leases.values():
        lease.release()
    assert (governor.free_bytes, governor.statistics().num_leases) == (100, 0)


# Loans


async def test_what_is_lent_is_not_free_and_is_wanted_back_by_who_waits() -> None:
    governor = MemoryGovernor(100)
    governor.acquire_nowait("x", 30)
    governor.lend("weights", 60)
    assert (governor.free_bytes, governor.lent_bytes, governor.wanted_back_bytes) == (10, 60, 0)
    with pytest.raises(anyio.WouldBlock):
        governor.lend("weights", 71)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("a", 30)
        assert (governor.wanted_back_bytes, governor.shortfall_bytes) == (20, 0)
        with pytest.raises(anyio.WouldBlock):  # it is not for this loan that somebody waits
            governor.lend("weights", 61)
        governor.lend("weights", 40)
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["a"]
    assert governor.statistics().holders == {"x": 30, "weights": 40, "a": 30}
    governor.lend("weights", 0)
    assert governor.statistics().holders == {"x": 30, "a": 30}


async def test_a_loan_is_not_enough_for_who_waits_for_more() -> None:
    governor = MemoryGovernor(100)
    governor.acquire_nowait("x", 50)
    governor.lend("weights", 40)
    async with anyio.create_task_group() as group:
        await Queue(governor, group).add("a", 70)
        assert (governor.wanted_back_bytes, governor.shortfall_bytes) == (40, 20)
        group.cancel_scope.cancel()
    assert (governor.wanted_back_bytes, governor.shortfall_bytes) == (0, 0)


async def test_an_event_is_set_when_a_loan_is_wanted_back() -> None:
    governor, early, late = MemoryGovernor(100), anyio.Event(), anyio.Event()
    governor.acquire_nowait("x", 40)
    governor.lend("weights", 60)
    governor.set_when_wanted_back(early)
    assert not early.is_set()
    async with anyio.create_task_group() as group:
        await Queue(governor, group).add("a", 10)
        assert early.is_set()
        governor.set_when_wanted_back(late)
        assert late.is_set()
        group.cancel_scope.cancel()


async def test_an_event_is_set_for_the_next_in_the_queue() -> None:
    governor, event = MemoryGovernor(100), anyio.Event()
    first = governor.acquire_nowait("x", 40)
    governor.lend("weights", 60)
    async with anyio.create_task_group() as group:
        queue = Queue(governor, group)
        await queue.add("a", 40)
        governor.lend("weights", 55)
        await queue.add("b", 10)
        governor.set_when_wanted_back(event)
        assert event.is_set()
        event = anyio.Event()
        governor.set_when_wanted_back(event)
        first.release()
        await anyio.wait_all_tasks_blocked()
        assert queue.served == ["a"]
        assert event.is_set()
        group.cancel_scope.cancel()
