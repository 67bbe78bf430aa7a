"""The Layer Profiler: measures the loading and computing of each stage, the disk, and the kernels.

Stages are measured in an engine, from its trace. If memory allows, a second engine keeps the whole model resident,
because computing is slower while a sweep waits for the disk. If the whole model fits in the given budget, the second
engine streams it.

Source: Hermes (arXiv 2409.04249), section IV (Layer Profiler).
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import anyio
import torch

from hermes_async.config import EngineConfig, SamplingParams
from hermes_async.engine.engine import Engine
from hermes_async.engine.opening import OpenedModel
from hermes_async.errors import MemoryBudgetError, RequestError
from hermes_async.foreign_errors import ungrouped
from hermes_async.memory.available import automatic_budget
from hermes_async.modeling.inputs import example_inputs
from hermes_async.pipeload.trace import Event, Timeline, Trace
from hermes_async.planning.expert_use import measured_uses
from hermes_async.planning.machine_speeds import DiskRate, interpolate, read_curve, without_noise
from hermes_async.planning.plan import Plan
from hermes_async.planning.profile import Profile, StageProfile
from hermes_async.profiler.machine import measure_disk, measure_kernels, widest_matrix
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.threads import run_in_thread

STAGE_TOKENS = (1, 4, 8, 16, 64, 256)
_STREAMED_REPEATS = (3, 1)  # for each number of tokens: sweeps of which the median counts, and sweeps to warm up
_RESIDENT_REPEATS = (9, 3)
_STREAMED_SHARE = 0.3  # the budget of a second engine that streams, as a share of the weights
_RESIDENT_SHARE = 1.5  # the budget of a second engine that does not, as a share of weights, KV and workspace
_WAITING_SHARE = 0.1  # a sweep that waits for weights for more than this share takes as long as its reads
_ROUTED_PROMPT = "It was"  # of a text whose tokens are routed
_ROUTED_TOKENS = 64
_MAX_SWEEP_SECONDS = 5.0  # no sweep is measured that would compute for longer


async def measure(
    source: str | os.PathLike[str], memory_budget: int | str, config: EngineConfig, events: list[Event] | None = None
) -> Profile:
    """Measures a model on this machine: some sweeps, and some seconds more.

    Args:
        config: Options of the engine. Prefix sharing and prompt lookup have no effect, and "fastest" measures as
            "auto".
        events: Gets the events of the engines' traces.

    Raises:
        HermesError: As `Engine` and its `generate`.

    Cancellation: ends within one stage, or one read.
    """
    checkpoint = await run_in_thread(Checkpoint.open, source)
    disk = await measure_disk(checkpoint, direct=config.direct_io)
    # Torch's own kernels are measured apart, and compared with what the engine does without them.
    kernels = "transformers" if config.kernels == "transformers" else "auto"
    plain = replace(config, share_prefixes=False, prompt_lookup=False, kernels=kernels)
    trace, events = Trace(), [] if events is None else events
    async with Engine(checkpoint.path, memory_budget=memory_budget, config=plain, trace=trace) as engine:
        first = await _measure_sweeps(engine, STAGE_TOKENS, trace, events)
    second = await _measure_second(first, replace(plain, max_resident_layers=None), trace, events)
    measured_kernels = await run_in_thread(
        measure_kernels, widest_matrix(first.opened.skeleton.model), first.opened.products
    )
    engines = [first] if second is None else [first, second]
    streamed = next((one for one in engines if one.plan.reads_weights), None)
    resident = next((one for one in engines if not one.plan.reads_weights), first)
    if streamed is not None and streamed.plan.experts:  # with all in memory, nobody sees which experts are computed
        resident = streamed
    layer_s, head_s = resident.seconds_per_byte(head=False), resident.seconds_per_byte(head=True)
    return Profile(
        memory_budget=first.plan.memory_budget,
        asked_for=asked(memory_budget, config),
        dtype=str(first.opened.skeleton.dtype).removeprefix("torch."),
        created_at=time.time(),
        stages=first.stages(),
        layer_s=layer_s,
        head_s=head_s or layer_s,
        sweep_s=resident.outside_s,
        handover_s=None if streamed is None else streamed.handover_s(layer_s, head_s),
        disk=disk,
        read_share=1.0 if streamed is None else streamed.read_share(without_noise(disk)),
        kernels=measured_kernels,
        expert_uses=resident.expert_uses,
    )


def asked(memory_budget: int | str, config: EngineConfig) -> str:
    """The settings by which the profiles of one model differ."""
    return f"{memory_budget}, {config}"


async def _measure_second(
    first: _Measurement, config: EngineConfig, trace: Trace, events: list[Event]
) -> _Measurement | None:
    """Measures the model fully resident if the first engine streamed it, else streamed.

    None if that is impossible, or of no use because the first engine measured experts.
    """
    plan = first.plan
    if plan.experts:
        return None
    counts: Sequence[int] = STAGE_TOKENS
    if plan.reads_weights:
        budget = int(_RESIDENT_SHARE * (plan.weight_bytes + plan.kv_bytes + plan.workspace_bytes))
        budget = min(budget, await run_in_thread(automatic_budget))
    else:
        budget = max(plan.minimum_budget, int(_STREAMED_SHARE * plan.weight_bytes))
        counts = counts if plan.expert_layers else counts[:1]
    if budget < plan.minimum_budget:
        return None
    try:
        async with Engine(first.opened.checkpoint.path, memory_budget=budget, config=config, trace=trace) as engine:
            if engine.plan.reads_weights == plan.reads_weights:
                return None
            return await _measure_sweeps(engine, counts, trace, events)
    except MemoryBudgetError:  # the options need a larger budget
        return None


# --- traces ---


@dataclass(slots=True)
class _Measurement:
    """Times from the traces of one engine.

    Attributes:
        compute_s: By tokens, then by stage.
        load_s: Every load, by stage; resident stages were loaded when the engine opened.
        outside_s: Outside of the stages of a sweep, by outputs.
        gaps_s: From each streamed stage to the next stage.
        read_s: Each sweep that took as long as its reads.
        expert_uses: See `MachineSpeeds`; empty if no experts are read one by one.
    """

    opened: OpenedModel
    compute_s: dict[int, dict[str, float]] = field(default_factory=dict)
    load_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    outside_s: dict[int, float] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)
    expert_uses: tuple[float, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.opened.plan

    def stages(self) -> tuple[StageProfile, ...]:
        return tuple(
            StageProfile(
                name=stage.name,
                nbytes=stage.read_bytes,
                resident=idx in self.plan.resident,
                head=idx in self.plan.head,
                load_s=statistics.median(self.load_s[stage.name] or [0.0]),
                compute_s={
                    count: seconds[stage.name] for count, seconds in self.compute_s.items() if stage.name in seconds
                },
            )
            for idx, stage in enumerate(self.plan.stages)
        )

    def seconds_per_byte(self, *, head: bool) -> dict[int, float]:
        """Seconds to compute one byte of weights, by tokens, over all that was measured with them.

        All tokens of such a sweep are the same, so all are routed to the same experts.
        """
        sizes = {stage.name: stage.nbytes for stage in self.stages() if stage.head == head}
        if not head:
            sizes |= {expert.name: expert.read_bytes for expert in self.plan.experts}
        seconds = {}
        for count, by_name in sorted(self.compute_s.items()):
            names = by_name.keys() & sizes.keys()
            if names:
                seconds[count] = sum(by_name[name] for name in names) / sum(sizes[name] for name in names)
        return seconds

    def handover_s(self, layer_s: dict[int, float], head_s: dict[int, float]) -> float:
        """Extra seconds of a streamed stage: to bind its weights, and to hand it over.

        A processor computes more slowly after it has waited for the disk. So the time to bind is a difference between
        streamed and resident stages of the same engine: of their extra seconds over a fully resident engine.
        """
        extra_s: dict[tuple[int, bool], list[float]] = defaultdict(list)
        for stage in self.stages():
            for count, seconds in stage.compute_s.items():
                expected_s = stage.nbytes * (head_s if stage.head else layer_s).get(count, 0.0)
                extra_s[count, stage.resident].append(seconds - expected_s)
        binding_s = statistics.median(
            statistics.mean(extra_s[count, False] or [0.0]) - statistics.mean(extra_s[count, True] or [0.0])
            for count in self.compute_s
        )
        return statistics.median(self.gaps_s or [0.0]) + max(0.0, binding_s)

    def read_share(self, disk: tuple[DiskRate, ...]) -> float:
        """The rate of the engine's reads, as a share of the disk's rate alone; 1 if no sweep only waited for reads."""
        agents = self.plan.num_loading_agents
        curve = read_curve(disk, agents)
        alone_s = sum(interpolate(curve, stage.read_bytes) for stage in self.plan.streamed) / agents
        return alone_s / statistics.median(self.read_s) if self.read_s and not self.plan.experts else 1.0


async def _measure_sweeps(engine: Engine, counts: Sequence[int], trace: Trace, events: list[Event]) -> _Measurement:
    """Runs and measures sweeps with each number of tokens in `counts` that fits."""
    opened = engine._opened_model()
    measured, plan = _Measurement(opened), opened.plan
    streamed, experts = {stage.name for stage in plan.streamed}, {expert.name for expert in plan.experts}
    head = {plan.stages[idx].name for idx in plan.head}
    for num_tokens in _token_counts(opened, counts):
        if measured.compute_s:
            count, seconds = max(measured.compute_s.items())
            if sum(seconds.values()) * num_tokens / count > _MAX_SWEEP_SECONDS:
                break
        repeats, warm_ups = _STREAMED_REPEATS if plan.reads_weights else _RESIDENT_REPEATS
        decodes = _can_decode(opened, num_tokens, repeats)
        if decodes:  # prompts of one token, so each sweep has a token of each session
            params = SamplingParams(max_tokens=1 + repeats, temperature=0, ignore_eos=True)
            with ungrouped():
                async with anyio.create_task_group() as sessions:
                    for _ in range(num_tokens):
                        sessions.start_soon(engine.complete, [0], params)
        else:
            repeats, warm_ups = _STREAMED_REPEATS
            for _ in range(repeats + warm_ups):
                await _run_sweep(engine, opened, num_tokens)
        timeline = _drained(trace, events)
        for row, spans in timeline.rows.items():
            for span in spans if row.startswith("loading agent") else ():
                measured.load_s[span.name].append(span.end - span.start)
        sweeps = list(_sweeps(timeline))[warm_ups:]
        measured.compute_s[num_tokens] = {
            name: statistics.median(sweep.stage_s[name] for sweep in sweeps if name in sweep.stage_s)
            for name in {name for sweep in sweeps for name in sweep.stage_s if decodes or name not in head}
        }
        gaps_s = [gap for sweep in sweeps for name, gap in sweep.gaps_s if name in streamed or name in experts]
        measured.gaps_s += gaps_s
        if decodes or not opened.skeleton.generates:
            measured.read_s += [sweep.seconds for sweep in sweeps if sweep.waited_s > _WAITING_SHARE * sweep.seconds]
            num_experts = statistics.median(len(experts.intersection(sweep.stage_s)) for sweep in sweeps)
            handovers_s = (len(streamed) + num_experts) * statistics.median(gaps_s or [0.0])
            outside_s = statistics.median(sweep.outside_s for sweep in sweeps) - handovers_s
            measured.outside_s[num_tokens if decodes else 1] = max(0.0, outside_s)
    if experts and opened.skeleton.generates:
        measured.expert_uses = await _measure_routes(engine, opened, trace, events)
    return measured


def _drained(trace: Trace, events: list[Event]) -> Timeline:
    """What the trace got since it was drained last, which is added to `events`."""
    drained = trace.drain()
    # The names of the rows, and the experts of each module, are only in the first events.
    timeline = Timeline.of([event for event in events if event["ph"] == "M"] + drained)
    events += drained
    return timeline


async def _measure_routes(engine: Engine, opened: OpenedModel, trace: Trace, events: list[Event]) -> tuple[float, ...]:
    """Which experts the tokens of a text use that the model writes itself; see `measured_uses`.

    Empty if there is no room for such a text.
    """
    layers = [[expert.name for expert in layer.layouts] for layer in opened.plan.partition.experts]
    num_experts = max(map(len, layers))
    places = {name: (layer, number) for layer, names in enumerate(layers) for number, name in enumerate(names)}
    prompt = [0] if opened.tokenizer is None else _ROUTED_PROMPT
    try:
        await engine.complete(prompt, SamplingParams(max_tokens=_ROUTED_TOKENS, seed=0, ignore_eos=True))
    except RequestError:  # the context is too short
        return ()
    tokens: list[list[set[int]]] = [[] for _ in layers]
    for sweep in list(_sweeps(_drained(trace, events)))[1:]:  # the first one has all tokens of the prompt
        used: dict[int, set[int]] = defaultdict(set)
        for layer, number in (places[name] for name in sweep.stage_s if name in places):
            used[layer].add(number)
        for layer, numbers in used.items():
            tokens[layer].append(numbers)
    same = [one for one, names in zip(tokens, layers, strict=True) if len(names) == num_experts]
    return measured_uses(same, num_experts)


def _token_counts(opened: OpenedModel, counts: Sequence[int]) -> list[int]:
    """The numbers of tokens to measure: those of `counts` that fit and that the model accepts."""
    if opened.probe.tokens_per_image:
        return [opened.probe.tokens_per_image]
    most = min(opened.plan.max_prompt_tokens, opened.skeleton.context_length or counts[-1])
    if opened.skeleton.generates:  # one token follows
        kv, kv_bytes = opened.probe.cache, opened.plan.kv_bytes
        fits = [count for count in counts if kv.nbytes(count + 1) <= kv_bytes]
        most = min(most, max(fits, default=1), (opened.skeleton.context_length or most + 1) - 1)
    return sorted({max(count, opened.probe.least_tokens) for count in counts if count <= most})


def _can_decode(opened: OpenedModel, num_sessions: int, repeats: int) -> bool:
    """Whether `num_sessions` fit into a sweep and into KV memory."""
    plan, kv = opened.plan, opened.probe.cache
    if not opened.skeleton.generates or num_sessions > plan.max_sequences:
        return False
    context = opened.skeleton.context_length or 2 + repeats
    return context >= 2 + repeats and num_sessions * kv.nbytes(2 + repeats) <= plan.kv_bytes


async def _run_sweep(engine: Engine, opened: OpenedModel, num_tokens: int) -> None:
    """Runs a sweep with one prompt, or one text or image."""
    if opened.skeleton.generates:
        await engine.complete([0] * num_tokens, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        return
    inputs = example_inputs(opened.skeleton.model)
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.zeros(1, num_tokens, dtype=torch.long)
    await engine.forward(**inputs)


@dataclass(slots=True)
class _Sweep:
    """Times of one sweep.

    Attributes:
        seconds: From its start to that of the next sweep.
        waited_s: Waiting for weights.
        stage_s: Computing, by stage.
        gaps_s: From each stage to the next, without waiting for weights.
    """

    seconds: float
    waited_s: float = 0.0
    stage_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    gaps_s: list[tuple[str, float]] = field(default_factory=list)

    @property
    def outside_s(self) -> float:
        """Neither waiting nor computing: the gaps, and the time before and after all stages."""
        return self.seconds - self.waited_s - sum(self.stage_s.values())


def _sweeps(timeline: Timeline) -> Iterator[_Sweep]:
    sweeps = timeline.rows.get("sweeps", [])
    inference = sorted(timeline.rows.get("inference agent", []), key=lambda span: span.start)
    for idx, period in enumerate(sweeps):
        end = max(period.end, sweeps[idx + 1].start) if idx + 1 < len(sweeps) else period.end
        sweep, before, waited_s = _Sweep(end - period.start), None, 0.0
        for span in inference:
            if not period.start <= span.start < period.end:
                continue
            seconds = span.end - span.start
            if span.name.startswith("wait for "):
                sweep.waited_s += seconds
                waited_s += seconds
                continue
            if before is not None:
                sweep.gaps_s.append((before.name, max(0.0, span.start - before.end - waited_s)))
            sweep.stage_s[span.name] += seconds
            before, waited_s = span, 0.0
        yield sweep
