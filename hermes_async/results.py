"""What users get back: chunks, completions, events, labels and statistics, as plain values."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from hermes_async.errors import HermesError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sweep adds to a request.

    Attributes:
        text: The new text. "" without a tokenizer, and while a character or a stop text may be incomplete.
        token_ids: The new tokens: one, and one for each draft that was right.
        finish_reason: "stop" (an end-of-sequence or stop token, or a stop text), "length" (`max_tokens` or the end of
            the context) or "abort"; None while the request goes on.
        logprobs: One entry for each token, if `SamplingParams.logprobs` asks for them.
        usage: The request's token counts; only in the last chunk.
        timings: The request's times; only in the last chunk.
        request_id: As given, or generated.
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
    """Token counts of a request.

    Attributes:
        cached_tokens: Prompt tokens whose keys and values came from another request or an earlier turn.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of a request.

    Attributes:
        queued_s: Seconds from the request to its admission.
        first_token_s: Seconds from the request to its first token.
        total_s: Seconds from the request to its end.
        tokens_per_s: The rate after the first token.
        sweeps: Sweeps that the request took part in.
        drafted_tokens: Tokens that were drafted and verified.
        accepted_tokens: Drafted tokens that were right.
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
class ToolCall:
    """A call of a tool that the model has written.

    Attributes:
        index: Its place among the calls of the answer.
        name: The function's name, as the model wrote it. It may not be one of the request's tools.
        arguments: A JSON object, as text. It may not follow the tool's schema.
    """

    index: int
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """New parts of an answer's message: a piece of its content, a piece of its reasoning, or a whole call of a tool."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One chosen token.

    Log-probabilities are of the model's own distribution, before bias, penalties and temperature, as in vLLM. They are
    None unless `SamplingParams.logprobs` is set.

    Attributes:
        token_id: The token.
        logprob: The token's log-probability.
        top_logprobs: Log-probabilities by token id: of the likeliest tokens, likeliest first, and of the chosen one.
    """

    token_id: int
    logprob: float | None
    top_logprobs: dict[int, float] | None


