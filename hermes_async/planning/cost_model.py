"""The cost model: from a plan to seconds and bytes. The planner compares plans by it; `predict` shows it to users."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hermes_async.planning.machine_speeds import interpolate, read_curve
from hermes_async.planning.plan import Plan


def pipeline_seconds(
    stages: Sequence[tuple[float, float]], *, num_agents: int, num_buffers: int, num_sweeps: int, rest_s: float
) -> list[float]:
    """Seconds of each of `num_sweeps` sweeps in a row, the first of which begins with a full ring.

    The rules are those of `hermes_async.pipeload.pipeline`. Stages are read in order, sweep after sweep, each when a
    buffer is free. A stage is computed when it is loaded and the stage before it is done; then its buffer is free.

    Args:
        stages: Seconds to read each stage, 0 if it is resident; and to compute it, with its handover.
        rest_s: From the last stage of a sweep to the first stage of the next. Reads go on meanwhile.
    """
    reads_s = [read_s for read_s, _ in stages if read_s]
    # Agents that read at the same time fill their buffers together. On average, half of those buffers are empty. So the
    # model counts that many buffers less, and reads one stage after another.
    num_buffers = max(1, min(num_buffers, len(reads_s)) - (num_agents - 1) // 2)
    # With n buffers, a stage's buffer is next filled with the n-th streamed stage after it.
    next_reads_s = iter(reads_s[num_buffers:] + reads_s[:num_buffers])
    steps = [(compute_s, next(next_reads_s) if read_s else 0.0) for read_s, compute_s in stages]
    loaded_at = deque([0.0] * num_buffers)  # when each stage in the ring is loaded, in order
    now = disk_free_at = 0.0
    seconds = []
    for _ in range(num_sweeps):
        started = now
        for compute_s, next_read_s in steps:
            if not next_read_s:
                now += compute_s
                continue
            now = max(now, loaded_at.popleft()) + compute_s
            disk_free_at = max(disk_free_at, now) + next_read_s
            loaded_at.append(disk_free_at)
        now += rest_s
        seconds.append(now - started)
    return seconds


def sweep_seconds(
    plan: Plan, *, num_tokens: int, num_outputs: int, num_sweeps: int, num_passes: int = 1
) -> list[float]:
    """Seconds of each of `num_sweeps` sweeps in a row, the first of which begins with a full ring.

    They ask for no optional stages.

    Args:
        num_passes: Model calls in each sweep, each with `num_tokens`. All sequences that are packed are one call. A
            stage is handed over once for all calls.
    """
    machine, agents = plan.machine, plan.num_loading_agents
    layer_s, head_s = machine.seconds_per_byte(num_tokens, num_outputs)
    curve = read_curve(machine.disk, agents)
    sizes = {stage.read_bytes for stage in plan.streamed}
    read_s = {size: interpolate(curve, size) / agents for size in sizes}
    stages = []
    for idx, stage in enumerate(plan.stages):
        if stage.group is not None:
            continue
        byte_s = 0.0 if idx in plan.looked_up else head_s if idx in plan.head else layer_s
        compute_s = num_passes * stage.read_bytes * byte_s
        if idx in plan.resident:
            stages.append((0.0, compute_s))
        else:
            stages.append((read_s[stage.read_bytes], compute_s + machine.handover_seconds))
    return pipeline_seconds(
        stages,
        num_agents=agents,
        num_buffers=plan.num_buffers,
        num_sweeps=num_sweeps,
        rest_s=machine.outside_seconds(num_outputs),
    )


def steady_seconds(plan: Plan, *, num_tokens: int, num_outputs: int, num_passes: int = 1) -> float:
    """Seconds of one sweep after many others: the mean of two, because a long and a short sweep may alternate."""
    sweeps = sweep_seconds(plan, num_tokens=num_tokens, num_outputs=num_outputs, num_sweeps=3, num_passes=num_passes)
    return (sweeps[1] + sweeps[2]) / 2


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
    resident = replace(plan, resident=frozenset(range(len(plan.stages))))
    (compute_s,) = sweep_seconds(resident, num_tokens=tokens, num_outputs=outputs, num_sweeps=1, num_passes=passes)
    agents, chunk = plan.num_loading_agents, plan.max_prompt_tokens
    first_token_s = 0.0
    for num_tokens, count in ((chunk, prompt_tokens // chunk), (prompt_tokens % chunk, 1)):
        if num_tokens:
            sweeps = sweep_seconds(plan, num_tokens=num_tokens, num_outputs=min(1, outputs), num_sweeps=count)
            first_token_s += sum(sweeps)
    return Prediction(
        num_sessions=num_sessions,
        sweep_seconds=sweep_s,
        read_seconds=sum(plan.machine.read_seconds(stage.read_bytes, agents) for stage in plan.streamed) / agents,
        compute_seconds=compute_s + len(plan.streamed) * plan.machine.handover_seconds,
        first_token_seconds=first_token_s,
        tokens_per_second=num_sessions / sweep_s,
        peak_bytes=plan.resident_bytes + plan.ring_bytes + plan.workspace_bytes + num_sessions * kv_bytes,
    )
