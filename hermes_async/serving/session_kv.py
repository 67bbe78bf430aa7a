"""The KV of a session between its turns, and its states."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from hermes_async.serving.kv_blocks import Reservation


class SessionState(enum.Enum):
    """Where a session's KV is. `SessionKV.enter` makes every transition.

    EMPTY: nowhere; the next turn computes the whole history. HELD: in memory. PARKING: a thread writes it to disk.
    PARKED: on disk. RESTORING: a thread reads it back, for a turn. IN_TURN: a turn has it.
    """

    EMPTY = "empty"
    HELD = "held"
    PARKING = "parking"
    PARKED = "parked"
    RESTORING = "restoring"
    IN_TURN = "in turn"


_TRANSITIONS = {
    SessionState.EMPTY: {SessionState.HELD, SessionState.IN_TURN},  # HELD at once: a fork
    SessionState.HELD: {SessionState.EMPTY, SessionState.PARKING, SessionState.IN_TURN},
    SessionState.PARKING: {SessionState.EMPTY, SessionState.PARKED},
    SessionState.PARKED: {SessionState.EMPTY, SessionState.RESTORING},
    SessionState.RESTORING: {SessionState.IN_TURN},
    SessionState.IN_TURN: {SessionState.EMPTY, SessionState.HELD},
}


@dataclass(eq=False)
class SessionKV:
    """A session's KV between its turns. Event-loop side only.

    Attributes:
        name: For leases and messages.
        token_ids: The tokens whose keys and values `reservation` or `slots` hold.
        reservation: The KV in memory, while HELD and PARKING.
        slots: The KV on disk, one slot of the parking file for each block, while PARKED and RESTORING.
        closed: The user has closed the session. Its KV is freed when no thread and no turn uses it.
    """

    name: str
    state: SessionState = SessionState.EMPTY
    token_ids: list[int] = field(default_factory=list)
    reservation: Reservation | None = None
    slots: list[int] | None = None
    closed: bool = False

    @property
    def busy(self) -> bool:
        """Whether a thread or a turn uses the KV."""
        return self.state in (SessionState.PARKING, SessionState.RESTORING, SessionState.IN_TURN)

    def enter(
        self,
        state: SessionState,
        *,
        reservation: Reservation | None = None,
        slots: list[int] | None = None,
        token_ids: list[int] | None = None,
    ) -> None:
        """Makes a transition, and replaces the session's KV by what is given."""
        assert state in _TRANSITIONS[self.state], f"{self.name}: {self.state} -> {state}"
        self.state = state
        self.reservation, self.slots, self.token_ids = reservation, slots, token_ids or []
