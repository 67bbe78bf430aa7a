"""The Layer Profiler: what each stage takes to load and to compute, what the disk gives, and which kernels are fast.

Stages are measured where they run: in an engine, by its own trace. It runs twice where memory allows: in the budget
that was asked for, and with all of the model in memory (or, if that was asked for, with most of it streamed), because
while a sweep waits for the disk its computations are slower too.

Source: Hermes (arXiv 2409.04249), section IV (Layer Profiler).
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import torch

from hermes_async.config import EngineConfig, SamplingParams
from hermes_async.engine.engine import Engine
from hermes_async.engine.opening import OpenedModel
from hermes_async.errors import MemoryBudgetError
from hermes_async.foreign_errors import ungrouped
from hermes_async.memory.available import automatic_budget
from hermes_async.modeling.inputs import example_inputs
from hermes_async.pipeload.trace import Event, Span, Timeline, Trace
from hermes_async.planning.plan import Plan
from hermes_async.planning.profile import Profile, StageProfile
from hermes_async.planning.speeds import DiskSpeed, read_seconds, without_noise
from hermes_async.profiler.machine import measure_disk, measure_kernels, widest_matrix
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.threads import run_in_thread

STAGE_TOKENS = (1, 4, 8, 16, 64, 256)
_REPEATS = 3  # sweeps of each number of tokens; the middle one counts
_QUICK_REPEATS = 9  # where no sweep reads
_QUICK_WARM_UPS = 3  # of them that do not count: threads and caches come to speed
_STREAMED_SHARE = 0.3  # of the weights: the budget in which streaming is measured, if all fits in what was asked for
_STALL_SHARE = 0.1  # of a sweep: one that waits longer for its weights takes as long as reading them
_MAX_SWEEP_SECONDS = 5.0  # of computing, past which no larger sweep is measured


async def measure(
    source: str | os.PathLike[str], memory_budget: int | str, config: EngineConfig, events: list[Event] | None = None
) -> Profile:
    """Measures a model on this machine: some sweeps, and some seconds more.

    Args:
        config: Sharing and drafting are left out.
        events: Takes what the engine's agents did.

    Raises:
        HermesError: As `Engine` on entering, and on running.

    Cancellation: ends within one stage, or one read.
    """
    checkpoint = await run_in_thread(Checkpoint.open, source)
    disk = await measure_disk(checkpoint, direct=config.direct_io)
    plainly = replace(config, share_prefixes=False, prompt_lookup=False, kernels="default")
    trace, events = Trace(), [] if events is None else events
    first = await _measure_engine(checkpoint.path, memory_budget, plainly, STAGE_TOKENS, trace, _Seen(events))
    second = await _measure_otherwise(first, replace(plainly, max_resident_layers=None), trace, _Seen(events))
    kernels = await run_in_thread(measure_kernels, widest_matrix(first.opened.skeleton.model))
    streamed = next((one for one in (first, second) if one is not None and one.plan.num_buffers), None)
    # Where nothing is waited for, computing is measured best.
    quiet = next((one for one in (first, second) if one is not None and not one.plan.num_buffers), first)
    read_share = None if streamed is None else streamed.read_share(without_noise(disk))
    layer_s, head_s = quiet.seconds_per_byte(head=False), quiet.seconds_per_byte(head=True)
    return Profile(
        memory_budget=first.plan.memory_budget,
        asked_for=asked(memory_budget, config),
        dtype=str(first.opened.skeleton.dtype).removeprefix("torch."),
        created_at=time.time(),
        stages=first.stages(),
        layer_s=layer_s,
        head_s=head_s or layer_s,
        sweep_s=quiet.seen.outside_s,
        handover_s=None if streamed is None else streamed.handover_s(layer_s, head_s),
        disk=disk,
        read_share=read_share or 1.0,
        kernels=kernels,
    )


def asked(memory_budget: int | str, config: EngineConfig) -> str:
    """What tells a profile from one that was measured otherwise."""
    return f"{memory_budget}, {config}"


# --- sweeps, by the engine's own trace ---


@dataclass(frozen=True, slots=True)
class _Measured:
    """An engine that ran, and what its traces show."""

    opened: OpenedModel
    seen: _Seen
    bytes_for_everything: int

    @property
    def plan(self) -> Plan:
        return self.opened.plan

    def stages(self) -> tuple[StageProfile, ...]:
        load_s, compute_s = self.seen.load_s, self.seen.compute_s
        return tuple(
            StageProfile(
                stage.name,
                stage.read_bytes,
                idx in self.plan.resident,
                idx in self.plan.head,
                statistics.median(load_s[stage.name]) if stage.name in load_s else 0.0,
                {count: seconds[stage.name] for count, seconds in compute_s.items() if stage.name in seconds},
            )
            for idx, stage in enumerate(self.plan.stages)
        )

    def seconds_per_byte(self, *, head: bool) -> dict[int, float]:
        """By tokens, of all stages that were measured with so many."""
        stages = [stage for stage in self.stages() if stage.head == head]
        seconds = {}
        for count in sorted({count for stage in stages for count in stage.compute_s}):
            known = [stage for stage in stages if count in stage.compute_s]
            seconds[count] = sum(stage.compute_s[count] for stage in known) / sum(stage.nbytes for stage in known)
        return seconds

    def handover_s(self, layer_s: dict[int, float], head_s: dict[int, float]) -> float:
        """What a streamed stage takes beside what computing it takes: binding it, and handing it over.

        Cores that have waited for the disk compute whatever comes next more slowly than in an engine that holds
        everything. So it is what streamed stages take longer than that, beyond what resident ones do beside them.
        """
        stages = self.stages()

        def longer_s(count: int, *, resident: bool) -> float:
            """The mean of such stages, with so many tokens; 0 where there are none."""
            differences = [
                stage.compute_s[count] - stage.nbytes * (head_s if stage.head else layer_s).get(count, 0.0)
                for stage in stages
                if stage.resident == resident and count in stage.compute_s
            ]
            return statistics.mean(differences or [0.0])

        counts = {count for stage in stages for count in stage.compute_s}
        bound_s = statistics.median(
            longer_s(count, resident=False) - longer_s(count, resident=True) for count in counts
        )
        gap_s = statistics.median(self.seen.gaps_s) if self.seen.gaps_s else 0.0
        return gap_s + max(0.0, bound_s)

    def read_share(self, disk: tuple[DiskSpeed, ...]) -> float | None:
        """How fast the engine reads, as a share of what the disk alone gave; None if it never waited for reads.

        Whole sweeps are long enough to tell what a disk gives that has its moods.
        """
        if not self.seen.read_s:
            return None
        agents = self.plan.num_loading_agents
        alone_s = sum(read_seconds(disk, stage.read_bytes, agents) for stage in self.plan.streamed) / agents
        return alone_s / statistics.median(self.seen.read_s)


async def _measure_engine(
    path: Path, memory_budget: int | str, config: EngineConfig, counts: Sequence[int], trace: Trace, seen: _Seen
) -> _Measured:
    async with Engine(path, memory_budget=memory_budget, config=config, trace=trace) as engine:
        running = engine._model().running
        await _measure_sweeps(engine, engine._opened_model(), trace, seen, counts)
        return _Measured(engine._opened_model(), seen, running.bytes_for_everything)


async def _measure_otherwise(first: _Measured, config: EngineConfig, trace: Trace, seen: _Seen) -> _Measured | None:
    """The same model with all of it in memory, if it was streamed and fits, or else the other way round."""
    plan = first.plan
    counts: Sequence[int] = STAGE_TOKENS
    if plan.num_buffers:
        budget = int(1.05 * first.bytes_for_everything)
        if budget > await run_in_thread(automatic_budget):
            return None
    else:
        budget, counts = max(plan.minimum_budget, int(_STREAMED_SHARE * plan.weight_bytes)), STAGE_TOKENS[:1]
    try:
        second = await _measure_engine(first.opened.checkpoint.path, budget, config, counts, trace, seen)
    except MemoryBudgetError:  # the options ask for more than that
        return None
    return second if bool(second.plan.num_buffers) != bool(plan.num_buffers) else None


@dataclass(slots=True)
class _Seen:
    """What the traces of all sweeps show so far.

    Attributes:
        compute_s: By tokens, and by stage.
        load_s: Every load of each stage; the resident ones were loaded when the engine opened.
        outside_s: By outputs.
        gaps_s: Behind every streamed stage of every sweep, until the next.
        read_s: Of every sweep that waited for its weights, and so took as long as reading them.
        events: All of them; what a row is called is told once.
    """

    events: list[Event]
    compute_s: dict[int, dict[str, float]] = field(default_factory=dict)
    load_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    outside_s: dict[int, float] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)

    def drain(self, trace: Trace) -> Timeline:
        events = trace.drain()
        self.events += events
        names = [event for event in self.events if event["ph"] == "M"]
        timeline = Timeline.of([*names, *(event for event in events if event["ph"] != "M")])
        for row, spans in timeline.rows.items():
            if row.startswith("loading agent"):
                for span in spans:
                    self.load_s[span.name].append(span.end - span.start)
        return timeline


async def _measure_sweeps(
    engine: Engine, opened: OpenedModel, trace: Trace, seen: _Seen, counts: Sequence[int]
) -> None:
    plan = opened.plan
    resident = {plan.stages[idx].name for idx in plan.resident} | {plan.partition.base.name or "base"}
    head = {plan.stages[idx].name for idx in plan.head}
    for num_tokens in _token_counts(opened, counts):
        if seen.compute_s and _too_long(seen, num_tokens):
            break
        repeats, warm_ups = (_REPEATS, 1) if plan.num_buffers else (_QUICK_REPEATS, _QUICK_WARM_UPS)
        decodes = _can_decode(opened, num_tokens, repeats)
        if decodes:
            await _decode(engine, num_tokens, repeats)
        else:
            warm_ups = 1
            for _ in range(1 + _REPEATS):
                await _run_sweep(engine, opened, num_tokens)
        sweeps = [_Sweep.of(span, seen_rows) for span, seen_rows in _sweeps(seen.drain(trace))][warm_ups:]
        names = {name for sweep in sweeps for name in sweep.stage_s if decodes or name not in head}
        seen.compute_s[num_tokens] = {
            name: statistics.median(sweep.stage_s[name] for sweep in sweeps if name in sweep.stage_s) for name in names
        }
        gaps_s = [gap for sweep in sweeps for name, gap in sweep.gaps_s if name not in resident]
        seen.gaps_s += gaps_s
        if decodes or not opened.skeleton.generates:
            seen.read_s += [sweep.seconds for sweep in sweeps if sweep.waited_s > _STALL_SHARE * sweep.seconds]
            per_stage = statistics.median(gaps_s) if gaps_s else 0.0
            outside_s = [
                sweep.outside_s - per_stage * sum(name not in resident for name in sweep.stage_s) for sweep in sweeps
            ]
            seen.outside_s[num_tokens if decodes else 1] = max(0.0, statistics.median(outside_s))


def _too_long(seen: _Seen, num_tokens: int) -> bool:
    count, seconds = max(seen.compute_s.items())
    return sum(seconds.values()) * num_tokens / count > _MAX_SWEEP_SECONDS


def _token_counts(opened: OpenedModel, counts: Sequence[int]) -> list[int]:
    """Those of `counts` that fit, and that the model runs on."""
    if opened.seen.tokens_per_image:
        return [opened.seen.tokens_per_image]
    most = min(opened.plan.max_prompt_tokens, opened.skeleton.context_length or counts[-1])
    if opened.skeleton.generates:  # one token follows
        kv, kv_bytes = opened.seen.kv, opened.plan.kv_bytes
        fits = [count for count in counts if kv.nbytes(count + 1) <= kv_bytes]
        most = min(most, max(fits, default=1), (opened.skeleton.context_length or most + 1) - 1)
    return sorted({max(count, opened.seen.least_tokens) for count in counts if count <= most})


def _can_decode(opened: OpenedModel, num_sessions: int, repeats: int) -> bool:
    """Whether so many sessions have a place, and memory for their few tokens."""
    plan, kv = opened.plan, opened.seen.kv
    if not opened.skeleton.generates or num_sessions > plan.max_sequences:
        return False
    context = opened.skeleton.context_length or 2 + repeats
    return context >= 2 + repeats and num_sessions * kv.nbytes(2 + repeats) <= plan.kv_bytes


async def _decode(engine: Engine, num_sessions: int, repeats: int) -> None:
    """Prompts of one token: each sweep has a token of each session."""
    params = SamplingParams(max_tokens=1 + repeats, temperature=0, ignore_eos=True)
    with ungrouped():
        async with anyio.create_task_group() as sessions:
            for _ in range(num_sessions):
                sessions.start_soon(engine.complete, [0], params)


async def _run_sweep(engine: Engine, opened: OpenedModel, num_tokens: int) -> None:
    if opened.skeleton.generates:
        await engine.complete([0] * num_tokens, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        return
    inputs = example_inputs(opened.skeleton.model)
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.zeros(1, num_tokens, dtype=torch.long)
    await engine.forward(**inputs)


def _sweeps(timeline: Timeline) -> Iterator[tuple[Span, list[Span]]]:
    """Each sweep, from its beginning to that of the next one, with what the inference agent did in it."""
    sweeps = timeline.rows.get("sweeps", [])
    inference = sorted(timeline.rows.get("inference agent", []), key=lambda span: span.start)
    ends = [*(span.start for span in sweeps[1:]), sweeps[-1].end] if sweeps else []
    for sweep, end in zip(sweeps, ends, strict=True):
        period = replace(sweep, end=max(end, sweep.end))
        yield period, [span for span in inference if sweep.start <= span.start < sweep.end]


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Where one sweep's time went.

    Attributes:
        seconds: From its beginning to that of the next one.
        waited_s: For weights.
        stage_s: Computing, by stage.
        gaps_s: Behind each stage until the next one, without what was waited for.
        outside_s: All the rest, the gaps counted in.
    """

    seconds: float
    waited_s: float
    stage_s: dict[str, float]
    gaps_s: list[tuple[str, float]]
    outside_s: float

    @classmethod
    def of(cls, period: Span, spans: Sequence[Span]) -> _Sweep:
        stage_s: dict[str, float] = {}
        gaps_s: list[tuple[str, float]] = []
        waited, waited_since_stage = 0.0, 0.0
        before: Span | None = None
        for span in spans:
            if span.name.startswith("wait for "):
                waited += span.end - span.start
                waited_since_stage += span.end - span.start
                continue
            if before is not None:
                gaps_s.append((before.name, max(0.0, span.start - before.end - waited_since_stage)))
            stage_s[span.name] = stage_s.get(span.name, 0.0) + span.end - span.start
            before, waited_since_stage = span, 0.0
        seconds = period.end - period.start
        return cls(seconds, waited, stage_s, gaps_s, seconds - waited - sum(stage_s.values()))
