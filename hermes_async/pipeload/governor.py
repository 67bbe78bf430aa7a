"""The memory governor, a semaphore counted in bytes: every byte that the engine holds is a lease of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError


class Lease:
    """`nbytes` bytes of the budget, which belong to `holder` until `release`. Also a context manager."""

    __slots__ = ("_governor", "holder", "nbytes")

    def __init__(self, governor: MemoryGovernor, holder: str, nbytes: int) -> None:
        self._governor: MemoryGovernor | None = governor
        self.holder = holder
        self.nbytes = nbytes

    @property
    def released(self) -> bool:
        return self._governor is None

    def release(self) -> None:
        """Gives the bytes back; a second call does nothing."""
        governor, self._governor = self._governor, None
        if governor is not None:
            governor._release(self)

    def grow_nowait(self, nbytes: int) -> None:
        """Adds `nbytes` to the lease.

        Raises:
            anyio.WouldBlock: So many bytes are not free, or others wait for memory. Nothing changes.
        """
        self._open()._grow(self, nbytes)

    def shrink(self, nbytes: int) -> None:
        """Gives back `nbytes` of the lease.

        Raises:
            RuntimeError: The lease has fewer bytes, or was released.
        """
        self._open()._shrink(self, nbytes)

    def give(self, nbytes: int, other: Lease) -> None:
        """Moves `nbytes` of this lease to `other`, a lease of the same governor.

        Raises:
            RuntimeError: The lease has fewer bytes, or one of the two was released.
        """
        ours, others = self._open(), other._open()
        assert ours is others
        self._check_has(nbytes)
        self.nbytes -= nbytes
        other.nbytes += nbytes

    def _open(self) -> MemoryGovernor:
        if self._governor is None:  # no assert: the budget depends on it
            raise RuntimeError(f"{self!r} was used after its release")
        return self._governor

    def _check_has(self, nbytes: int) -> None:
        if nbytes > self.nbytes:
            raise RuntimeError(f"{self!r} does not have {nbytes} bytes to give")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Lease {self.holder}: {format_bytes(self.nbytes)}{', released' if self.released else ''}>"


@dataclass(frozen=True, slots=True)
class GovernorStatistics:
    """What a governor has given out.

    Attributes:
        bytes_in_use: Leased now.
        peak_bytes_in_use: The most that was ever leased at once.
        num_waiting: Tasks that wait in `acquire`.
        holders: Leased bytes of each holder, the largest lease first.
    """

    budget_bytes: int
    bytes_in_use: int
    peak_bytes_in_use: int
    num_leases: int
    num_waiting: int
    holders: dict[str, int]


@dataclass(eq=False, slots=True)
class _Waiter:
    """A task that waits in `acquire`; the lease is there once it is `granted`."""

    holder: str
    nbytes: int
    granted: anyio.Event = field(default_factory=anyio.Event)
    lease: Lease | None = None


class MemoryGovernor:
    """A semaphore counted in bytes.

    Leases are granted first come, first served: a large request at the head of the queue is not overtaken by small
    ones behind it. All methods belong to the event loop, and all but `acquire` are synchronous.

    A governor can be nested. The ring is a `part` of the engine's governor: one lease there, and a governor of its own
    for the stages, which the loading agents wait for.

    Args:
        max_leases: The most leases at once; None for no limit.
        outer: The lease that this governor is a part of; see `part`.

    Source: the Daemon Agent's memory accounting, Hermes (arXiv 2409.04249), section III.
    """

    def __init__(self, budget_bytes: int, *, max_leases: int | None = None, outer: Lease | None = None) -> None:
        # All mutable state: the two limits, the leases that are out, their bytes and the most there ever were, who
        # waits, in order, whether nothing is granted, what is lent, and what is set when it is wanted back.
        self.budget_bytes = budget_bytes
        self._max_leases = max_leases
        self._outer = outer
        self._leases: set[Lease] = set()
        self._in_use = 0
        self._peak = 0
        self._waiters: deque[_Waiter] = deque()
        self._is_closed = False
        self._loan: Lease | None = None
        self._when_wanted_back: anyio.Event | None = None

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self._in_use

    def part(self, holder: str, nbytes: int, *, max_leases: int | None = None) -> MemoryGovernor:
        """A governor over one lease of this one. It is also a context manager: leaving it releases that lease.

        Raises:
            MemoryBudgetError, anyio.WouldBlock: As `acquire_nowait`.
        """
        return MemoryGovernor(nbytes, max_leases=max_leases, outer=self.acquire_nowait(holder, nbytes))

    def release(self) -> None:
        """Gives back the lease of a part. Nothing may be leased from the part any more."""
        assert self._outer is not None
        self._outer.release()

    def resize(self, budget_bytes: int, *, max_leases: int | None = None) -> None:
        """Sets other limits, which must hold for what is leased now; the lease of a part grows or shrinks with them.

        Raises:
            anyio.WouldBlock: The lease of a part cannot grow so far. Nothing changes.
        """
        assert self._in_use <= budget_bytes
        assert max_leases is None or len(self._leases) <= max_leases
        if self._outer is not None:
            more = budget_bytes - self.budget_bytes
            if more > 0:
                self._outer.grow_nowait(more)
            else:
                self._outer.shrink(-more)
        self.budget_bytes, self._max_leases = budget_bytes, max_leases
        self._grant_waiters()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Grants nothing while the body runs, as if nothing were free."""
        self._is_closed = True
        try:
            yield
        finally:
            self._is_closed = False
            self._grant_waiters()

    async def acquire(self, holder: str, nbytes: int) -> Lease:
        """Waits until `nbytes` are free and it is this call's turn.

        Raises:
            MemoryBudgetError: More than the whole budget; it could never be granted. A part waits until it is resized.

        Cancellation: the call leaves the queue and holds nothing.
        """
        try:
            return self.acquire_nowait(holder, nbytes)
        except anyio.WouldBlock:
            pass
        waiter = _Waiter(holder, nbytes)
        self._waiters.append(waiter)
        self._tell_wanted_back()
        try:
            await waiter.granted.wait()
        except BaseException:
            if waiter.lease is not None:
                waiter.lease.release()
            else:
                self._waiters.remove(waiter)
                self._grant_waiters()
            raise
        assert waiter.lease is not None
        return waiter.lease

    def acquire_nowait(self, holder: str, nbytes: int) -> Lease:
        """Takes `nbytes` at once.

        Raises:
            MemoryBudgetError: More than the whole budget.
            anyio.WouldBlock: So many bytes are not free, there are `max_leases`, or others wait.
        """
        if self._outer is None and nbytes > self.budget_bytes:
            raise MemoryBudgetError(
                f"{holder} needs {format_bytes(nbytes)}, more than the whole budget of "
                f"{format_bytes(self.budget_bytes)}",
                requested_bytes=nbytes,
                budget_bytes=self.budget_bytes,
                holders=self.statistics().holders,
            )
        if not self.can_grant(nbytes):
            raise anyio.WouldBlock
        return self._grant(holder, nbytes)

    @property
    def shortfall_bytes(self) -> int:
        """What the first task that waits lacks now, and no loan will give back; 0 where nobody waits."""
        return max(0, self._lacking_bytes - self.lent_bytes)

    @property
    def is_waited_for(self) -> bool:
        """Whether any task waits in `acquire`."""
        return bool(self._waiters)

    # --- what is lent ---

    @property
    def lent_bytes(self) -> int:
        """Bytes of the loan."""
        return 0 if self._loan is None else self._loan.nbytes

    @property
    def wanted_back_bytes(self) -> int:
        """The part of the loan that the first task that waits needs."""
        return min(self.lent_bytes, self._lacking_bytes)

    def lend(self, holder: str, nbytes: int) -> None:
        """Makes so many bytes a loan: `holder` has them while they are free, and gives them back for tasks that wait.

        Raises:
            anyio.WouldBlock: The loan cannot grow so far. Nothing changes.
        """
        loan = self._loan or self.empty_lease(holder)
        self._loan = loan
        try:
            if nbytes > loan.nbytes:
                loan.grow_nowait(nbytes - loan.nbytes)
            else:
                loan.shrink(loan.nbytes - nbytes)
        finally:
            if not loan.nbytes:
                loan.release()
                self._loan = None

    def set_when_wanted_back(self, event: anyio.Event) -> None:
        """Sets the event when a task waits for what is lent, perhaps now. Only the last such event counts."""
        self._when_wanted_back = event
        self._tell_wanted_back()

    def _tell_wanted_back(self) -> None:
        if self._when_wanted_back is not None and self.wanted_back_bytes:
            self._when_wanted_back.set()

    @property
    def _lacking_bytes(self) -> int:
        return max(0, self._waiters[0].nbytes - self.free_bytes) if self._waiters else 0

    def empty_lease(self, holder: str) -> Lease:
        """A lease of no bytes, for memory that other leases give to it. It is granted also while others wait."""
        return self._grant(holder, 0)

    def can_grant(self, nbytes: int) -> bool:
        """Whether `acquire_nowait` would succeed."""
        return not self._waiters and self._has_room(nbytes)

    def statistics(self) -> GovernorStatistics:
        holders: dict[str, int] = {}
        for lease in sorted(self._leases, key=lambda lease: -lease.nbytes):
            holders[lease.holder] = holders.get(lease.holder, 0) + lease.nbytes
        return GovernorStatistics(
            budget_bytes=self.budget_bytes,
            bytes_in_use=self._in_use,
            peak_bytes_in_use=self._peak,
            num_leases=len(self._leases),
            num_waiting=len(self._waiters),
            holders=holders,
        )

    def _has_room(self, nbytes: int) -> bool:
        one_more = self._max_leases is None or len(self._leases) < self._max_leases
        return one_more and not self._is_closed and nbytes <= self.free_bytes

    def _grant(self, holder: str, nbytes: int) -> Lease:
        lease = Lease(self, holder, nbytes)
        self._leases.add(lease)
        self._count(nbytes)
        return lease

    def _count(self, more_bytes: int) -> None:
        self._in_use += more_bytes
        self._peak = max(self._peak, self._in_use)

    def _grow(self, lease: Lease, nbytes: int) -> None:
        if self._is_closed or self._waiters or nbytes > self.free_bytes:
            raise anyio.WouldBlock
        lease.nbytes += nbytes
        self._count(nbytes)

    def _shrink(self, lease: Lease, nbytes: int) -> None:
        lease._check_has(nbytes)
        lease.nbytes -= nbytes
        self._count(-nbytes)
        self._grant_waiters()

    def _release(self, lease: Lease) -> None:
        self._leases.remove(lease)
        self._count(-lease.nbytes)
        self._grant_waiters()

    def _grant_waiters(self) -> None:
        """Grants what there is room for, in order. A waiter has its lease before its task runs again."""
        while self._waiters and self._has_room(self._waiters[0].nbytes):
            waiter = self._waiters.popleft()
            waiter.lease = self._grant(waiter.holder, waiter.nbytes)
            waiter.granted.set()
        self._tell_wanted_back()

    def __enter__(self) -> MemoryGovernor:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
