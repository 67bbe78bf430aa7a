"""Whether plans do what they predict, whether the paper's fixed modes would do better, and how little memory is enough.

    python -m benchmarks.planner [--models llama,gpt2,bert] [--budgets 0.05,0.2,0.6,1.3] [--sessions 1,8] [--limit 500]

Each model is profiled first, with the same disk rate as in the measurements. Then an engine opens in each budget (a
share of the weights). The benchmark compares what its plan predicts with what it measures: seconds a sweep, the first
token of an idle engine, and memory. It runs as many of the sessions as there is KV memory for.

The paper's PIPELOAD modes run in the same budget: whole layers, 2, 4 and 6 loading agents, every layer freed. Where a
mode takes about as long as the plan, the two alternate for some turns. No sweep can take less than the larger of two
limits: its bytes over the disk's rate, and its computation. The benchmark prints the share of that limit, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import torch

from benchmarks import paper_checkpoints
from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.disk import limited_disk
from benchmarks.folders import temporary_folder
from benchmarks.paper_modes import measure_disk, weight_bytes
from benchmarks.processes import preload, run_alone
from hermes_async import Engine, EngineConfig, MemoryBudgetError, SamplingParams, format_bytes
from hermes_async.planning.cost_model import predict
from hermes_async.planning.profile_store import profile_file, save_profile
from hermes_async.profiler.profiler import measure
from hermes_async.storage.checkpoint import Checkpoint

MIB = 2**20
_PROMPT_TOKENS = 64
_NEW_TOKENS = 12
_TEXT_TOKENS = 128
_FIRST_TOKENS = 4  # that are measured of each plan
_SWEEPS = 5  # of texts, that are measured of each
_RING_SECONDS = 0.5  # in which an idle engine's ring is full again
_FIXED = (2, 4, 6)  # loading agents of the paper's modes
_CLOSE = 0.9  # of a fixed mode's time: from there on the machine's noise could decide, and the two run in turns
_TURNS = 5
_PROFILED_IN = 0.5  # of the weights, so that some stages stream and some stay

_CONFIG = EngineConfig(prompt_lookup=False, share_prefixes=False)  # which use what is left

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama,gpt2,bert", help="which models (default all)")
    parser.add_argument("--budgets", default="0.05,0.2,0.6,1.3", help="shares of the weights")
    parser.add_argument("--sessions", default="1,8", help="sessions (texts, of bert) at once")
    parser.add_argument("--size", type=float, default=3.0, help="GiB of llama's weights (default 3)")
    parser.add_argument(
        "--limit", type=int, default=500, help="MiB/s that the disk is held at (default 500; 0: not held)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    args = parser.parse_args()
    budgets = [float(share) for share in args.budgets.split(",")]
    sessions = [int(count) for count in args.sessions.split(",")]
    preload("benchmarks.paper_modes", "hermes_async.profiler.profiler")
    results = {}
    with temporary_folder() as cache:
        os.environ["XDG_CACHE_HOME"] = str(cache)  # nothing that was measured before, and nothing is left
        for name in args.models.split(","):
            with _checkpoint(name, args.size, args.folder) as path:
                results[name] = evaluate(name, path, budgets, sessions, args.limit)
    _summarize(results)
    print(json.dumps(results))


def _checkpoint(name: str, size: float, folder: Path | None) -> AbstractContextManager[Path]:
    if name == "llama":
        return random_checkpoint(llama_config(int(size * 2**30), torch.bfloat16), torch.bfloat16, folder)
    return paper_checkpoints.checkpoint(name, folder)


def evaluate(name: str, path: Path, budgets: list[float], sessions: list[int], limit: int) -> Record:
    weights = weight_bytes(path)
    profile = run_alone(run_profile, path, int(weights * _PROFILED_IN), limit)
    held = f"held at {limit} MiB/s" if limit else "not held"
    print(f"\n{name}: {format_bytes(weights)}, disk {held}; profiled in {profile['seconds']:.0f} s", flush=True)
    records: Record = {"weight_bytes": weights, "budgets": {}}
    for share in budgets:
        budget = int(weights * share)
        disk = run_alone(run_disk, path, limit)["bytes_per_s"]
        record = run_alone(run_plan, path, budget, sessions, limit)
        records["budgets"][share] = record
        if "refused" in record:
            print(f"  {share:.0%}: {record['refused']}", flush=True)
            continue
        record["disk_bytes_per_s"] = statistics.mean([disk, run_alone(run_disk, path, limit)["bytes_per_s"]])
        record |= _beside_fixed(path, budget, limit)
        for line in _lines(share, budget, record):
            print(f"  {line}", flush=True)
    return records


def _lines(share: float, budget: int, record: Record) -> list[str]:
    lines = []
    for figures in record["sessions"].values():
        predicted = figures["predicted"]
        limit_s = max(record["bytes_per_sweep"] / record["disk_bytes_per_s"], predicted["compute_seconds"])
        figures["share_of_limit"] = limit_s / figures["sweep_s"]
        figures["off"] = predicted["sweep_seconds"] / figures["sweep_s"] - 1
        figures["first_token_off"] = predicted["first_token_seconds"] / figures["first_token_s"] - 1
        figures["peak_off"] = predicted["peak_bytes"] / figures["peak_bytes"] - 1
        lines.append(
            f"{share:4.0%} ({format_bytes(budget)}), {predicted['num_sessions']} at once: a sweep "
            f"{figures['sweep_s']:.3f} s, predicted {predicted['sweep_seconds']:.3f} ({figures['off']:+.1%}), "
            f"{figures['share_of_limit']:.2f} of the limit; first token {figures['first_token_s']:.3f} s, predicted "
            f"{predicted['first_token_seconds']:.3f} ({figures['first_token_off']:+.1%}); memory "
            f"{format_bytes(figures['peak_bytes'])}, predicted {figures['peak_off']:+.1%}"
        )
    if "of_best_fixed" in record:
        turns = f", in {len(record['turns'])} turns" if len(record["turns"]) > 1 else ""
        lines.append(
            f"{share:4.0%}: the best fixed mode, {record['best_fixed']} agents, takes {record['best_fixed_s']:.3f} s a "
            f"sweep; the plan takes {record['of_best_fixed']:.2f} of that{turns}"
        )
    else:
        lines.append(f"{share:4.0%}: no fixed mode fits")
    return lines


def _beside_fixed(path: Path, budget: int, limit: int) -> Record:
    """The plan's sweeps beside each fixed mode's of the same turn; from turn to turn the machine changes too much."""
    modes: list[int | None] = [None, *_FIXED]  # None: the planner's choice
    turns: list[dict[int | None, float]] = []
    while True:
        runs = {agents: run_alone(run_sweeps, path, budget, agents, limit) for agents in modes}
        turns.append({agents: run["sweep_s"] for agents, run in runs.items() if "refused" not in run})
        fixed = [agents for agents in turns[-1] if agents is not None]
        if not fixed:
            return {"turns": turns}
        ratio = {agents: statistics.median(turn[None] / turn[agents] for turn in turns) for agents in fixed}
        best = max(ratio, key=lambda agents: ratio[agents])
        if ratio[best] < _CLOSE or len(turns) == _TURNS:
            best_s = statistics.median(turn[best] for turn in turns)
            return {"turns": turns, "best_fixed": best, "best_fixed_s": best_s, "of_best_fixed": ratio[best]}
        modes = [agents for agents in reversed(turns[-1]) if agents is None or ratio[agents] >= _CLOSE]


def _summarize(results: dict[str, Record]) -> None:
    runs = [run for model in results.values() for run in model["budgets"].values() if "refused" not in run]
    figures = [one for run in runs for one in run["sessions"].values()]
    print(f"\n{len(figures)} combinations of model, budget and sessions; within 15 % of what was predicted:")
    for key, what in (("off", "seconds a sweep"), ("first_token_off", "first token"), ("peak_off", "memory")):
        within = sum(abs(one[key]) <= 0.15 for one in figures)
        worst = max((one[key] for one in figures), key=abs)
        print(f"  {what:16} {within} of {len(figures)}, the farthest off by {worst:+.1%}")
    beside = [run["of_best_fixed"] for run in runs if "of_best_fixed" in run]
    if beside:
        print(
            f"  beside the best fixed mode a sweep takes at most {max(beside):.2f} of its time (at most 1.03 is asked)"
        )


# --- in processes of their own ---


def run_profile(path: Path, budget: int, limit: int) -> Record:
    with limited_disk(path, limit * MIB or None):
        started = time.perf_counter()
        profile = anyio.run(measure, path, budget, EngineConfig(), backend_options={"use_uvloop": True})
        save_profile(profile_file(Checkpoint.open(path)), profile)
        return {"seconds": time.perf_counter() - started}


def run_disk(path: Path, limit: int) -> Record:
    with limited_disk(path, limit * MIB or None):
        return measure_disk(path)


def run_plan(path: Path, budget: int, sessions: list[int], limit: int) -> Record:
    """The plan, and of each number of sessions what it predicts and what is measured."""
    with limited_disk(path, limit * MIB or None):
        return anyio.run(_run_plan, path, budget, sessions, backend_options={"use_uvloop": True})


def run_sweeps(path: Path, budget: int, agents: int | None, limit: int) -> Record:
    """Seconds a sweep of one session; in a fixed mode, or by the planner's choice (None)."""
    config = _CONFIG
    if agents is not None:
        config = replace(_CONFIG, num_loading_agents=agents, max_resident_layers=agents + 1)
    with limited_disk(path, limit * MIB or None):
        return anyio.run(_run_sweeps, path, budget, config, backend_options={"use_uvloop": True})


