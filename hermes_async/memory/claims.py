"""Budgets know each other: what each engine may come to hold, of the room that all engines of a user have in common."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hermes_async.memory.available import headroom, process_rss_bytes, rooms
from hermes_async.memory.other_processes import Claimed, Neighbourhood


@dataclass(frozen=True, slots=True)
class CommonRoom:
    """What there is, for one engine to look at. Of several limits, the one that leaves it the least.

    Attributes:
        room: Bytes that the machine, or the cgroup that has the limit, would still give.
        held: Bytes that all engines hold of what they have leased.
        beside: Bytes that this process has grown by and nobody has leased.
        others: Bytes that the other engines may come to hold.
        elsewhere: Bytes that the engines of other processes may come to hold; they hold `others_held` now.
        share: What is left to budgets and not fixed, divided by the engines that follow the machine.
        num_processes: With engines, under this limit.
    """

    room: int
    held: int
    beside: int
    others: int
    others_held: int
    elsewhere: int
    share: int
    num_processes: int

    @property
    def headroom(self) -> int:
        """What no budget takes."""
        return headroom(self.room + self.held, self.beside, self.num_processes)

    @property
    def for_budgets(self) -> int:
        """What all engines may come to hold."""
        return max(0, self.room + self.held - self.headroom)

    @property
    def for_one(self) -> int:
        """What this engine may come to hold: all that others leave, and not less than the fair share."""
        return max(self.share, self.for_budgets - self.others)


class Claim:
    """One engine's part of the room. Ends with `release`, or when nobody has it any more. Thread-safe.

    Args:
        fixed_bytes: What the engine takes in any case; None for a part that follows the machine.
    """

    def __init__(self, fixed_bytes: int | None) -> None:
        self.automatic = fixed_bytes is None
        self.leased: Callable[[], int] = lambda: 0
        with _LOCK:
            others = set(_CLAIMS)
            # What others hold by now is their engines', so the process's baseline is the first one's.
            self._baseline: int = min((other._baseline for other in others), default=process_rss_bytes())
            self._budget: int | None = fixed_bytes
            _CLAIMS.add(self)
            _publish()

    def look(self) -> CommonRoom:
        """Looks at the machine.

        Raises:
            ConfigError: It does not tell.
        """
        with _LOCK:
            return self._look()

    def take(self) -> int:
        """The budget of an automatic engine: all that others leave, and its fair share even if others must shrink.

        Raises:
            ConfigError: The machine does not tell what there is.
        """
        with _LOCK:
            self._budget = self._most()
            _publish()
            # Another process may have come between: it sees this budget now, or is seen.
            self._budget = min(self._budget, self._most())
            _publish()
            return self._budget

    def left_over(self, *, whatever_is_claimed: bool = False) -> int:
        """What others leave now, if half of the headroom is not minded, which they do not mind either.

        Args:
            whatever_is_claimed: Other processes count with what they hold, not with what they may come to hold.
        """
        seen = self.look()
        others = seen.others - (seen.elsewhere - seen.others_held if whatever_is_claimed else 0)
        return max(0, seen.room + seen.held - seen.headroom // 2 - others)

    def others_follow(self) -> bool:
        """Whether there are other engines that give back what they hold too much."""
        with _LOCK:
            here = any(claim.automatic and claim._budget for claim in _CLAIMS if claim is not self)
            return here or any(other.claimed.num_automatic for other in NEIGHBOURHOOD.look())

    def change(self, budget: int) -> None:
        """The engine has another budget, or less than it took."""
        with _LOCK:
            self._budget = budget
            _publish()

    def release(self) -> None:
        """Gives the part back; a second call does nothing."""
        with _LOCK:
            _CLAIMS.discard(self)
            _publish()

    def _most(self) -> int:
        """All that others leave, and not less than the fair share."""
        seen = self._look()
        here = sum(claim._budget is None for claim in _CLAIMS if claim is not self)
        undecided = here + sum(other.claimed.num_undecided for other in NEIGHBOURHOOD.look())
        return max(seen.share, seen.for_budgets - seen.others - undecided * seen.share)

    def _look(self) -> CommonRoom:
        claims = set(_CLAIMS)
        leased = sum(claim.leased() for claim in claims)
        rss = process_rss_bytes()
        if not leased:  # what it takes to open an engine comes before its budget, not beside it
            for claim in claims:
                claim._baseline = rss
        grown = max(0, rss - self._baseline)
        held = min(leased, grown)
        here = _claimed(claims)
        near = NEIGHBOURHOOD.look()
        seen = []
        for room in rooms():
            sharing = [other for other in near if other.is_in(room.hierarchy, room.group)]
            held_there = sum(other.held for other in sharing)
            elsewhere = sum(other.claimed.budget for other in sharing)
            common = CommonRoom(
                room=room.free,
                held=held + held_there,
                beside=grown - held,
                others=here.budget - (self._budget or 0) + elsewhere,
                others_held=held_there,
                elsewhere=elsewhere,
                share=0,
                num_processes=1 + len(sharing),
            )
            fixed = here.fixed + sum(other.claimed.fixed for other in sharing)
            num_automatic = here.num_automatic + sum(other.claimed.num_automatic for other in sharing)
            share = max(0, common.for_budgets - fixed) // max(1, num_automatic)
            seen.append(replace(common, share=share))
        return min(seen, key=lambda common: common.for_one)


def _claimed(claims: set[Claim]) -> Claimed:
    """What engines of this process claim together."""
    return Claimed(
        budget=sum(claim._budget or 0 for claim in claims),
        fixed=sum(claim._budget or 0 for claim in claims if not claim.automatic),
        num_automatic=sum(claim.automatic for claim in claims),
        num_undecided=sum(claim._budget is None for claim in claims),
        baseline=min((claim._baseline for claim in claims), default=0),
    )


def _publish() -> None:
    claims = set(_CLAIMS)
    NEIGHBOURHOOD.publish(_claimed(claims) if claims else None)


NEIGHBOURHOOD = Neighbourhood(Path(f"/dev/shm/hermes-async-{os.getuid()}"))  # noqa: S108
"""Every container has a /dev/shm of its own, as it has limits of its own."""

_LOCK = threading.RLock()
_CLAIMS: weakref.WeakSet[Claim] = weakref.WeakSet()
