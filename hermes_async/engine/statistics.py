"""What an engine has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
