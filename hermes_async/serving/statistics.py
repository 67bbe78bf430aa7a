"""The counts of an engine, gathered from its parts."""

from __future__ import annotations

from hermes_async.memory.available import process_peak_rss_bytes
from hermes_async.results import EngineStatistics
from hermes_async.serving.loop import ServingLoop


def engine_statistics(loop: ServingLoop) -> EngineStatistics:
    """Counts since the engine opened, also after it was closed. Reads no file: it runs on the event loop."""
    loaded, pipeline, blocks = loop.loaded, loop.loaded.pipeline, loop.loaded.blocks
    memory, admission, scheduler = loaded.memory(), loop.admission, loop.scheduler
    experts = pipeline.experts
    num_sweep_forwards = 0 if loop.sweep is None else len(loop.sweep.forwards)
    return EngineStatistics(
        bytes_read=pipeline.read_statistics.bytes_read,
        bytes_read_by_kind=dict(pipeline.read_statistics.bytes_by_kind),
        bytes_resident=loaded.planned.plan.resident_bytes + loaded.lending.lent_bytes,
        bytes_lent=loaded.lending.lent_bytes,
        bytes_beside_budget=loaded.planned.claim.most_unleased,
        bytes_in_use=memory.bytes_in_use,
        peak_bytes_in_use=memory.peak_bytes_in_use,
        memory_budget=memory.budget_bytes,
        baseline_bytes=loaded.planned.baseline_bytes,
        # Linux updates the peak only now and then, so it may be below the baseline.
        process_peak_rss_bytes=max(process_peak_rss_bytes(), loaded.planned.baseline_bytes),
        sweeps=pipeline.statistics.sweeps,
        tokens_generated=loop.num_tokens,
        drafted_tokens=loop.num_drafted,
        accepted_tokens=loop.num_accepted,
        tokens_per_sweep=loop.num_tokens / max(1, pipeline.statistics.sweeps),
        read_seconds=pipeline.read_statistics.seconds,
        compute_seconds=pipeline.statistics.compute_seconds,
        stall_seconds=pipeline.statistics.stall_seconds,
        loop_lag_ms=loop.lag.milliseconds(),
        expert_hits=experts.statistics.num_hits,
        expert_misses=experts.statistics.num_misses,
        experts_read_ahead=experts.statistics.num_read_ahead,
        num_experts=len(experts.experts),
        num_experts_in_memory=experts.num_loaded,
        expert_bytes=experts.loaded_bytes,
        num_running=len(scheduler.running) + admission.num_restoring,
        num_paused=len(scheduler.running) - scheduler.num_active,
        num_waiting=admission.num_waiting + loop.preparations.num_requests,
        num_sessions=admission.num_sessions,
        num_parked=admission.num_parked,
        num_parkings=admission.num_parkings,
        num_forwards=len(loop.forwards) + num_sweep_forwards,
        kv_bytes=loaded.kv_bytes,
        prefix_bytes=blocks.unused_prefix_bytes,
        prefix_hits=blocks.num_hits,
        prefix_tokens=blocks.num_hit_tokens,
        num_leases=memory.num_leases,
        num_free_buffers=loaded.buffers.statistics().num_free,
        holders=memory.holders,
    )
