"""How all engines of one user divide the memory among them: each engine claims what it may hold."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError
from hermes_async.memory.available import HEADROOM_SHARE, headroom, memory_limits, process_rss_bytes
from hermes_async.memory.other_processes import OtherProcess, ProcessClaims, ProcessRegistry

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The memory under one limit, as one engine shares it with the other engines of the user.

    Attributes:
        free: Bytes that the machine, or the cgroup with the limit, would still give.
        held_here: Bytes in memory of all that the engines of this process have leased.
        unleased: Bytes that this process has grown by and no engine has leased.
        own_claim: What this engine claims; 0 while that is undecided.
        here: What the engines of this process claim, this one included.
        processes: The other processes with engines under this limit.
        neighbours: Whether there may be processes without engines under this limit.
    """

    free: int
    held_here: int
    unleased: int
    own_claim: int
    here: ProcessClaims
    processes: tuple[OtherProcess, ...]
    neighbours: bool

    @property
    def held(self) -> int:
        """What all engines hold now."""
        return self.held_here + self.held_elsewhere

    @property
    def held_elsewhere(self) -> int:
        """What the engines of other processes hold now."""
        return sum(process.held for process in self.processes)

    @property
    def claimed_elsewhere(self) -> int:
        """What the engines of other processes may hold."""
        return sum(process.claims.budget for process in self.processes)

    @property
    def claimed_by_others(self) -> int:
        """What all other engines may hold."""
        return self.here.budget - self.own_claim + self.claimed_elsewhere

    @property
    def num_processes(self) -> int:
        """Processes with engines under this limit, this one included."""
        return 1 + len(self.processes)

    @property
    def headroom(self) -> int:
        """What no budget takes."""
        return headroom(self.free + self.held, self.unleased, self.num_processes, neighbours=self.neighbours)

    @property
    def for_budgets(self) -> int:
        """What all budgets together may take."""
        return max(0, self.free + self.held - self.headroom)

    @property
    def fair_share(self) -> int:
        """What fixed budgets leave, divided by the number of engines that follow the machine."""
        claims = [self.here, *(process.claims for process in self.processes)]
        num_automatic = sum(each.num_automatic for each in claims)
        return max(0, self.for_budgets - sum(each.fixed for each in claims)) // max(1, num_automatic)

    @property
    def for_this_engine(self) -> int:
        """What this engine may hold: all that others leave, and at least its fair share."""
        return max(self.fair_share, self.for_budgets - self.claimed_by_others)


