"""A request: what its user sees of it, and what the engine keeps about it."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from hermes_async.config import SamplingParams
from hermes_async.errors import DeadlineExceededError, HermesError, RequestError

if TYPE_CHECKING:
    from hermes_async.engine.kv_blocks import Reservation
    from hermes_async.engine.prompt import PreparedPrompt
    from hermes_async.engine.session_kv import SessionKV
    from hermes_async.modeling.kv_cache import SequenceKV
    from hermes_async.modeling.sampled_token import SampledToken

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sweep adds to a request.

    Attributes:
        text: The text that is now certain; "" while a character or a stop text may be incomplete, or without tokenizer.
        token_ids: The new tokens: one, and as many more as drafts were right.
        finish_reason: "stop" (an end-of-sequence or stop token, or a stop text), "length" (`max_tokens` or the
            context's end) or "abort"; None while the request goes on.
        logprobs: One entry for each token, where `SamplingParams.logprobs` asks for them.
        usage: Tokens counted; with the last chunk.
        timings: What the request took; with the last chunk.
        request_id: The request's; as given, or made up.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[SampledToken, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of the completion.

    Attributes:
        cached_tokens: Of the prompt, those whose keys and values were there from another request or an earlier turn.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """What a request took.

    Attributes:
        queued_s: Seconds from the request to its admission.
        first_token_s: Seconds from the request to its first token.
        total_s: Seconds from the request to its end.
        tokens_per_s: After the first token.
        sweeps: That it took part in.
        drafted_tokens: Drafted for it and verified.
        accepted_tokens: Of those, the ones that were right.
    """

    queued_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float
    sweeps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[SampledToken, ...] = ()

    @classmethod
    async def collect(cls, chunks: AsyncIterable[Chunk]) -> Completion:
        """Takes all chunks of a request."""
        taken = [chunk async for chunk in chunks]
        last = taken[-1]
        assert last.finish_reason is not None and last.usage is not None and last.timings is not None
        return cls(
            request_id=last.request_id,
            text="".join(chunk.text for chunk in taken),
            token_ids=tuple(token_id for chunk in taken for token_id in chunk.token_ids),
            finish_reason=last.finish_reason,
            usage=last.usage,
            timings=last.timings,
            logprobs=tuple(sampled for chunk in taken for sampled in chunk.logprobs),
        )


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


def aborted_chunk(request_id: str, created_at: float) -> Chunk:
    """The only chunk of a request that was aborted before it was prepared."""
    waited = time.perf_counter() - created_at
    timings = Timings(queued_s=waited, first_token_s=waited, total_s=waited, tokens_per_s=0.0)
    return Chunk("", (), "abort", usage=Usage(0, 0), timings=timings, request_id=request_id)


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
