"""What a plan would do: seconds a sweep, time to the first token, tokens a second, and memory."""

from __future__ import annotations

from dataclasses import dataclass

from hermes_async.planning.plan import Plan
from hermes_async.planning.simulation import StageCost, sweep_seconds


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan would do with so many sessions at once.

    Attributes:
        num_sessions: Sessions that decode together: as many as were asked for, if there is KV memory for them. Of a
            model that does not generate, texts or images in one sweep.
        sweep_seconds: One sweep, when the ring has long been going round.
        read_seconds: What its reads take by themselves.
        compute_seconds: What it computes.
        first_token_seconds: From one request to an idle engine until its first token; without generating, its output.
        tokens_per_second: Of all sessions together; without generating, texts or images a second.
        peak_bytes: Of the budget, the most that is in use.
    """

    num_sessions: int
    sweep_seconds: float
    read_seconds: float
    compute_seconds: float
    first_token_seconds: float
    tokens_per_second: float
    peak_bytes: int


def predict(plan: Plan, *, num_sessions: int = 1, prompt_tokens: int = 64, new_tokens: int = 64) -> Prediction:
    """Predicts from the plan's `speeds`, by simulating its sweeps.

    Args:
        prompt_tokens: Of each session's prompt; of a model that does not generate, of each text or image.
        new_tokens: That each session generates.
    """
    kv_bytes = (prompt_tokens + new_tokens) * plan.kv_bytes_per_token
    if kv_bytes:
        num_sessions = max(1, min(num_sessions, plan.max_sequences, plan.kv_bytes // kv_bytes))
    else:
        num_sessions = max(1, min(num_sessions, plan.max_tokens_per_sweep // prompt_tokens))
    tokens, outputs, passes = (num_sessions, num_sessions, 1) if kv_bytes else (prompt_tokens, 0, num_sessions)
    sweep_s = steady_seconds(plan, num_tokens=tokens, num_outputs=outputs, num_passes=passes)
    read_s, compute_s = parts_of(plan, num_tokens=tokens, num_outputs=outputs, num_passes=passes)
    return Prediction(
        num_sessions=num_sessions,
        sweep_seconds=sweep_s,
        read_seconds=read_s,
        compute_seconds=compute_s,
        first_token_seconds=_first_token_seconds(plan, prompt_tokens, min(1, outputs)),
        tokens_per_second=num_sessions / sweep_s,
        peak_bytes=plan.resident_bytes + plan.ring_bytes + plan.workspace_bytes + num_sessions * kv_bytes,
    )


def _first_token_seconds(plan: Plan, prompt_tokens: int, num_outputs: int) -> float:
    chunk = min(prompt_tokens, plan.max_prompt_tokens)
    whole, rest = divmod(prompt_tokens, chunk)
    seconds = sum(sweeps_of(plan, num_tokens=chunk, num_outputs=num_outputs, num_sweeps=whole))
    return seconds + (sweeps_of(plan, num_tokens=rest, num_outputs=num_outputs, num_sweeps=1)[0] if rest else 0.0)


def steady_seconds(plan: Plan, *, num_tokens: int, num_outputs: int, num_passes: int = 1) -> float:
    """One sweep when the ring has long been going round: the mean of two, for a long one and a short may take turns."""
    sweeps = sweeps_of(plan, num_tokens=num_tokens, num_outputs=num_outputs, num_sweeps=3, num_passes=num_passes)
    return (sweeps[-2] + sweeps[-1]) / 2


def sweeps_of(plan: Plan, *, num_tokens: int, num_outputs: int, num_sweeps: int, num_passes: int = 1) -> list[float]:
    """Seconds of so many sweeps in a row, beginning with a full ring.

    Args:
        num_passes: Forward passes in each sweep, each with `num_tokens`; sequences that generate are one. A stage is
            handed over once for all of them.
    """
    speeds = plan.speeds
    layer_s, head_s = speeds.seconds_per_byte(num_tokens, num_outputs)
    costs = []
    for idx, stage in enumerate(plan.stages):
        streamed = idx not in plan.resident
        rate_s = 0.0 if idx in plan.looked_up else head_s if idx in plan.head else layer_s
        seconds = num_passes * stage.read_bytes * rate_s
        costs.append(StageCost(stage.read_bytes if streamed else 0, seconds + streamed * speeds.handover_seconds))
    return sweep_seconds(
        costs,
        num_agents=plan.num_loading_agents,
        num_buffers=plan.num_buffers,
        speeds=speeds,
        num_sweeps=num_sweeps,
        rest_s=speeds.outside_seconds(num_outputs),
    )


def parts_of(plan: Plan, *, num_tokens: int, num_outputs: int, num_passes: int = 1) -> tuple[float, float]:
    """What a sweep reads and what it computes, in seconds, each by itself."""
    speeds = plan.speeds
    agents = plan.num_loading_agents
    read_s = sum(speeds.read_seconds(stage.read_bytes, agents) for stage in plan.streamed) / agents
    head = sum(plan.stages[idx].read_bytes for idx in plan.head)
    layers = sum(stage.read_bytes for idx, stage in enumerate(plan.stages) if idx not in plan.looked_up) - head
    compute_s = speeds.compute_seconds(num_passes * layers, num_passes * head, num_tokens, num_outputs)
    return read_s, compute_s + len(plan.streamed) * speeds.handover_seconds