async def _run_plan(path: Path, budget: int, sessions: list[int]) -> Record:
    try:
        async with Engine(path, memory_budget=budget, config=_CONFIG) as engine:
            plan = engine.plan
            record: Record = {"bytes_per_sweep": plan.bytes_per_sweep, "plan": plan.as_dict(), "sessions": {}}
            first = predict(plan, prompt_tokens=_PROMPT_TOKENS if _generates(engine) else _TEXT_TOKENS, new_tokens=1)
            tokens = 1 if _generates(engine) else _TEXT_TOKENS
            for count in sessions:
                predicted = predict(plan, num_sessions=count, prompt_tokens=tokens, new_tokens=_NEW_TOKENS)
                record["sessions"][count] = {
                    "predicted": asdict(predicted)
                    | {
                        "first_token_seconds": first.first_token_seconds,
                        "peak_bytes": max(predicted.peak_bytes, first.peak_bytes),
                    },
                    "first_token_s": await _measure_first_token(engine),
                    "sweep_s": await _measure_sweep(engine, predicted.num_sessions),
                    "peak_bytes": engine.statistics().peak_bytes_in_use,
                }
            return record
    except MemoryBudgetError as error:
        return {"refused": str(error)}


async def _run_sweeps(path: Path, budget: int, config: EngineConfig) -> Record:
    try:
        async with Engine(path, memory_budget=budget, config=config) as engine:
            if config.max_resident_layers is not None and not engine.plan.num_buffers:
                return {"refused": "so many layers are all of them, and none is freed: the planner's own plan"}
            return {"sweep_s": await _measure_sweep(engine, 1)}
    except MemoryBudgetError as error:
        return {"refused": str(error)}