EventKind = Literal["queued", "admitted", "first_token", "paused", "resumed", "finished"]


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One step in the life of a request.

    Attributes:
        kind: "queued", "admitted" (it has its KV memory), "first_token", "paused" (its user does not take the chunks),
            "resumed" or "finished".
        at: Seconds on the clock of `time.perf_counter`.
        usage: Token counts so far.
        timings: Times so far.
        finish_reason: Set when it finished without an error.
        error: Set when it finished with an error.
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
        score: Its probability. Where labels do not exclude each other, each has a probability of its own.
    """

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document's score for a query.

    Attributes:
        index: The document's place in the list that was given.
        num_tokens: Tokens of the query and the document, as the model saw them.
    """

    index: int
    score: float
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """Sentence vectors.

    Attributes:
        vectors: [texts, out].
        num_tokens: Tokens of each text, as the model saw them, with its prompt and special tokens.
    """

    vectors: npt.NDArray[np.float32]
    num_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since the engine opened, in bytes, seconds or numbers.

    Attributes:
        bytes_read: Read from disk, including resident weights and embedding rows.
        bytes_read_by_kind: The same by kind: "resident weights" (a draft model's included), "streamed weights",
            "experts" (those that are read one by one) and "embedding rows". A kind that was never read is not in it.
        bytes_resident: Weights that stay in memory; of these, `bytes_lent` only until sequences need their memory.
        bytes_beside_budget: The most that was beside baseline and leases, with an automatic budget; 0 otherwise.
        bytes_in_use: Leased from the budget now: weights, ring, workspace and KV caches.
        peak_bytes_in_use: The most that was leased at any time.
        memory_budget: The most that may be leased.
        baseline_bytes: Resident memory of the process before any weight was read. The budget comes on top.
        process_peak_rss_bytes: The most resident memory that the process ever had (`process_peak_rss_bytes` in
            `memory/available.py` says when it is too high).
        sweeps: Passes over the weights.
        tokens_generated: Tokens of all requests.
        drafted_tokens: Tokens that were drafted and verified.
        accepted_tokens: Drafted tokens that were right.
        tokens_per_sweep: Tokens generated per sweep, on average.
        read_seconds: The sum over all loading agents, whose reads overlap.
        compute_seconds: Time in sweeps, without stalls.
        stall_seconds: Time that sweeps waited for a stage.
        loop_lag_ms: How late the event loop ran what was due, in the last minute in which the engine had work: "p50",
            "p99" and "max", in milliseconds. A timer was due every 50 ms; timers have a resolution of about 1 ms.
        expert_hits, expert_misses: Experts that were in memory, or on their way there, when a sweep asked for them,
            and those that had to be read.
        experts_read_ahead: Experts that were read before a sweep asked for them.
        num_experts: Experts of all layers that are read one by one; 0 if the model has none, or all are resident.
        num_experts_in_memory: Those of them that are in memory, or on their way there.
        expert_bytes: The memory that these take. The holder "experts" has what is set aside for them.
        num_running: Requests that have their KV memory, including paused ones.
        num_paused: Running requests whose user does not take the chunks.
        num_waiting: Requests that wait for memory or a place, or whose prompts are still being tokenized.
        num_sessions, num_parked: Open chat sessions, and those of them whose KV is on disk.
        num_parkings: The number of times that a session's KV was written to disk.
        num_forwards: Plain forward passes that wait or run.
        kv_bytes: Keys and values in memory, including kept prefixes.
        prefix_bytes: Kept prefixes that no request or session uses now.
        prefix_hits, prefix_tokens: Requests that found the beginning of their prompt in memory, and tokens of it.
        num_leases: Leases of all holders.
        num_free_buffers: Free buffers of the ring.
        holders: Leased bytes, by holder.
    """

    bytes_read: int
    bytes_read_by_kind: dict[str, int]
    bytes_resident: int
    bytes_lent: int
    bytes_beside_budget: int
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
    loop_lag_ms: dict[str, float]
    expert_hits: int
    expert_misses: int
    experts_read_ahead: int
    num_experts: int
    num_experts_in_memory: int
    expert_bytes: int
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

    @property
    def expert_hit_rate(self) -> float | None:
        """The share of the experts that sweeps asked for that were in memory; None if none was asked for."""
        asked = self.expert_hits + self.expert_misses
        return self.expert_hits / asked if asked else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


StageActivity = Literal["empty", "loading", "ready", "computing", "computed", "failed"]


@dataclass(frozen=True, slots=True)
class StageSnapshot:
    """One stage of the model at one moment.

    Attributes:
        label: The module's name in the model; "base" for the weights outside of all other stages.
        activity: "empty", "loading" (it is being read), "ready" (it is in memory), "computing", "computed" (it is about
            to be freed) or "failed" (it could not be read; the next sweep reads it again).
        resident: It stays in memory. Other stages are read again for every sweep.
        nbytes: The memory that it takes while it is not empty.
    """

    label: str
    activity: StageActivity
    resident: bool
    nbytes: int

    @property
    def in_memory(self) -> bool:
        """All of its weights are in memory."""
        return self.activity in ("ready", "computing", "computed")


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """Who has the bytes of the budget at one moment. All kinds and `free_bytes` together are `budget_bytes`.

    Attributes:
        weights_bytes: Leased for weights that stay in memory, whether they are loaded yet or not.
        ring_bytes: The buffers that the other weights stream through.
        expert_bytes: Set aside for experts that are read one by one, whether they are loaded yet or not.
        kv_bytes: Keys and values of requests and sessions, kept prefixes included.
        workspace_bytes: Activations of a sweep.
        other_bytes: A draft model with its keys and values.
        free_bytes: Not leased.
        kv_budget_bytes: The most that `kv_bytes` may become. What is unused of it counts as free.
    """

    budget_bytes: int
    weights_bytes: int
    ring_bytes: int
    expert_bytes: int
    kv_bytes: int
    workspace_bytes: int
    other_bytes: int
    free_bytes: int
    kv_budget_bytes: int


RequestActivity = Literal["preparing", "waiting", "restoring", "prefilling", "generating", "paused", "ending"]


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """One request at one moment.

    Attributes:
        activity: "preparing" (its prompt is being tokenized), "waiting" (for memory or a place), "restoring" (the KV of
            its session is read from disk), "prefilling", "generating", "paused" (its user does not take the chunks) or
            "ending" (it was aborted, and leaves at the next stage).
        prompt_tokens: 0 while it is being prepared.
        computed_tokens: Tokens of the prompt whose keys and values are there, those from other requests included.
        output_tokens: Tokens that were generated.
        max_output_tokens: The most that may be generated.
        in_session: It is a turn of a chat session.
    """

    request_id: str
    activity: RequestActivity
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    max_output_tokens: int
    in_session: bool


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What an engine does at one moment, for progress and live views. Rates are differences of two snapshots.

    Attributes:
        at: Seconds on the clock of `time.perf_counter`.
        engine: "open", "closed" or "failed".
        sweeping: A sweep is under way.
        sweep: The number of that sweep, or of the next one; the first has number 0.
        stage_idx: Index of the stage that the sweep has entered last; None before the first one.
        stages: All stages, in the order in which they are computed.
        requests: All requests that have not ended, in order of arrival; those that are being prepared come last.
        num_forwards: Plain forward passes that wait or run.
        num_sessions: Open chat sessions.
        tokens_generated: Tokens of all requests so far.
        prompt_tokens_computed: Prompt tokens that sweeps have computed so far.
        bytes_read: Read from disk so far.
        read_seconds: The sum over all loading agents, whose reads overlap.
        compute_seconds: Time in sweeps so far, without stalls.
        stall_seconds: Time that sweeps waited for a stage.
        expert_hits, expert_misses, num_experts, num_experts_in_memory: See `EngineStatistics`.
        bytes_per_sweep: Bytes of streamed stages that each sweep reads. Embedding rows and experts come on top.
        expert_bytes_per_sweep: Bytes of experts that the plan expects a sweep to read, with one token of each request
            that generates.
        disk_sweep_seconds: The time that the disk takes for `bytes_per_sweep`, at the speed that the plan was made for.
            No sweep can be shorter in the long run.
        disk_measured: That speed was measured on this machine; otherwise it is an estimate.
    """

    at: float
    engine: Literal["open", "closed", "failed"]
    sweeping: bool
    sweep: int
    stage_idx: int | None
    stages: tuple[StageSnapshot, ...]
    memory: MemorySnapshot
    requests: tuple[RequestSnapshot, ...]
    num_forwards: int
    num_sessions: int
    tokens_generated: int
    prompt_tokens_computed: int
    bytes_read: int
    read_seconds: float
    compute_seconds: float
    stall_seconds: float
    expert_hits: int
    expert_misses: int
    num_experts: int
    num_experts_in_memory: int
    bytes_per_sweep: int
    expert_bytes_per_sweep: int
    disk_sweep_seconds: float
    disk_measured: bool

    @property
    def resident_bytes(self) -> tuple[int, int]:
        """Bytes of the weights that stay in memory: those that are loaded, and all."""
        resident = [stage for stage in self.stages if stage.resident]
        return sum(stage.nbytes for stage in resident if stage.in_memory), sum(stage.nbytes for stage in resident)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
