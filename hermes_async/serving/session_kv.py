"""The KV of a session between its turns, and its states."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hermes_async.modeling.kv_cache import num_kept
from hermes_async.serving.caches import ParkedKV, Reservation

if TYPE_CHECKING:
    from hermes_async.serving.request import PreparedPrompt


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
        token_ids: The tokens whose keys and values `reservation` or `parked` hold.
        reservation: The KV in memory, while HELD and PARKING.
        parked: The KV on disk, while PARKED and RESTORING.
        inputs_digest: Identifies the images of `token_ids`.
        closed: The user has closed the session. Its KV is freed when no thread and no turn uses it.
    """

    name: str
    state: SessionState = SessionState.EMPTY
    token_ids: list[int] = field(default_factory=list)
    reservation: Reservation | None = None
    parked: ParkedKV | None = None
    inputs_digest: str = ""
    closed: bool = False

    @property
    def busy(self) -> bool:
        """Whether a thread or a turn uses the KV."""
        return self.state in (SessionState.PARKING, SessionState.RESTORING, SessionState.IN_TURN)

    def num_kept(self, token_ids: Sequence[int], prompt: PreparedPrompt) -> int:
        """How many of `token_ids`, which begin with `prompt`, need not be computed again.

        Placeholders of all images are the same tokens, so the images must be the same too. A call that goes on after
        some tokens has no images. The last token before it is one of text, because its position tells the next ones.
        """
        if prompt.inputs_digest != self.inputs_digest:
            return 0
        num_common = num_kept(self.token_ids, token_ids)
        return num_common if num_common > prompt.image_end else 0

    def enter(
        self,
        state: SessionState,
        *,
        reservation: Reservation | None = None,
        parked: ParkedKV | None = None,
        token_ids: list[int] | None = None,
    ) -> None:
        """Makes a transition, and replaces the session's KV by what is given."""
        assert state in _TRANSITIONS[self.state], f"{self.name}: {self.state} -> {state}"
        self.state = state
        self.reservation, self.parked, self.token_ids = reservation, parked, token_ids or []
