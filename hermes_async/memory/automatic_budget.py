"""`memory_budget="auto"`: a budget that follows what the machine has to give."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError, ReadError
from hermes_async.memory.available import headroom, stalled_share
from hermes_async.memory.claims import Claim
from hermes_async.storage.threads import run_in_thread

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
_PRESSURE = 0.1  # of the time spent waiting for memory, from which on some is given back
_GIVEN_BACK = 0.1  # of the budget, where there is pressure
_WORTH_IT = 0.2  # more than now, before the budget grows
_LOOKS_BEFORE_GROWING = 10  # that all must say so: others may only have paused


@dataclass(frozen=True, slots=True)
class Look:
    """What the machine says.

    Attributes:
        room: Bytes that it would still give.
        held: Bytes that the engines hold, also those of other processes.
        stalled: The share of time in which tasks waited for memory.
        others: Bytes that the other engines may come to hold.
        headroom: Bytes that no budget takes; None where nothing was taken beside budgets so far.
    """

    room: int
    held: int
    stalled: float = 0.0
    others: int = 0
    headroom: int | None = None


class BudgetFollower:
    """Decides when the budget changes. Synchronous; looks at nothing itself.

    When half of what was left to others is gone, the answer is at once, because the kernel's would be worse. More is
    taken only when it has been there for ten looks and is worth a fifth, so that the engine does not give and take in
    turn with its neighbours.
    """

    def __init__(self, budget: int, most: int) -> None:
        self.budget = budget
        self._most = most
        self._looks: list[int] = []  # what each of the last looks would have allowed

    def next_budget(self, look: Look) -> int | None:
        """Another budget, or None to go on with this one."""
        total = look.room + look.held
        left = headroom(total) if look.headroom is None else look.headroom
        allowed = min(self._most, max(0, total - left - look.others))
        too_much = self.budget > total - left // 2 - look.others
        if look.stalled > _PRESSURE:
            allowed, too_much = min(allowed, int(self.budget * (1 - _GIVEN_BACK))), True
        self._looks = [*self._looks, allowed][-_LOOKS_BEFORE_GROWING:]
        if too_much:
            return allowed
        lasting = min(self._looks)
        if len(self._looks) == _LOOKS_BEFORE_GROWING and lasting >= min(self._most, self.budget * (1 + _WORTH_IT)):
            return lasting if lasting > self.budget else None
        return None

    def changed(self, budget: int) -> None:
        """Told of the budget that there is now."""
        self.budget = budget
        self._looks.clear()


async def follow(budget: int, most: int, claim: Claim, resize: Callable[[int], Awaitable[None]]) -> None:
    """Looks once a second, and calls `resize`; never returns.

    Args:
        most: A budget that holds everything; more is never asked for.
        claim: The engine's, by which the engines of a process know of each other.
    """
    follower = BudgetFollower(budget, max(budget, most))
    while True:
        await anyio.sleep(SECONDS_BETWEEN_LOOKS)
        wanted = follower.next_budget(await run_in_thread(_look, claim, left_at_exit=True))
        if wanted is None:
            continue
        try:
            wanted = await _resize(max(1, wanted), follower.budget, resize)
        except ReadError as error:
            logger.warning("not all of the weights that there is memory for could be read: %s", error)
        if wanted != follower.budget:
            logger.info("the memory budget is %s now, after %s", format_bytes(wanted), format_bytes(follower.budget))
        follower.changed(wanted)


async def _resize(wanted: int, now: int, resize: Callable[[int], Awaitable[None]]) -> int:
    """Goes from one budget to another, or as near as what is in use allows; the budget that there is then."""
    while True:
        try:
            await resize(wanted)
        except MemoryBudgetError as error:
            # Requests may take more KV before the next try has its turn: then that is too little as well.
            if error.minimum_bytes is None or error.minimum_bytes >= now:
                return now
            wanted = error.minimum_bytes
        else:
            return wanted


def _look(claim: Claim) -> Look:
    seen = claim.look()
    # Each keeps its fair share: who has more gives back.
    others = min(seen.others, max(0, seen.for_budgets - seen.share))
    return Look(seen.room, seen.held, stalled_share(), others, seen.headroom)
