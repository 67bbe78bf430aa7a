"""`memory_budget="auto"`: a budget that follows the memory that the machine has to give."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError, ReadError, ReadTimeoutError
from hermes_async.memory.available import headroom, stalled_share
from hermes_async.memory.claims import Claim
from hermes_async.storage.threads import run_in_thread

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_OBSERVATIONS = 1.0
_PRESSURE = 0.1  # share of time spent waiting for memory, above which some memory is given back
_GIVEN_BACK = 0.1  # share of the budget that pressure takes
_MIN_GROWTH = 0.02  # share of the budget; it does not grow by less
_OBSERVATIONS_BEFORE_GROWING = 10  # all of which must allow the growth: other programs may only have paused


@dataclass(frozen=True, slots=True)
class Observation:
    """What the machine says at one moment.

    Attributes:
        free: Bytes that it would still give.
        held: Bytes that all engines hold, those of other processes included.
        stalled: The share of time in which tasks waited for memory.
        others: Bytes that the other engines may hold.
        headroom: Bytes that no budget takes; None computes it for a process without overhead so far.
    """

    free: int
    held: int
    stalled: float = 0.0
    others: int = 0
    headroom: int | None = None


class BudgetFollower:
    """Decides when the budget changes. Synchronous; observes nothing itself.

    The budget shrinks at once when half of the headroom is gone: the kernel would react in a worse way. It grows only
    if ten observations in a row allow it, and only by a fiftieth or more. Because it shrinks only when half of the
    headroom is gone, engines that share a machine do not give and take in turn.
    """

    def __init__(self, budget: int, most: int) -> None:
        self.budget = budget
        self._most = most
        self._allowed: list[int] = []  # by each of the last observations

    def next_budget(self, observed: Observation) -> int | None:
        """Returns another budget, or None to keep this one."""
        total = observed.free + observed.held
        kept_free = headroom(total) if observed.headroom is None else observed.headroom
        allowed = min(self._most, max(0, total - kept_free - observed.others))
        too_much = self.budget > total - kept_free // 2 - observed.others
        if observed.stalled > _PRESSURE:
            allowed, too_much = min(allowed, int(self.budget * (1 - _GIVEN_BACK))), True
        self._allowed = [*self._allowed, allowed][-_OBSERVATIONS_BEFORE_GROWING:]
        if too_much:
            return allowed
        lasting = min(self._allowed)
        enough = lasting >= min(self._most, self.budget * (1 + _MIN_GROWTH))
        if len(self._allowed) == _OBSERVATIONS_BEFORE_GROWING and enough and lasting > self.budget:
            return lasting
        return None

    def changed(self, budget: int) -> None:
        """Sets the budget that there is now."""
        self.budget = budget
        self._allowed.clear()


async def follow(budget: int, most: int, claim: Claim, resize: Callable[[int], Awaitable[None]]) -> None:
    """Observes the machine once a second, and calls `resize`; never returns.

    Args:
        most: The budget that holds everything; it is never exceeded.
        claim: The engine's.
    """
    follower = BudgetFollower(budget, max(budget, most))
    while True:
        await anyio.sleep(SECONDS_BETWEEN_OBSERVATIONS)
        wanted = follower.next_budget(await run_in_thread(_observe, claim, left_at_exit=True))
        if wanted is None:
            continue
        try:
            wanted = await _resize(max(1, wanted), follower.budget, resize)
        except ReadTimeoutError as error:
            logger.warning("the memory budget stays as it is while the disk does not answer: %s", error)
            continue
        except ReadError as error:
            logger.warning("some weights could not be read into the memory that is free for them: %s", error)
        if wanted != follower.budget:
            logger.info("the memory budget is %s now, after %s", format_bytes(wanted), format_bytes(follower.budget))
        follower.changed(wanted)


async def _resize(wanted: int, now: int, resize: Callable[[int], Awaitable[None]]) -> int:
    """Changes the budget from `now` to `wanted`, or as near as running requests allow; returns the new budget."""
    while True:
        try:
            await resize(wanted)
        except MemoryBudgetError as error:
            # Requests may take more KV memory before the next try, so that one may fail too.
            if error.minimum_bytes is None or error.minimum_bytes >= now:
                return now
            wanted = error.minimum_bytes
        else:
            return wanted


def _observe(claim: Claim) -> Observation:
    shared = claim.look()
    # Each engine keeps its fair share: those that have more give some back.
    others = min(shared.claimed_by_others, max(0, shared.for_budgets - shared.fair_share))
    return Observation(shared.free, shared.held, stalled_share(), others, shared.headroom)
