"""Sweeps of a mixture of experts: what they read, what they needed to read, and what they took. See `experts`."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import torch
from transformers import AutoConfig

from benchmarks.sweep import disk_seconds
from hermes_async import Engine, EngineConfig, MemoryBudgetError, SamplingParams, format_bytes
from hermes_async.engine import model_planner
from hermes_async.memory.available import process_peak_rss_bytes
from hermes_async.memory.library_caches import BESIDE_BUDGET_BYTES
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.storage.shard import ReadRange

NAMES = ("on demand", "all")
"""Engines that are compared: one reads the experts that tokens are routed to, the other all of each layer."""

_PROMPT_TOKENS = 2  # so that the prompts of many sessions take few sweeps
_SKIPPED = 3  # sweeps after the prompts, in which experts of the prompts still fill the cache
_SWEEPS_OF_ALL = 2  # that are measured; each reads the whole model
_KV_BLOCK_TOKENS = 32  # a multiple of the engine's
_READ_BYTES = 2 * 2**30  # that measure the disk's rate, of which a limit's first burst is a small part

Record = dict[str, Any]


@dataclass
class _Recorder:
    """Watches a pipeline while sweeps run; it is told by the compute thread.

    Attributes:
        routes: For each visit of a layer, the experts that were asked for: the layer, and their indices.
        missed: What was read because a sweep asked for it.
        expert_seconds, num_experts: Of experts that were computed.
    """

    pipeline: Pipeline
    routes: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    missed: list[Stage] = field(default_factory=list)
    expert_seconds: float = 0.0
    num_experts: int = 0
    _entered: float = 0.0

    def __post_init__(self) -> None:
        places = {
            stage: (layer_idx, idx)
            for layer_idx, layer in enumerate(self.pipeline.experts.layers)
            for idx, stage in enumerate(layer)
        }
        ask, enter, leave = self.pipeline.ask, self.pipeline.enter, self.pipeline.leave

        def recorded_ask(experts: Sequence[Stage]) -> None:
            self.missed += [expert for expert in experts if expert.state is StageState.EMPTY]
            if experts:
                layer = places[experts[0]][0]
                self.routes.append((layer, tuple(places[expert][1] for expert in experts)))
            ask(experts)

        def recorded_enter(stages: Sequence[Stage]) -> Stage | None:
            stage = enter(stages)
            self._entered = time.perf_counter()
            return stage

        def recorded_leave(stage: Stage) -> None:
            if stage.is_expert:
                self.expert_seconds += time.perf_counter() - self._entered
                self.num_experts += 1
            leave(stage)

        replaced: Any = self.pipeline
        replaced.ask, replaced.enter, replaced.leave = recorded_ask, recorded_enter, recorded_leave

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.routes.clear()
        self.missed.clear()
        self.expert_seconds, self.num_experts = 0.0, 0


@contextmanager
def _reading_all(reads_all: bool) -> Iterator[None]:
    """Engines that are opened meanwhile read all experts of each layer."""
    if not reads_all:
        yield
        return
    with patch.object(model_planner, "expert_layers", lambda *_: ()):
        yield


# --- both engines, side by side ---


async def measure_sides(
    path: Path, budget: int, numbers: Sequence[int], num_tokens: int, prompt_tokens: int, rounds: int
) -> Record:
    """What numbers of sessions and a long prompt take with experts on demand, and reading all of each layer."""
    config = AutoConfig.from_pretrained(path)
    most_tokens = [_PROMPT_TOKENS + num_tokens + numbers[-1]] * numbers[-1]
    kv_budget = _kv_bytes(config, max((most_tokens, [prompt_tokens + 1]), key=lambda one: _kv_bytes(config, one)))
    options = EngineConfig(
        kv_budget=kv_budget, max_sequences=numbers[-1], prompt_lookup=False, share_prefixes=False, context_length=4096
    )
    async with AsyncExitStack() as exits:
        engines: dict[str, Engine] = {}
        opening, budgets = {}, {}
        for name in NAMES:
            started = time.perf_counter()
            engines[name], budgets[name] = await _open(exits, path, budget, options, reads_all=name == NAMES[1])
            opening[name] = time.perf_counter() - started
            print(f"{name}:\n{engines[name].plan}", flush=True)
        recorder = _Recorder(_pipeline(engines[NAMES[0]]))
        for name, tokens in ((NAMES[0], num_tokens), (NAMES[1], 2)):  # fills the cache and what is resident
            await engines[name].complete(_prompt(config, 0), _params(tokens))
        routes = _routes(recorder, config)
        points = [await _measure_point(engines, recorder, config, number, num_tokens, rounds) for number in numbers]
        prompt = None if not prompt_tokens else await _measure_prompt(engines, config, prompt_tokens, rounds)
        plans = {name: engine.plan.as_dict() for name, engine in engines.items()}
    return {
        "points": points,
        "prompt": prompt,
        "routes": routes,
        "budgets": budgets,
        "opening_seconds": opening,
        "plans": plans,
    }


async def _open(
    exits: AsyncExitStack, path: Path, budget: int, options: EngineConfig, *, reads_all: bool
) -> tuple[Engine, int]:
    """The engine and its budget: more than `budget` if it does not work in that."""
    while True:
        try:
            with _reading_all(reads_all):
                engine = await exits.enter_async_context(Engine(path, memory_budget=budget, config=options))
        except MemoryBudgetError as error:
            if not reads_all or error.minimum_bytes is None:
                raise
            print(f"reading all does not work in {format_bytes(budget)}: {error}", flush=True)
            budget = error.minimum_bytes
            continue
        return engine, budget


async def _measure_point(
    engines: dict[str, Engine], recorder: _Recorder, config: Any, number: int, num_tokens: int, rounds: int
) -> Record:
    rows: dict[str, list[Record]] = {name: [] for name in NAMES}
    for idx in range(rounds):
        prompts = [_prompt(config, 1 + idx * number + session) for session in range(number)]
        for name in NAMES[:: 1 if idx % 2 else -1]:
            if name == NAMES[0]:
                rows[name].append(await _sweeps_on_demand(engines[name], recorder, prompts, num_tokens))
            else:
                rows[name].append((await _sweeps(engines[name], prompts, 1 + _SWEEPS_OF_ALL, skipped=0)).figures)
            print(f"  {number} sessions, {name}: {rows[name][-1]['sweep_seconds']:.3f} s a sweep", flush=True)
    own, all_of_them = (
        {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]} for name in NAMES
    )
    speedups = [all_row["sweep_seconds"] / row["sweep_seconds"] for row, all_row in zip(*rows.values(), strict=True)]
    return {
        "sessions": number,
        NAMES[0]: own,
        NAMES[1]: all_of_them,
        "speedup": statistics.median(speedups),
        "rows": rows,
    }


@dataclass(frozen=True)
class _Measured:
    """Of the sweeps of some sessions after those that are skipped."""

    figures: Record
    num_sweeps: int


async def _sweeps(
    engine: Engine,
    prompts: Sequence[list[int]],
    num_tokens: int,
    *,
    skipped: int,
    on_start: Callable[[], None] = lambda: None,
) -> _Measured:
    """Runs sessions, and measures the sweeps in which all of them decode, but for the first `skipped`.

    Args:
        on_start: Called when the measured sweeps begin.
    """
    ticks: list[tuple[float, Any]] = []
    read_statistics = _pipeline(engine).read_statistics

    async def session(idx: int) -> None:
        is_first = True
        async for _ in engine.generate(prompts[idx], _params(num_tokens + len(prompts))):
            if is_first:
                waiting.discard(idx)
                is_first = False
            elif idx == 0 and not waiting and len(ticks) <= num_tokens - 1:
                ticks.append((time.perf_counter(), (engine.statistics(), read_statistics.bytes_read)))
                if len(ticks) == skipped + 1:
                    on_start()
                if len(ticks) == num_tokens:
                    group.cancel_scope.cancel()

    waiting = set(range(len(prompts)))
    async with anyio.create_task_group() as group:
        for idx in range(len(prompts)):
            group.start_soon(session, idx)
    ticks = ticks[skipped:]
    if len(ticks) < 2:
        raise SystemExit("the prompts took all the time: give more --tokens")
    (started, (first, first_bytes)), (ended, (last, last_bytes)) = ticks[0], ticks[-1]
    num_sweeps = last.sweeps - first.sweeps
    figures = {
        "tokens_per_s": len(prompts) * num_sweeps / (ended - started),
        "sweep_seconds": (ended - started) / num_sweeps,
        "stall_seconds": (last.stall_seconds - first.stall_seconds) / num_sweeps,
        "bytes": (last_bytes - first_bytes) / num_sweeps,
    }
    return _Measured(figures, num_sweeps)


async def _sweeps_on_demand(
    engine: Engine, recorder: _Recorder, prompts: Sequence[list[int]], num_tokens: int
) -> Record:
    pipeline = _pipeline(engine)
    experts = pipeline.experts
    counts = experts.statistics
    before: list[int] = []

    def start() -> None:
        recorder.clear()
        before[:] = [counts.num_hits, counts.num_misses, counts.num_read_ahead]

    measured = await _sweeps(engine, prompts, num_tokens, skipped=_SKIPPED, on_start=start)
    hits, misses, ahead = (
        (now - then) / measured.num_sweeps
        for now, then in zip((counts.num_hits, counts.num_misses, counts.num_read_ahead), before, strict=True)
    )
    streamed = [stage.layout for stage in pipeline.stages if not stage.resident]
    expert_bytes = statistics.mean(expert.layout.weight_bytes for expert in experts.experts)
    figures = measured.figures
    expert_seconds = recorder.expert_seconds / recorder.num_experts
    in_experts = recorder.expert_seconds / measured.num_sweeps
    outside = figures["sweep_seconds"] - figures["stall_seconds"] - in_experts
    groups = [layout.ranges for layout in streamed] * measured.num_sweeps
    groups += [expert.layout.ranges for expert in recorder.missed]
    read = await _read_seconds(groups, max(2, engine.plan.num_loading_agents)) / measured.num_sweeps
    return figures | {
        "union": (hits + misses) / len(experts.layers),
        "hit_rate": hits / (hits + misses),
        "read_ahead": ahead,
        "needed_bytes": sum(layout.read_bytes for layout in streamed) + (misses + ahead) * expert_bytes,
        "read_seconds": read,
        "outside_seconds": outside,
        "expert_seconds": expert_seconds,
        "limit_seconds": read + outside + len(experts.layers) * expert_seconds,
    }


async def _read_seconds(groups: Sequence[Sequence[ReadRange]], num_threads: int) -> float:
    """Seconds of plain direct reads of these ranges; of many, those of the first are measured."""
    nbytes = sum(item.nbytes for group in groups for item in group)
    if not nbytes:
        return 0.0
    chosen: list[Sequence[ReadRange]] = []
    chosen_bytes = 0
    for group in cycle(groups):
        if chosen_bytes >= _READ_BYTES:
            break
        chosen.append(group)
        chosen_bytes += sum(item.nbytes for item in group)
    return await disk_seconds(chosen, num_threads) * nbytes / chosen_bytes


async def _measure_prompt(engines: dict[str, Engine], config: Any, num_tokens: int, rounds: int) -> Record:
    """Seconds to the first token of a long prompt."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for idx in range(rounds):
        prompt = _prompt(config, 1000 + idx, num_tokens)
        for name in NAMES[:: 1 if idx % 2 else -1]:
            started = time.perf_counter()
            await engines[name].complete(prompt, _params(1))
            seconds[name].append(time.perf_counter() - started)
    ratio = statistics.median(own / other for own, other in zip(*seconds.values(), strict=True))
    return {name: statistics.median(each) for name, each in seconds.items()} | {
        "num_tokens": num_tokens,
        "ratio": ratio,
    }


