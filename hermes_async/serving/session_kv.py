"""What a chat session keeps between its turns."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from hermes_async.serving.kv_blocks import Reservation


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
