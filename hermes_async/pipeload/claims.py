"""Budgets of one process know each other: what each engine may come to hold, of the room that they have in common."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

from hermes_async.pipeload.memory import headroom, process_rss_bytes, room_bytes


@dataclass(frozen=True, slots=True)
class CommonRoom:
    """What there is, for one engine to look at.

    Attributes:
        room: Bytes that the machine would still give the process.
        held: Bytes that all engines of the process hold of what they have leased.
        beside: Bytes that the process has grown by and nobody has leased.
        others: Bytes that the other engines may come to hold.
        share: What is left to budgets and not fixed, divided by the engines that follow the machine.
    """

    room: int
    held: int
    beside: int
    others: int
    share: int

    @property
    def for_budgets(self) -> int:
        """What all engines of the process may come to hold."""
        total = self.room + self.held
        return max(0, total - headroom(total, self.beside))


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
            seen = self._look()
            undecided = sum(claim._budget is None for claim in _CLAIMS if claim is not self)
            self._budget = max(seen.share, seen.for_budgets - seen.others - undecided * seen.share)
            return self._budget

    def left_over(self) -> int:
        """What others leave now, if half of the headroom is not minded, which they do not mind either."""
        seen = self.look()
        total = seen.room + seen.held
        return max(0, total - headroom(total, seen.beside) // 2 - seen.others)

    def others_follow(self) -> bool:
        """Whether there are other engines that give back what they hold too much."""
        with _LOCK:
            return any(claim.automatic and claim._budget for claim in _CLAIMS if claim is not self)

    def change(self, budget: int) -> None:
        """The engine has another budget, or less than it took."""
        with _LOCK:
            self._budget = budget

    def release(self) -> None:
        """Gives the part back; a second call does nothing."""
        with _LOCK:
            _CLAIMS.discard(self)

    def _look(self) -> CommonRoom:
        claims = set(_CLAIMS)
        leased = sum(claim.leased() for claim in claims)
        rss = process_rss_bytes()
        if not leased:  # what it takes to open an engine comes before its budget, not beside it
            for claim in claims:
                claim._baseline = rss
        grown = max(0, rss - self._baseline)
        held = min(leased, grown)
        others = sum(claim._budget or 0 for claim in claims if claim is not self)
        seen = CommonRoom(room_bytes(), held, grown - held, others, 0)
        fixed = sum(claim._budget or 0 for claim in claims if not claim.automatic)
        num_automatic = sum(claim.automatic for claim in claims)
        return replace(seen, share=max(0, seen.for_budgets - fixed) // max(1, num_automatic))


_LOCK = threading.RLock()
_CLAIMS: weakref.WeakSet[Claim] = weakref.WeakSet()
