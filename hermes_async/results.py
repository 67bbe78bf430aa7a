"""What users get back: chunks, completions, events, labels, statistics. Plain values: no torch, no transformers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hermes_async.errors import HermesError

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


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One chosen token.

    Log-probabilities are of the model's own distribution, before bias, penalties and temperature (as vLLM's
    default), and are there only where `SamplingParams.logprobs` is not None.

    Attributes:
        token_id: The token.
        logprob: The token's log-probability.
        top_logprobs: The `logprobs` likeliest tokens, likeliest first, and the chosen one, by token id.
    """

    token_id: int
    logprob: float | None
    top_logprobs: dict[int, float] | None


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


@dataclass(frozen=True, slots=True)
class Label:
    """One of a classifier's labels.

    Attributes:
        score: Its probability; of a classifier whose labels do not exclude each other, each on its own.
    """

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since the engine opened; bytes and seconds.

    Attributes:
        bytes_read: From disk, resident weights and embedding rows included.
        bytes_resident: Weights that stay in memory.
        bytes_in_use: Leased from the budget now: weights, ring, workspace, KV caches.
        peak_bytes_in_use: The most that was ever leased.
        memory_budget: What may be leased.
        baseline_bytes: Resident memory of the process before any weight was read; the budget comes on top.
        process_peak_rss_bytes: The most resident memory this process ever had.
        sweeps: Passes over the weights.
        tokens_generated: By all requests.
        drafted_tokens: Drafted and verified.
        accepted_tokens: Of those, the ones that were right.
        tokens_per_sweep: Generated, on average.
        read_seconds: Of all loading agents together; they overlap.
        compute_seconds: Of sweeps, without stalls.
        stall_seconds: That sweeps waited for a stage to be read.
        num_running: Requests that have their KV, paused ones included.
        num_paused: Of these, the ones whose user does not take what is there.
        num_waiting: Requests that wait for memory or a place, or whose prompts are still being tokenized.
        num_sessions: Chat sessions that are open.
        num_parked: Of these, the ones whose KV is on disk.
        num_parkings: How often one was written there.
        num_forwards: Plain forward passes that wait or run.
        kv_bytes: Keys and values in memory, kept prefixes included.
        prefix_bytes: Of these, prefixes that no request or session uses now, kept while there is room.
        prefix_hits: Requests that began with a prefix that was there.
        prefix_tokens: Tokens that these did not compute.
        num_leases: Leases out, by anyone.
        num_free_buffers: Of the ring.
        holders: Bytes leased, by holder.
    """

    bytes_read: int
    bytes_resident: int
    bytes_in_use: int
    peak_bytes_in_use: int
    memory_budget: int
    baseline_bytes: int
    process_peak_rss_bytes: int
    sweeps: int
    tokens_generated: int
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_sweep: float
    read_seconds: float
    compute_seconds: float
    stall_seconds: float
    num_running: int
    num_paused: int
    num_waiting: int
    num_sessions: int
    num_parked: int
    num_parkings: int
    num_forwards: int
    kv_bytes: int
    prefix_bytes: int
    prefix_hits: int
    prefix_tokens: int
    num_leases: int
    num_free_buffers: int
    holders: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def aborted_chunk(request_id: str, created_at: float) -> Chunk:
    """The only chunk of a request that was aborted before it was prepared."""
    waited = time.perf_counter() - created_at
    timings = Timings(queued_s=waited, first_token_s=waited, total_s=waited, tokens_per_s=0.0)
    return Chunk("", (), "abort", usage=Usage(0, 0), timings=timings, request_id=request_id)
