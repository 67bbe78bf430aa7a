"""The cost model: from a plan to seconds and bytes. The planner compares plans by it; `predict` shows it to users."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hermes_async.pipeload.expert_policy import MOST_AHEAD
from hermes_async.planning.expert_use import ExpertSizes, all_expert_bytes
from hermes_async.planning.machine_speeds import interpolate, read_curve
from hermes_async.planning.plan import Plan


class ExpertSeconds(NamedTuple):
    """The experts that a sweep uses of a layer.

    Attributes:
        read_s: To read those that are not in memory.
        compute_s: To compute those that can be computed while others are read.
        last_s: To compute those that are read last.
        ahead_s: The part of `read_s` for what may be read before the sweep asks for it, at most.
    """

    read_s: float
    compute_s: float
    last_s: float
    ahead_s: float


class StageSeconds(NamedTuple):
    """One stage.

    Attributes:
        read_s: To read it; 0 if it is resident.
        compute_s: To compute it, with its handover.
        experts: What is read and computed within it, of each layer of experts.
    """

    read_s: float
    compute_s: float
    experts: tuple[ExpertSeconds, ...] = ()


def pipeline_seconds(
    stages: Sequence[StageSeconds], *, num_agents: int, num_buffers: int, num_sweeps: int, rest_s: float
) -> list[float]:
    """Seconds of each of `num_sweeps` sweeps in a row, the first of which begins with a full ring.

    The rules are those of `hermes_async.pipeload.pipeline`. Stages are read in order, sweep after sweep, each when a
    buffer is free. A stage is computed when it is loaded and the stage before it is done; then its buffer is free.
    Experts are read when a stage asks for them, before all stages.

    Args:
        rest_s: From the last stage of a sweep to the first stage of the next. Reads go on meanwhile.
    """
    reads_s = [stage.read_s for stage in stages if stage.read_s]
    # Agents that read at the same time fill their buffers together. On average, half of those buffers are empty. So the
    # model counts that many buffers less, and reads one stage after another.
    num_buffers = max(1, min(num_buffers, len(reads_s)) - (num_agents - 1) // 2)
    # With n buffers, a stage's buffer is next filled with the n-th streamed stage after it.
    next_reads_s = iter(reads_s[num_buffers:] + reads_s[:num_buffers])
    steps = [(stage, next(next_reads_s) if stage.read_s else 0.0) for stage in stages]
    loaded_at = deque([0.0] * num_buffers)  # when each stage in the ring is loaded, in order
    now = disk_free_at = 0.0
    seconds = []
    for _ in range(num_sweeps):
        started = now
        for stage, next_read_s in steps:
            if next_read_s:
                now = max(now, loaded_at.popleft())
            now += stage.compute_s
            for experts in stage.experts:
                ahead_s = min(experts.ahead_s, experts.read_s, max(0.0, now - disk_free_at))
                read_s = experts.read_s - ahead_s
                if read_s:  # what the disk was to read meanwhile comes later
                    loaded_at = deque(at + read_s if at > now else at for at in loaded_at)
                    disk_free_at = max(disk_free_at, now) + read_s
                now += max(experts.compute_s, read_s) + experts.last_s
            if next_read_s:
                disk_free_at = max(disk_free_at, now) + next_read_s
                loaded_at.append(disk_free_at)
        now += rest_s
        seconds.append(now - started)
    return seconds


def sweep_seconds(
    plan: Plan,
    *,
    num_tokens: int,
    num_outputs: int,
    num_sweeps: int,
    num_passes: int = 1,
    reads_all: bool = False,
) -> list[float]:
    """Seconds of each of `num_sweeps` sweeps in a row, the first of which begins with a full ring.

    They ask for no optional stages.

    Args:
        num_passes: Model calls in each sweep, each with `num_tokens`. All sequences that are packed are one call. A
            stage is handed over once for all calls.
        reads_all: Whether all experts that are not in memory are read, and not only those that are used.
    """
    machine, agents = plan.machine, plan.num_loading_agents
    layer_s, head_s = machine.seconds_per_byte(num_tokens, num_outputs)
    curve = read_curve(machine.disk, agents)
    sizes = {stage.read_bytes for stage in plan.streamed}
    read_s = {size: interpolate(curve, size) / agents for size in sizes}
    experts = _experts_by_stage(plan, num_tokens, num_passes, reads_all=reads_all)
    stages = []
    for idx, stage in enumerate(plan.stages):
        if stage.group is not None:
            continue
        byte_s = 0.0 if idx in plan.looked_up else head_s if idx in plan.head else layer_s
        compute_s = num_passes * stage.read_bytes * byte_s
        within = experts.get(idx, ())
        if idx in plan.resident:
            stages.append(StageSeconds(0.0, compute_s, within))
        else:
            stages.append(StageSeconds(read_s[stage.read_bytes], compute_s + machine.handover_seconds, within))
    return pipeline_seconds(
        stages,
        num_agents=agents,
        num_buffers=plan.num_buffers,
        num_sweeps=num_sweeps,
        rest_s=machine.outside_seconds(num_outputs) - _unused_seconds(plan, num_tokens, num_passes),
    )


def _experts_by_stage(
    plan: Plan, num_tokens: int, num_passes: int, *, reads_all: bool
) -> dict[int, tuple[ExpertSeconds, ...]]:
    """The experts that are read one by one, by the stage within which they are computed: the last one before them."""
    if not plan.partition.experts:
        return {}
    by_stage: dict[int, tuple[ExpertSeconds, ...]] = {}
    known: dict[ExpertSizes, ExpertSeconds] = {}  # layers that differ only in their position take as long
    is_read_ahead = False
    for layer in plan.expert_layers:
        key = replace(layer, position=is_read_ahead)
        use = plan.expert_use(layer, num_passes * num_tokens)
        num_read = layer.num_experts * (1 - plan.kept_share) if reads_all else use.num_read
        if key not in known:
            compute_s = _compute_seconds(plan, layer, num_tokens, num_passes)
            known[key] = _expert_seconds(
                plan, layer, num_used=use.num_used, num_read=num_read, compute_s=compute_s, is_ahead=is_read_ahead
            )
        idx = max(0, layer.position - 1)
        by_stage[idx] = (*by_stage.get(idx, ()), known[key])
        is_read_ahead = reads_all or use.is_nearly_all
    return by_stage


def _expert_seconds(
    plan: Plan, layer: ExpertSizes, *, num_used: float, num_read: float, compute_s: float, is_ahead: bool
) -> ExpertSeconds:
    """The experts of a layer.

    Args:
        compute_s: To compute all experts that are used.
        is_ahead: Whether reading begins before the sweep asks for any.
    """
    agents, machine = plan.num_loading_agents, plan.machine
    each_s = machine.read_seconds(layer.read_bytes, agents) / agents
    read_s = max(num_read * each_s, min(1.0, num_read) * machine.read_seconds(layer.read_bytes, 1))
    compute_s += num_used * machine.handover_seconds
    last_s = compute_s * min(1.0, min(agents, num_read) / num_used)
    return ExpertSeconds(read_s, compute_s - last_s, last_s, min(MOST_AHEAD, num_read) * each_s if is_ahead else 0.0)


def _compute_seconds(plan: Plan, layer: ExpertSizes, num_tokens: int, num_passes: int) -> float:
    """To compute the experts of a layer that are used. Each has only the tokens that are routed to it."""
    num_used = plan.expert_use(layer, num_tokens).num_used
    num_routed = num_tokens * (plan.num_experts_per_token or layer.num_experts)
    byte_s, _ = plan.machine.seconds_per_byte(max(1.0, num_routed / num_used), 0)
    return num_passes * num_used * layer.read_bytes * byte_s


def _unused_seconds(plan: Plan, num_tokens: int, num_passes: int) -> float:
    """What the stages of a plan are too long by that has all experts of a layer in its stage, but does not use all."""
    if plan.partition.experts:
        return 0.0
    layer_s, _ = plan.machine.seconds_per_byte(num_tokens, 0)
    all_s = (num_passes * layer.num_experts * layer.read_bytes * layer_s for layer in plan.expert_layers)
    return sum(all_s) - sum(_compute_seconds(plan, layer, num_tokens, num_passes) for layer in plan.expert_layers)


def steady_seconds(plan: Plan, *, num_tokens: int, num_outputs: int, num_passes: int = 1) -> float:
    """Seconds of one sweep after many others: the mean of two, because a long and a short sweep may alternate."""
    sweeps = sweep_seconds(plan, num_tokens=num_tokens, num_outputs=num_outputs, num_sweeps=3, num_passes=num_passes)
    return (sweeps[1] + sweeps[2]) / 2


def sessions_for_all_experts(plan: Plan) -> int | None:
    """The fewest sessions with which a sweep takes no longer if it reads all experts that are not in memory.

    None if there are no experts to read, or if `max_sequences` are too few.
    """
    if not plan.partition.experts or plan.cached_share == 1:
        return None

    def is_no_slower(num_sessions: int) -> bool:
        tokens, passes = (1, num_sessions) if plan.in_turns else (num_sessions, 1)
        all_s, asked_s = (
            sum(
                sweep_seconds(
                    plan, num_tokens=tokens, num_outputs=tokens, num_sweeps=3, num_passes=passes, reads_all=reads_all
                )[1:]
            )
            for reads_all in (True, False)
        )
        return all_s <= asked_s * (1 + 1e-9)

    counts = range(1, plan.max_sequences + 1)
    idx = bisect_left(counts, True, key=is_no_slower)
    return counts[idx] if idx < len(counts) else None


def generation_seconds(plan: Plan, num_sessions: int, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds until each of `num_sessions` that start together has generated `new_tokens`."""
    chunk = plan.tokens_by_outputs[min(num_sessions, len(plan.tokens_by_outputs)) - 1]
    num_chunks = max(1.0, num_sessions * prompt_tokens / chunk)
    chunk = min(chunk, num_sessions * prompt_tokens)
    if plan.in_turns:
        num_prompts = -(-chunk // prompt_tokens)
        prompt_s = steady_seconds(plan, num_tokens=chunk // num_prompts, num_outputs=1, num_passes=num_prompts)
        decode_s = steady_seconds(plan, num_tokens=1, num_outputs=1, num_passes=num_sessions)
    else:
        prompt_s = steady_seconds(plan, num_tokens=chunk, num_outputs=min(chunk, num_sessions))
        decode_s = steady_seconds(plan, num_tokens=num_sessions, num_outputs=num_sessions)
    return num_chunks * prompt_s + (new_tokens - 1) * decode_s


@dataclass(frozen=True, slots=True)
class Prediction:
    """The expected performance of a plan with some sessions at once.

    Attributes:
        num_sessions: Sessions that decode together: the given number, or as many as there is KV memory for. For a model
            that does not generate: texts or images in one sweep.
        sweep_seconds: One sweep after many others.
        read_seconds, compute_seconds: Parts of one sweep, which overlap.
        bytes_per_sweep: Bytes that one sweep reads, experts included, without embedding rows.
        expert_hit_rate: The share of the experts used by a sweep that are in memory; None if no experts are read.
        first_token_seconds: From a request to an idle engine until its first token or output.
        tokens_per_second: All sessions together. For a model that does not generate: texts or images a second.
        peak_bytes: The most bytes of the budget in use.
    """

    num_sessions: int
    sweep_seconds: float
    read_seconds: float
    compute_seconds: float
    first_token_seconds: float
    tokens_per_second: float
    peak_bytes: int
    bytes_per_sweep: int
    expert_hit_rate: float | None


def predict(plan: Plan, *, num_sessions: int = 1, prompt_tokens: int = 64, new_tokens: int = 64) -> Prediction:
    """Predicts the performance of a plan on the machine that it was made for.

    Args:
        prompt_tokens: Tokens of each session's prompt, or of each text or image if the model does not generate.
        new_tokens: Tokens that each session generates.
    """
    kv_bytes = (prompt_tokens + new_tokens) * plan.kv_bytes_per_token + plan.kv_bytes_per_sequence
    if plan.generates:
        num_sessions = max(1, min(num_sessions, plan.max_sequences, plan.kv_bytes // kv_bytes))
        tokens, outputs, passes = (1, 1, num_sessions) if plan.in_turns else (num_sessions, num_sessions, 1)
    else:
        num_sessions = max(1, min(num_sessions, plan.max_tokens_per_sweep // prompt_tokens))
        tokens, outputs, passes = prompt_tokens, 0, num_sessions
    sweep_s = steady_seconds(plan, num_tokens=tokens, num_outputs=outputs, num_passes=passes)
    resident = replace(
        plan, resident=frozenset(range(len(plan.stages))), expert_bytes=all_expert_bytes(plan.expert_layers)
    )
    (compute_s,) = sweep_seconds(resident, num_tokens=tokens, num_outputs=outputs, num_sweeps=1, num_passes=passes)
    expert_bytes = plan.expert_bytes_per_sweep(tokens * passes)
    experts = _experts_by_stage(plan, tokens, passes, reads_all=False)
    expert_read_s = sum(one.read_s for within in experts.values() for one in within)
    agents, chunk = plan.num_loading_agents, plan.max_prompt_tokens
    first_token_s = 0.0
    for num_tokens, count in ((chunk, prompt_tokens // chunk), (prompt_tokens % chunk, 1)):
        if num_tokens:
            sweeps = sweep_seconds(plan, num_tokens=num_tokens, num_outputs=min(1, outputs), num_sweeps=count)
            first_token_s += sum(sweeps)
    return Prediction(
        num_sessions=num_sessions,
        sweep_seconds=sweep_s,
        read_seconds=expert_read_s
        + sum(plan.machine.read_seconds(stage.read_bytes, agents) for stage in plan.streamed) / agents,
        compute_seconds=compute_s + len(plan.streamed) * plan.machine.handover_seconds,
        first_token_seconds=first_token_s,
        tokens_per_second=num_sessions / sweep_s,
        peak_bytes=plan.fixed_bytes + num_sessions * kv_bytes,
        bytes_per_sweep=plan.bytes_per_sweep + expert_bytes,
        expert_hit_rate=plan.expert_hit_rate(tokens * passes) if plan.partition.experts else None,
    )