def _routes(recorder: _Recorder, config: Any) -> Record:
    """How the choices of one session's tokens are distributed, without those of its prompt."""
    num_chosen = config.num_experts_per_tok
    layers: dict[int, list[tuple[int, ...]]] = {}
    for layer, chosen in recorder.routes:
        if len(chosen) == num_chosen:
            layers.setdefault(layer, []).append(chosen)
    num_experts = len(recorder.pipeline.experts.layers[0])
    tenths, perplexities, again = [], [], []
    for visits in layers.values():
        counts = Counter(expert for chosen in visits for expert in chosen)
        total = counts.total()
        tenths.append(sum(count for _, count in counts.most_common(num_experts // 10)) / total)
        shares = torch.tensor(list(counts.values())) / total
        perplexities.append(float(torch.exp(-(shares * shares.log()).sum())))
        again += [len(set(one) & set(other)) / num_chosen for one, other in pairwise(visits)]
    return {
        "num_experts": num_experts,
        "top_tenth": statistics.mean(tenths),
        "perplexity": statistics.mean(perplexities),
        "of_last_token": statistics.mean(again),
        "num_tokens": len(next(iter(layers.values()))),
    }


# --- the true shape ---


async def measure_shape(path: Path, budget: int, num_tokens: int) -> Record:
    """Opens a model alone, and generates with one session."""
    config = AutoConfig.from_pretrained(path)
    options = EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False, context_length=4096)
    started = time.perf_counter()
    async with Engine(path, memory_budget=budget, config=options) as engine:
        opened = time.perf_counter()
        print(engine.plan, flush=True)
        baseline = engine.statistics().baseline_bytes
        await engine.wait_ready()
        loaded = time.perf_counter()
        await engine.complete(_prompt(config, 0), _params(num_tokens))
        counts = _pipeline(engine).experts.statistics
        before = counts.num_hits, counts.num_misses
        measured = await _sweeps(engine, [_prompt(config, 1)], num_tokens, skipped=_SKIPPED)
        hits, misses = counts.num_hits - before[0], counts.num_misses - before[1]
        peak_lease_bytes = engine.statistics().peak_bytes_in_use
    return measured.figures | {
        "opening_seconds": opened - started,
        "loaded_seconds": loaded - started,
        "hit_rate": hits / (hits + misses),
        "budget_bytes": budget,
        "baseline_bytes": baseline,
        "limit_bytes": baseline + budget + BESIDE_BUDGET_BYTES,
        "peak_lease_bytes": peak_lease_bytes,
        "peak_rss_bytes": process_peak_rss_bytes(),
    }


# --- inputs ---


def _pipeline(engine: Engine) -> Pipeline:
    return engine._model().loaded.pipeline


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)


def _prompt(config: Any, seed: int, num_tokens: int = _PROMPT_TOKENS) -> list[int]:
    return random.Random(seed).choices(range(config.vocab_size), k=num_tokens)


def _kv_bytes(config: Any, lengths: Sequence[int]) -> int:
    """KV bytes of sequences of these lengths."""
    blocks = sum(-(-length // _KV_BLOCK_TOKENS) for length in lengths)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * config.dtype.itemsize
    return blocks * _KV_BLOCK_TOKENS * token
