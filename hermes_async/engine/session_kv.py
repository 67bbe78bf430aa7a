"""What a chat session keeps between its turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from hermes_async.engine.kv_blocks import Reservation


@dataclass(eq=False)
class SessionKV:
    """A session's KV while no turn of it is admitted: in memory, or parked on disk, or neither.

    Attributes:
        name: In leases and messages.
        token_ids: The tokens that `reservation` or `slots` hold the keys and values of.
        reservation: In memory.
        slots: Of the parking file, one for each block.
        moving: Set when the write to disk or the read from it that is under way has ended.
        in_turn: A turn of it holds its KV, perhaps one that was left and whose last stage is still computed.
        closed: It keeps nothing any more.
    """

    name: str
    token_ids: list[int] = field(default_factory=list)
    reservation: Reservation | None = None
    slots: list[int] | None = None
    moving: anyio.Event | None = None
    in_turn: bool = False
    closed: bool = False

    def num_common(self, token_ids: Sequence[int]) -> int:
        """How many tokens of a new turn it has already; the last one is always left to compute."""
        most = min(len(self.token_ids), len(token_ids) - 1)
        return next((idx for idx in range(most) if self.token_ids[idx] != token_ids[idx]), most)
