"""The memory governor: every byte the engine holds is a lease from here, and never more than the budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError


class Lease:
    """`nbytes` bytes of the budget, held by `holder` until `release`. Also a context manager."""

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
            anyio.WouldBlock: Not free now, or others wait already; nothing changes.
        """
        self._open()._grow(self, nbytes)

    def shrink(self, nbytes: int) -> None:
        """Gives `nbytes` of the lease back."""
        self._open()._shrink(self, nbytes)

    def give(self, nbytes: int, other: Lease) -> None:
        """Makes `nbytes` of this lease part of `other`, of the same governor."""
        assert self._open() is other._open() and nbytes <= self.nbytes
        self.nbytes -= nbytes
        other.nbytes += nbytes

    def _open(self) -> MemoryGovernor:
        assert self._governor is not None, f"{self!r} was used after its release"
        return self._governor

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Lease {self.holder}: {format_bytes(self.nbytes)}{', released' if self.released else ''}>"


@dataclass(frozen=True, slots=True)
class GovernorStatistics:
    """Bytes: the budget, those leased now and at the most, each holder's; `num_waiting` tasks wait for more."""

    budget_bytes: int
    bytes_in_use: int
    peak_bytes_in_use: int
    num_leases: int
    num_waiting: int
    holders: dict[str, int]


class MemoryGovernor:
    """A semaphore counted in bytes.

    Leases are granted first come, first served: a large request at the head of the queue is not overtaken by small
    ones behind it. Event-loop side only; state changes are synchronous.

    Source: the Daemon Agent's memory accounting, Hermes (arXiv 2409.04249), section III.
    """

    def __init__(self, budget_bytes: int) -> None:
        # All mutable state: the leases out, the most ever out, who waits, in order, and whether nothing is granted.
        self.budget_bytes = budget_bytes
        self._leases: set[Lease] = set()
        self._in_use = 0
        self._peak = 0
        self._waiters: deque[tuple[int, anyio.Event]] = deque()
        self._is_closed = False

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self._in_use

    def resize(self, budget_bytes: int) -> None:
        """Sets another budget, not less than what is leased now."""
        assert self._in_use <= budget_bytes
        self.budget_bytes = budget_bytes
        self._wake_first()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Grants nothing while the body runs, as if nothing were free."""
        self._is_closed = True
        try:
            yield
        finally:
            self._is_closed = False
            self._wake_first()

    async def acquire(self, holder: str, nbytes: int) -> Lease:
        """Waits until `nbytes` are free and it is this call's turn.

        Raises:
            MemoryBudgetError: More than the whole budget; it could never be granted.

        Cancellation: the call leaves the queue and holds nothing.
        """
        self._check_possible(holder, nbytes)
        try:
            return self.acquire_nowait(holder, nbytes)
        except anyio.WouldBlock:
            pass
        waiter = (nbytes, anyio.Event())
        self._waiters.append(waiter)
        try:
            await waiter[1].wait()
            return self._grant(holder, nbytes)
        finally:
            self._waiters.remove(waiter)
            self._wake_first()

    def acquire_nowait(self, holder: str, nbytes: int) -> Lease:
        """Takes `nbytes` at once.

        Raises:
            MemoryBudgetError: More than the whole budget.
            anyio.WouldBlock: Not free now, or others wait already.
        """
        self._check_possible(holder, nbytes)
        if self._is_closed or self._waiters or nbytes > self.free_bytes:
            raise anyio.WouldBlock
        return self._grant(holder, nbytes)

    def statistics(self) -> GovernorStatistics:
        holders: dict[str, int] = {}
        for lease in sorted(self._leases, key=lambda lease: -lease.nbytes):
            holders[lease.holder] = holders.get(lease.holder, 0) + lease.nbytes
        return GovernorStatistics(
            self.budget_bytes, self._in_use, self._peak, len(self._leases), len(self._waiters), holders
        )

    def _check_possible(self, holder: str, nbytes: int) -> None:
        if nbytes > self.budget_bytes:
            raise MemoryBudgetError(
                f"{holder} needs {format_bytes(nbytes)}, more than the whole budget of "
                f"{format_bytes(self.budget_bytes)}",
                requested_bytes=nbytes,
                budget_bytes=self.budget_bytes,
                holders=self.statistics().holders,
            )

    def _grant(self, holder: str, nbytes: int) -> Lease:
        lease = Lease(self, holder, nbytes)
        self._leases.add(lease)
        self._in_use += nbytes
        self._peak = max(self._peak, self._in_use)
        return lease

    def _grow(self, lease: Lease, nbytes: int) -> None:
        if self._is_closed or self._waiters or nbytes > self.free_bytes:
            raise anyio.WouldBlock
        lease.nbytes += nbytes
        self._in_use += nbytes
        self._peak = max(self._peak, self._in_use)

    def _shrink(self, lease: Lease, nbytes: int) -> None:
        assert nbytes <= lease.nbytes
        lease.nbytes -= nbytes
        self._in_use -= nbytes
        self._wake_first()

    def _release(self, lease: Lease) -> None:
        self._leases.remove(lease)
        self._in_use -= lease.nbytes
        self._wake_first()

    def _wake_first(self) -> None:
        if self._waiters and not self._is_closed and self._waiters[0][0] <= self.free_bytes:
            self._waiters[0][1].set()
