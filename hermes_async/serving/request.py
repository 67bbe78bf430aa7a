"""A request: what its user sees of it, and what the engine keeps about it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from hermes_async.config import SamplingParams
from hermes_async.errors import DeadlineExceededError, HermesError, RequestError
from hermes_async.results import Chunk, FinishReason, Timings, Usage
from hermes_async.serving.speculation import AcceptanceRates, PromptLookup
from hermes_async.serving.text_stream import TextStream

if TYPE_CHECKING:  # what imports torch, only where it is used
    from hermes_async.modeling.kv_cache import SequenceKV
    from hermes_async.modeling.sampling import Sampler
    from hermes_async.serving.kv_blocks import Reservation
    from hermes_async.serving.session_kv import SessionKV


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt that was checked against the model.

    Attributes:
        token_ids: At least one.
        capacity: Most tokens that the sequence may come to have.
        text_stream: None without a tokenizer.
        lookup: Drafts from the sequence itself; None where that is switched off.
        acceptance: How often its drafts were right.
    """

    token_ids: list[int]
    capacity: int
    sampler: Sampler
    text_stream: TextStream | None
    lookup: PromptLookup | None
    acceptance: AcceptanceRates


@dataclass(eq=False)
class Request:
    """One request inside the engine.

    Attributes:
        max_buffered: Chunks that its user may leave untaken before it pauses.
        session: The chat session whose turn it is.
        token_ids: The prompt, then what was generated.
        reservation: Its KV; None while it waits.
        told_paused: The last event of its pauses was its beginning.
        aborted: Nobody wants the rest.
        error: Why it ended, if not by itself.
        released: Set when its KV was given back.
    """

    request_id: str
    prepared: PreparedPrompt
    params: SamplingParams
    max_buffered: int
    created_at: float
    session: SessionKV | None = None
    send: MemoryObjectSendStream[Chunk] = field(init=False)
    receive: MemoryObjectReceiveStream[Chunk] = field(init=False)
    token_ids: list[int] = field(init=False)
    reservation: Reservation | None = None
    told_paused: bool = False
    aborted: bool = False
    finish_reason: FinishReason | None = None
    error: HermesError | None = None
    released: anyio.Event = field(default_factory=anyio.Event)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0
    num_reused: int = 0
    num_sweeps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prepared.token_ids)
        # One more than pauses it, for the chunk that tells of its end.
        self.send, self.receive = anyio.create_memory_object_stream[Chunk](self.max_buffered + 1)

    @property
    def kv(self) -> SequenceKV:
        assert self.reservation is not None
        return self.reservation.kv

    @property
    def paused(self) -> bool:
        """Its user does not take what is there."""
        return self.send.statistics().current_buffer_used >= self.max_buffered

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prepared.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that it may still generate."""
        left = self.prepared.capacity - len(self.token_ids)
        return left if self.params.max_tokens is None else min(left, self.params.max_tokens - self.num_output_tokens)

    def usage(self) -> Usage:
        return Usage(len(self.prepared.token_ids), self.num_output_tokens, self.num_reused)

    def timings(self) -> Timings:
        finished_at = self.finished_at or time.perf_counter()
        after_first = self.num_output_tokens - 1
        decoding = finished_at - self.first_token_at
        return Timings(
            queued_s=max(0.0, (self.admitted_at or finished_at) - self.created_at),
            first_token_s=max(0.0, (self.first_token_at or finished_at) - self.created_at),
            total_s=max(0.0, finished_at - self.created_at),
            tokens_per_s=after_first / decoding if after_first > 0 and decoding > 0 else 0.0,
            sweeps=self.num_sweeps,
            drafted_tokens=self.num_drafted,
            accepted_tokens=self.num_accepted,
        )


def check_deadline(deadline: float | None) -> None:
    """Raises `RequestError` for what is no time, and `DeadlineExceededError` for one that has passed."""
    if deadline is None:
        return
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not math.isfinite(deadline):
        raise RequestError(f"deadline must be a time on anyio.current_time()'s clock or None, not {deadline!r}")
    late = anyio.current_time() - deadline
    if late >= 0:
        raise DeadlineExceededError(
            f"the deadline was {late:.3f} s ago; it is a time on the event loop's clock: anyio.current_time() + seconds"
        )
