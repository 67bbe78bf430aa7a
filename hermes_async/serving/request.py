"""A request: its prompt, its state, and the stream of its chunks."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from hermes_async.config import SamplingParams
from hermes_async.errors import DeadlineExceededError, HermesError, RequestError
from hermes_async.results import Chunk, FinishReason, Timings, Usage
from hermes_async.serving.speculation import AcceptanceRates, PromptLookup
from hermes_async.serving.text_stream import TextStream

if TYPE_CHECKING:  # these import torch, which only an open engine needs
    from torch import Tensor

    from hermes_async.modeling.sampling import Sampler
    from hermes_async.modeling.token_rules import TokenRules
    from hermes_async.serving.caches import Reservation
    from hermes_async.serving.session_kv import SessionKV


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model takes it.

    Attributes:
        token_ids: At least one. An image is as many of them as it becomes in the model. Of an encoder-decoder, what its
            decoder begins with.
        model_inputs: The model's further inputs, such as `pixel_values`; empty for a text. Of an encoder-decoder, those
            of its encoder.
        encoder_ids: The token ids of an encoder's input; empty where there is none, or it is audio.
        num_encoder_positions: The length of an encoder's input in the model; 0 where there is none.
        rules: Makes the rules for tokens from the most tokens of the sequence; None for those of the checkpoint.
        inputs_digest: Identifies the images, which token ids do not; empty for a text.
        image_end: Tokens up to the last one of an image; 0 for a text.
    """

    token_ids: list[int]
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs_digest: str = ""
    image_end: int = 0
    encoder_ids: tuple[int, ...] = ()
    num_encoder_positions: int = 0
    rules: Callable[[int], TokenRules] | None = None


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt that was checked against the model.

    Attributes:
        token_ids: At least one.
        capacity: The most tokens of the sequence, prompt and answer together.
        text_stream: None without a tokenizer.
        lookup: Drafts tokens from the sequence itself; None if prompt lookup is off.
        acceptance: How often drafted tokens of this request were right.
        model_inputs, inputs_digest, image_end: As `EncodedPrompt`. Keys and values can be used again only where
            `inputs_digest` is the same, and only if at least `image_end` tokens are.
        in_turns: The request has calls of its own, with transformers' cache. Otherwise it has a place in a packed row.
        encoder_ids, num_encoder_positions: As `EncodedPrompt`.
        input_bytes: Of the cache, what the encoder's input takes.
    """

    token_ids: list[int]
    capacity: int
    sampler: Sampler
    text_stream: TextStream | None
    lookup: PromptLookup | None
    acceptance: AcceptanceRates
    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs_digest: str = ""
    image_end: int = 0
    in_turns: bool = False
    encoder_ids: tuple[int, ...] = ()
    num_encoder_positions: int = 0
    input_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """The tokens of the user's prompt."""
        return len(self.encoder_ids) or len(self.token_ids)


class RequestState(enum.Enum):
    """Where a request is. `Request.enter` makes every transition.

    The usual order is WAITING, RUNNING, ENDED. RESTORING comes before RUNNING if a session's KV is read from disk.
    LEAVING comes before ENDED if the request is aborted while a thread uses its KV.
    """

    WAITING = "waiting"
    RESTORING = "restoring"
    RUNNING = "running"
    LEAVING = "leaving"
    ENDED = "ended"


_TRANSITIONS = {
    RequestState.WAITING: {RequestState.RESTORING, RequestState.RUNNING, RequestState.ENDED},
    RequestState.RESTORING: {RequestState.RUNNING, RequestState.ENDED},
    RequestState.RUNNING: {RequestState.LEAVING, RequestState.ENDED},
    RequestState.LEAVING: {RequestState.ENDED},
    RequestState.ENDED: set[RequestState](),
}


@dataclass(eq=False)
class Request:
    """One request inside the engine. Event-loop side only, except that the compute thread reads it.

    Attributes:
        max_buffered: Unread chunks at which the request pauses.
        session: The session whose turn this is.
        token_ids: The prompt, then the generated tokens.
        reservation: Its KV; None while it waits, and after it ended.
        told_paused: "paused" was the last such event, so "resumed" must follow.
        error: Why it ended early.
        released: Set when the request has ended and its KV is free.
    """

    request_id: str
    prepared: PreparedPrompt
    params: SamplingParams
    max_buffered: int
    created_at: float
    session: SessionKV | None = None
    state: RequestState = RequestState.WAITING
    send: MemoryObjectSendStream[Chunk] = field(init=False)
    receive: MemoryObjectReceiveStream[Chunk] = field(init=False)
    token_ids: list[int] = field(init=False)
    reservation: Reservation | None = None
    told_paused: bool = False
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
        # One place more than pauses the request: so there is always room for the last chunk.
        self.send, self.receive = anyio.create_memory_object_stream[Chunk](self.max_buffered + 1)

    def enter(self, state: RequestState) -> None:
        """Makes a transition."""
        assert state in _TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state

    @property
    def aborted(self) -> bool:
        """Nobody wants the rest, and a thread may still use the KV."""
        return self.state is RequestState.LEAVING

    @property
    def ended(self) -> bool:
        return self.state is RequestState.ENDED

    @property
    def num_computed(self) -> int:
        """The first tokens of the sequence whose keys and values, or other state, are there."""
        assert self.reservation is not None
        return self.reservation.length

    @property
    def num_to_encode(self) -> int:
        """Positions of an encoder's input that the next call computes; 0 if they are computed, or there are none."""
        return 0 if self.num_computed else self.prepared.num_encoder_positions

    @property
    def paused(self) -> bool:
        """The user has left `max_buffered` chunks unread."""
        return self.send.statistics().current_buffer_used >= self.max_buffered

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prepared.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that the request may still generate."""
        left = self.prepared.capacity - len(self.token_ids)
        return left if self.params.max_tokens is None else min(left, self.params.max_tokens - self.num_output_tokens)

    def usage(self) -> Usage:
        return Usage(self.prepared.num_tokens, self.num_output_tokens, self.num_reused)

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
    """Checks the deadline that a user gave.

    Raises:
        RequestError: The deadline is not a time.
        DeadlineExceededError: The deadline has passed.
    """
    if deadline is None:
        return
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not math.isfinite(deadline):
        raise RequestError(f"deadline must be a time on anyio.current_time()'s clock or None, not {deadline!r}")
    late = anyio.current_time() - deadline
    if late >= 0:
        raise DeadlineExceededError(
            f"the deadline was {late:.3f} s ago; it is a time on the event loop's clock: anyio.current_time() + seconds"
        )
