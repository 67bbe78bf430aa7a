"""What happens to requests, told as it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hermes_async.engine.request import FinishReason, Timings, Usage
from hermes_async.errors import HermesError

EventKind = Literal["queued", "admitted", "first_token", "paused", "resumed", "finished"]


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One step of a request's way.

    Attributes:
        kind: "queued", "admitted" (its KV is there), "first_token", "paused" (its user leaves chunks untaken),
            "resumed" or "finished".
        at: Seconds, on `time.perf_counter`'s clock.
        usage: Tokens so far.
        timings: Seconds, sweeps and drafts so far.
        finish_reason: With "finished", unless it ended with an error.
        error: With "finished", why it ended.
    """

    kind: EventKind
    request_id: str
    at: float
    usage: Usage
    timings: Timings
    finish_reason: FinishReason | None = None
    error: HermesError | None = None
