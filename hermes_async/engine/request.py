"""A request: what its user sees of it, and what the engine keeps about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from hermes_async.config import SamplingParams
from hermes_async.engine.prompt import PreparedPrompt
from hermes_async.errors import HermesError
from hermes_async.modeling.kv_cache import SequenceKV
from hermes_async.modeling.sampling import SampledToken
from hermes_async.pipeload.governor import Lease

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sweep adds to a request.

    Attributes:
        text: The text that is now certain; "" while a character or a stop text may be incomplete, or without tokenizer.
        token_ids: The new tokens.
        finish_reason: "stop" (an end-of-sequence or stop token, or a stop text), "length" (`max_tokens` or the
            context's end) or "abort"; None while the request goes on.
        logprobs: One entry for each token, where `SamplingParams.logprobs` asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[SampledToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of the completion."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the request to its admission, its first token and its end; tokens/s after the first token."""

    queued_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


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


@dataclass(eq=False)
class Request:
    """One request inside the engine.

    Attributes:
        token_ids: The prompt, then what was generated.
        has_slot: It holds one of the places in a sweep.
        waiting: Around its wait for admission; cancelled when it ends.
        aborted: Nobody wants the rest.
        error: Why it ended, if not by itself.
        released: Set when its KV was given back.
    """

    request_id: str
    prepared: PreparedPrompt
    params: SamplingParams
    send: MemoryObjectSendStream[Chunk]
    receive: MemoryObjectReceiveStream[Chunk]
    created_at: float
    token_ids: list[int] = field(init=False)
    kv: SequenceKV | None = None
    lease: Lease | None = None
    has_slot: bool = False
    waiting: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    aborted: bool = False
    finish_reason: FinishReason | None = None
    error: HermesError | None = None
    released: anyio.Event = field(default_factory=anyio.Event)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prepared.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prepared.token_ids)

    @property
    def pending(self) -> Sequence[int]:
        """The tokens that no sweep has computed yet."""
        assert self.kv is not None
        return self.token_ids[self.kv.length :]

    def usage(self) -> Usage:
        return Usage(len(self.prepared.token_ids), self.num_output_tokens)

    def timings(self) -> Timings:
        after_first = self.num_output_tokens - 1
        decoding = self.finished_at - self.first_token_at
        return Timings(
            queued_s=max(0.0, self.admitted_at - self.created_at),
            first_token_s=max(0.0, self.first_token_at - self.created_at),
            total_s=max(0.0, self.finished_at - self.created_at),
            tokens_per_s=after_first / decoding if after_first > 0 and decoding > 0 else 0.0,
        )
