"""What an engine does at one moment, gathered from its parts."""

from __future__ import annotations

import time
from collections import Counter
from typing import Literal

from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.planning.plan import Plan
from hermes_async.results import (
    EngineSnapshot,
    MemorySnapshot,
    RequestActivity,
    RequestSnapshot,
    StageActivity,
    StageSnapshot,
)
from hermes_async.serving.loaded_model import (
    EXPERTS_HOLDER,
    RING_HOLDER,
    WEIGHTS_HOLDER,
    WORKSPACE_HOLDER,
    LoadedModel,
)
from hermes_async.serving.loop import ServingLoop
from hermes_async.serving.request import Request, RequestState

_ACTIVITIES: dict[StageState, StageActivity] = {
    StageState.EMPTY: "empty",
    StageState.LOADING: "loading",
    StageState.READY: "ready",
    StageState.SPENT: "computed",
}


def engine_snapshot(loop: ServingLoop, engine: Literal["open", "closed", "failed"]) -> EngineSnapshot:
    """The engine at this moment, also after it was closed. Reads no file: it runs on the event loop."""
    loaded, pipeline, plan = loop.loaded, loop.loaded.pipeline, loop.loaded.planned.plan
    computing, sweep, experts = pipeline.computing, loop.sweep, pipeline.experts
    requests = _request_snapshots(loop)
    num_generating = sum(request.activity == "generating" for request in requests)
    return EngineSnapshot(
        at=time.perf_counter(),
        engine=engine,
        sweeping=sweep is not None,
        sweep=pipeline.statistics.sweeps,
        stage_idx=pipeline.load_order.entered_idx,
        stages=tuple(_stage_snapshot(stage, computing) for stage in pipeline.stages),
        memory=_memory_snapshot(loaded),
        requests=requests,
        num_forwards=len(loop.forwards) + (0 if sweep is None else len(sweep.forwards)),
        num_sessions=loop.admission.num_sessions,
        tokens_generated=loop.num_tokens,
        prompt_tokens_computed=loop.num_prompt_tokens,
        bytes_read=pipeline.read_statistics.bytes_read,
        read_seconds=pipeline.read_statistics.seconds,
        compute_seconds=pipeline.statistics.compute_seconds,
        stall_seconds=pipeline.statistics.stall_seconds,
        expert_hits=experts.statistics.num_hits,
        expert_misses=experts.statistics.num_misses,
        num_experts=len(experts.experts),
        num_experts_in_memory=experts.num_loaded,
        bytes_per_sweep=plan.bytes_per_sweep,
        expert_bytes_per_sweep=plan.expert_bytes_per_sweep(max(1, min(num_generating, plan.max_sequences))),
        disk_sweep_seconds=_disk_sweep_seconds(plan),
        disk_measured=plan.machine.measured,
    )


def _stage_snapshot(stage: Stage, computing: Stage | None) -> StageSnapshot:
    activity: StageActivity = "computing" if stage is computing else _ACTIVITIES[stage.state]
    if stage.error is not None:
        activity = "failed"
    return StageSnapshot(stage.label, activity, stage.resident, stage.layout.slot_bytes)


def _memory_snapshot(loaded: LoadedModel) -> MemorySnapshot:
    memory, kv_budget_bytes, lent_bytes = loaded.memory(), loaded.kv_memory.budget_bytes, loaded.lending.lent_bytes
    weights, ring, experts, workspace = (
        memory.holders.get(holder, 0) for holder in (WEIGHTS_HOLDER, RING_HOLDER, EXPERTS_HOLDER, WORKSPACE_HOLDER)
    )
    return MemorySnapshot(
        budget_bytes=memory.budget_bytes,
        weights_bytes=weights + lent_bytes,
        ring_bytes=ring,
        expert_bytes=experts,
        kv_bytes=loaded.kv_bytes,
        workspace_bytes=workspace,
        other_bytes=memory.bytes_in_use - weights - lent_bytes - ring - experts - workspace - loaded.kv_bytes,
        free_bytes=memory.budget_bytes - memory.bytes_in_use,
        kv_budget_bytes=kv_budget_bytes,
    )


def _request_snapshots(loop: ServingLoop) -> tuple[RequestSnapshot, ...]:
    prepared = [_request_snapshot(request) for request in loop.requests.values()]
    preparing = [
        RequestSnapshot(
            request_id,
            "preparing",
            prompt_tokens=0,
            computed_tokens=0,
            output_tokens=0,
            max_output_tokens=0,
            in_session=False,
        )
        for request_id in sorted(loop.preparations.request_ids)
    ]
    return (*prepared, *preparing)


def _request_snapshot(request: Request) -> RequestSnapshot:
    num_prompt, reservation = len(request.prepared.token_ids), request.reservation
    computed = 0 if reservation is None else min(num_prompt, reservation.length)
    return RequestSnapshot(
        request.request_id,
        _request_activity(request),
        prompt_tokens=num_prompt,
        computed_tokens=computed,
        output_tokens=request.num_output_tokens,
        max_output_tokens=request.num_output_tokens + request.num_left,
        in_session=request.session is not None,
    )


def _request_activity(request: Request) -> RequestActivity:
    if request.state is RequestState.WAITING:
        return "waiting"
    if request.state is RequestState.RESTORING:
        return "restoring"
    if request.state is not RequestState.RUNNING:
        return "ending"
    if request.paused:
        return "paused"
    return "generating" if request.num_output_tokens else "prefilling"


def _disk_sweep_seconds(plan: Plan) -> float:
    """The time to read the streamed stages at the plan's speed."""
    sizes, agents = Counter(stage.read_bytes for stage in plan.streamed), plan.num_loading_agents
    return sum(count * plan.machine.read_seconds(nbytes, agents) / agents for nbytes, count in sizes.items())