class Claim:
    """What one engine may come to hold. It ends with `release`, or when it is garbage collected. Thread-safe.

    A user may give a budget that is larger than the machine. So the number that counts is what the plan can use of the
    budget. An engine with a fixed budget claims nothing before it has a plan.

    Attributes:
        automatic: Whether its budget follows the machine.
        leased: Tells what the engine has leased.
        most_unleased: The most bytes by which the process had grown that no engine had leased, as often as it looked.

    Args:
        automatic: As the attribute.
    """

    def __init__(self, *, automatic: bool) -> None:
        self.automatic = automatic
        self.leased: Callable[[], int] = lambda: 0
        self.most_unleased = 0
        # All mutable state, under `_LOCK`: the bytes that it may hold, None while that is undecided; what the process
        # held before it had engines.
        self._nbytes: int | None = None
        with _LOCK:
            # What the process holds more by now belongs to its engines, so the first engine's baseline counts.
            self._baseline: int = min((other._baseline for other in _CLAIMS), default=process_rss_bytes())
            _CLAIMS.add(self)
            _publish()

    @property
    def nbytes(self) -> int:
        """What the engine may come to hold. It is at least what it has leased: KV of many idle sessions is more."""
        return max(self._nbytes or 0, self.leased())

    @property
    def is_undecided(self) -> bool:
        """Whether it is about to take a share of the memory."""
        return self.automatic and self._nbytes is None

    def look(self) -> SharedMemory:
        """Looks at the machine. Of several limits, the one that leaves this engine the least counts.

        Raises:
            ConfigError: The machine does not tell.
        """
        with _LOCK:
            claims = set(_CLAIMS)
            leased = sum(claim.leased() for claim in claims)
            rss = process_rss_bytes()
            if not leased:  # opening an engine takes memory before its budget, not in addition to it
                for claim in claims:
                    claim._baseline = rss
            grown = max(0, rss - self._baseline)
            held = min(leased, grown)
            self.most_unleased = max(self.most_unleased, grown - held)
            here, others = _claims_of(claims), PROCESSES.others()
            shared = [
                SharedMemory(
                    free=limit.free,
                    held_here=held,
                    unleased=grown - held,
                    own_claim=self.nbytes,
                    here=here,
                    processes=tuple(process for process in others if process.is_in(limit.hierarchy, limit.group)),
                    neighbours=limit.has_neighbours([process.pid for process in others]),
                )
                for limit in memory_limits()
            ]
            return min(shared, key=lambda each: each.for_this_engine)

    def take(self) -> int:
        """Decides an automatic budget: all that others leave, and at least a fair share, for which others must shrink.

        It is claimed until `change` says what the plan can use of it.

        Raises:
            ConfigError: The machine does not tell what there is.
        """
        with _LOCK:
            first = self._nbytes = self._most()
            _publish()
            # A process may have published its claim between the two. It sees this budget now, or is seen here.
            self._nbytes = min(first, self._most())
            _publish()
            return self._nbytes

    def left_over(self, *, ignore_claims: bool = False) -> int:
        """What other engines leave now, with half of the headroom, which they leave too.

        Args:
            ignore_claims: Count what other processes hold, instead of what they may hold.
        """
        shared = self.look()
        others = shared.claimed_by_others
        if ignore_claims:
            others += shared.held_elsewhere - shared.claimed_elsewhere
        return max(0, shared.free + shared.held - shared.headroom // 2 - others)

    def others_follow(self) -> bool:
        """Whether there are other engines that follow the machine, and so make room."""
        with _LOCK:
            here = any(claim.automatic and claim._nbytes for claim in _CLAIMS if claim is not self)
            return here or any(process.claims.num_automatic for process in PROCESSES.others())

    def change(self, nbytes: int) -> None:
        """Tells the other engines what this one may hold from now on."""
        with _LOCK:
            self._nbytes = nbytes
            _publish()

    def release(self) -> None:
        """Ends the claim; a second call does nothing."""
        with _LOCK:
            _CLAIMS.discard(self)
            _publish()

    def _most(self) -> int:
        """All that others leave, less a share for each that is undecided; at least the fair share."""
        shared = self.look()
        undecided = sum(claim.is_undecided for claim in _CLAIMS if claim is not self)
        undecided += sum(process.claims.num_undecided for process in PROCESSES.others())
        left = shared.for_budgets - shared.claimed_by_others - undecided * shared.fair_share
        return max(shared.fair_share, left)


def refusal(shared: SharedMemory, budget: int, error: MemoryBudgetError) -> MemoryBudgetError:
    """The error of an engine for which others leave too little: who has the memory, and how much more would do.

    Args:
        budget: What is left.
        error: The planner's, for this budget.
    """
    total, least = shared.free + shared.held, error.minimum_bytes or error.requested_bytes
    left = total - shared.headroom - shared.claimed_by_others
    # Of what is added, the headroom may take its share.
    missing = math.ceil((least - min(budget, left)) / (1 - HEADROOM_SHARE) / _MIB) * _MIB
    claimed = f", and other engines may hold {format_bytes(shared.claimed_by_others)}"
    return MemoryBudgetError(
        f"{error}. memory_budget='auto' can give no more: of {format_bytes(total)} that there are for engines, "
        f"{format_bytes(shared.headroom)} are kept free{claimed if shared.claimed_by_others else ''}. "
        f"With {format_bytes(missing)} more of free memory, it works",
        requested_bytes=least,
        budget_bytes=budget,
        minimum_bytes=error.minimum_bytes,
        holders={"other engines": shared.claimed_by_others, "kept free": shared.headroom},
    )


def _claims_of(claims: set[Claim]) -> ProcessClaims:
    """What engines of this process claim together."""
    return ProcessClaims(
        budget=sum(claim.nbytes for claim in claims),
        fixed=sum(claim.nbytes for claim in claims if not claim.automatic),
        num_automatic=sum(claim.automatic for claim in claims),
        num_undecided=sum(claim.is_undecided for claim in claims),
        baseline=min((claim._baseline for claim in claims), default=0),
    )


def _publish() -> None:
    claims = set(_CLAIMS)
    PROCESSES.publish(_claims_of(claims) if claims else None)


PROCESSES = ProcessRegistry(Path(f"/dev/shm/hermes-async-{os.getuid()}"))  # noqa: S108
"""Each container has a /dev/shm of its own, and limits of its own."""

_LOCK = threading.RLock()
_CLAIMS: weakref.WeakSet[Claim] = weakref.WeakSet()
