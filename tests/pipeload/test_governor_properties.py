"""Whatever is acquired, changed, released and cancelled, in any order: the budget holds, and the queue is in order."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import hypothesis.strategies as st
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from hermes_async.pipeload.governor import Lease, MemoryGovernor

BUDGET = 100


class Governed(RuleBasedStateMachine):
    """The model: `held`, the bytes leased; `queue`, who waits for how many, in order."""

    waiters = Bundle("waiters")
    max_leases: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._starting = start_blocking_portal()
        self._portal: BlockingPortal = self._starting.__enter__()
        self.governor = self._portal.call(self._new_governor)
        self.num_waiters = 0
        self.held: dict[str, int] = {}
        self.queue: list[tuple[str, int]] = []
        self.granted: dict[str, Lease] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}

    async def _new_governor(self) -> MemoryGovernor:
        return MemoryGovernor(BUDGET)

    def teardown(self) -> None:
        self._portal.call(self._cancel_all)
        self._starting.__exit__(None, None, None)

    async def _cancel_all(self) -> None:
        for scope in self.scopes.values():
            scope.cancel()
        await anyio.wait_all_tasks_blocked()
        for lease in self.granted.values():
            lease.release()
        statistics = self.governor.statistics()
        assert (statistics.num_waiting, statistics.num_leases, statistics.bytes_in_use) == (0, 0, 0)

    def _serve_model(self) -> None:
        while self.queue and self._has_room(self.queue[0][1]):
            name, nbytes = self.queue.pop(0)
            self.held[name] = nbytes

    def _has_room(self, nbytes: int) -> bool:
        one_more = self.max_leases is None or len(self.held) < self.max_leases
        return one_more and nbytes <= BUDGET - sum(self.held.values())

    def _is_granted_at_once(self, nbytes: int) -> bool:
        return not self.queue and self._has_room(nbytes)

    async def _wait(self, name: str, nbytes: int) -> None:
        with anyio.CancelScope() as self.scopes[name]:
            self.granted[name] = await self.governor.acquire(name, nbytes)

    @rule(target=waiters, nbytes=st.integers(0, BUDGET))
    def acquire(self, nbytes: int) -> str:
        name = f"w{self.num_waiters}"
        self.num_waiters += 1
        self._portal.start_task_soon(self._wait, name, nbytes)
        self._portal.call(_settle)
        if self._is_granted_at_once(nbytes):
            self.held[name] = nbytes
        else:
            self.queue.append((name, nbytes))
        return name

    @rule(nbytes=st.integers(0, BUDGET))
    def acquire_nowait(self, nbytes: int) -> None:
        name = f"w{self.num_waiters}"
        self.num_waiters += 1

        async def attempt() -> Lease | None:
            try:
                return self.governor.acquire_nowait(name, nbytes)
            except anyio.WouldBlock:
                return None

        lease = self._portal.call(attempt)
        assert (lease is not None) == self._is_granted_at_once(nbytes)
        if lease is not None:
            self.granted[name] = lease
            self.held[name] = nbytes

    @rule(name=consumes(waiters))
    def end(self, name: str) -> None:
        """Releases what was granted; cancels who waits."""

        async def end() -> None:
            lease = self.granted.pop(name, None)
            if lease is not None:
                lease.release()
            else:
                self.scopes[name].cancel()
            await _settle()

        self._portal.call(end)
        self.held.pop(name, None)
        self.queue = [waiter for waiter in self.queue if waiter[0] != name]
        self._serve_model()

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), nbytes=st.integers(0, BUDGET))
    def grow(self, data: st.DataObject, nbytes: int) -> None:
        name = self._one_of_the_granted(data)

        async def attempt() -> bool:
            try:
                self.granted[name].grow_nowait(nbytes)
            except anyio.WouldBlock:
                return False
            return True

        possible = not self.queue and nbytes <= BUDGET - sum(self.held.values())
        assert self._portal.call(attempt) == possible
        self.held[name] += nbytes if possible else 0

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        name = self._one_of_the_granted(data)
        nbytes = data.draw(st.integers(0, self.held[name]), "nbytes")

        async def shrink() -> None:
            self.granted[name].shrink(nbytes)
            await _settle()

        self._portal.call(shrink)
        self.held[name] -= nbytes
        self._serve_model()

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Nobody can tell from outside: even who waits goes on waiting."""
        giver, taker = self._one_of_the_granted(data), self._one_of_the_granted(data)
        nbytes = data.draw(st.integers(0, self.held[giver]), "nbytes")

        async def give() -> None:
            self.granted[giver].give(nbytes, self.granted[taker])
            await _settle()

        self._portal.call(give)
        self.held[giver] -= nbytes
        self.held[taker] += nbytes

    def _one_of_the_granted(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.granted)), "lease")

    @invariant()
    def the_governor_is_as_the_model(self) -> None:
        statistics = self.governor.statistics()
        assert statistics.bytes_in_use == sum(self.held.values()) <= BUDGET
        assert statistics.peak_bytes_in_use <= BUDGET
        assert statistics.num_leases == len(self.held) == len(self.granted)
        assert statistics.num_waiting == len(self.queue)
        lacking = self.queue[0][1] - (BUDGET - sum(self.held.values())) if self.queue else 0
        assert self.governor.shortfall_bytes == max(0, lacking)
        assert statistics.holders == self.held
        assert self.granted.keys() == self.held.keys()


class GovernedPart(Governed):
    """The same for a part of another governor, with a limit on the number of leases too."""

    max_leases = 3

    async def _new_governor(self) -> MemoryGovernor:
        self.outer = MemoryGovernor(2 * BUDGET)
        self.outer.acquire_nowait("others", BUDGET)
        return self.outer.part("part", BUDGET, max_leases=self.max_leases)

    @invariant()
    def the_outer_governor_has_one_lease_of_it(self) -> None:
        assert self.outer.statistics().holders == {"others": BUDGET, "part": BUDGET}
        assert self.outer.statistics().num_leases == 2


async def _settle() -> None:
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


Governed.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
GovernedPart.TestCase.settings = Governed.TestCase.settings
test_governor = Governed.TestCase
test_part = GovernedPart.TestCase