def _generates(engine: Engine) -> bool:
    return engine.plan.kv_bytes_per_token > 0


def _prompt(num_tokens: int) -> list[int]:
    return torch.randint(10, 20_000, (num_tokens,)).tolist()


async def _forward(engine: Engine) -> None:
    await engine.forward(input_ids=torch.tensor([_prompt(_TEXT_TOKENS)]))


async def _measure_first_token(engine: Engine) -> float:
    """Seconds to the first token, or output, of one request in an idle engine whose ring is full."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    seconds = []
    for _ in range(_FIRST_TOKENS):
        started = time.perf_counter()
        if _generates(engine):
            await engine.complete(_prompt(_PROMPT_TOKENS), params)
        else:
            await _forward(engine)
        seconds.append(time.perf_counter() - started)
        await anyio.sleep(_RING_SECONDS)
    return statistics.median(seconds[1:])  # the first filled the ring


async def _measure_sweep(engine: Engine, count: int) -> float:
    """Seconds a sweep of `count` sessions, or texts, at once."""
    if _generates(engine):
        return await _measure_decoding(engine, count)
    await _forward(engine)  # is refused here, if it is
    seconds = []
    for _ in range(_SWEEPS):
        started = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(_forward, engine)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


async def _measure_decoding(engine: Engine, count: int) -> float:
    """Seconds between two tokens, while all sessions decode."""
    params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0, ignore_eos=True)
    moments: list[list[float]] = [[] for _ in range(count)]

    async def session(idx: int) -> None:
        async for _ in engine.generate(_prompt(1), params):
            moments[idx].append(time.perf_counter())

    async with anyio.create_task_group() as tasks:
        for idx in range(count):
            tasks.start_soon(session, idx)
    # After the last one's first token, before the first one's last.
    started, ended = max(own[0] for own in moments), min(own[-1] for own in moments)
    gaps = [after - before for before, after in pairwise(moments[0]) if started <= before and after <= ended]
    return statistics.median(gaps)


if __name__ == "__main__":
    main()
