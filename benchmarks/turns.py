"""Measures what sessions in turns cost beside a packed row of them, on the same model, budget and disk.

    python -m benchmarks.turns [--size 3] [--dtype bfloat16] [--budget 0.4] [--limits 500,0] [--sessions 1,4,16,64]
                               [--tokens 8] [--rounds 3]

A quick try: --size 0.3 --sessions 1,4 --rounds 1. Two engines are open at once, one for each batching, and compute by
turns: what the machine does meanwhile, it does to both. Their order alternates.

In turns, each session makes a pass of its own over a stage's weights while they are in memory. So a sweep of n sessions
takes at least max(read, n passes), and n sessions get n times one session's tokens a second until n passes take longer
than the read. A packed row makes one pass for all. The read is measured with plain direct reads of the same extents,
and a pass with transformers' own forward of one layer whose weights are in memory, once for each layer, and the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.paper_modes import weight_bytes
from benchmarks.processes import preload, run_alone
from benchmarks.sessions import measure_point, read_seconds
from hermes_async import Engine, EngineConfig, SamplingParams, format_bytes
from hermes_async.engine.opening import open_model

MIB = 2**20
BATCHINGS = ("packed", "turns")

_PROMPT_TOKENS = 8
_COUNTED_TOKENS = 32  # a plan has a sequence for each so many tokens of KV memory
_PASSES = 24  # over a layer, of which the median counts
_OPENINGS = 5  # of each batching
_AGGREGATE_AT = 16  # sessions
_AGGREGATE_LIMIT = 500  # MiB/s

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB of weights (default 3)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--budget", type=float, default=0.4, help="share of the weights given as budget (default 0.4)")
    parser.add_argument("--limits", default="500,0", help="MiB/s that the disk is held at; 0: not held (default 500,0)")
    parser.add_argument("--sessions", default="1,4,16,64", help="numbers of sessions (default 1,4,16,64)")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of each session (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, whose medians count (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint: the disk to measure")
    args = parser.parse_args()
    numbers = sorted({int(count) for count in args.sessions.split(",")})
    limits = [int(limit) for limit in args.limits.split(",")]
    if numbers[0] != 1 or args.tokens < 3:
        parser.error("one session and three tokens are needed")
    preload("benchmarks.sessions", "benchmarks.paper_modes")
    dtype = getattr(torch, args.dtype)
    with random_checkpoint(llama_config(int(args.size * 2**30), dtype), dtype, args.folder) as path:
        report(path, args.budget, limits, numbers, args.tokens, args.rounds)


def report(path: Path, share: float, limits: list[int], numbers: list[int], num_tokens: int, rounds: int) -> None:
    weights = weight_bytes(path)
    budget = int(weights * share)
    print(f"{format_bytes(weights)} of weights, budget {format_bytes(budget)}; page cache bypassed (direct reads)")
    opening = measure_openings(path, budget, numbers, num_tokens)
    runs = []
    for limit in limits:
        runs.append(run_alone(run_points, path, budget, limit, numbers, num_tokens, rounds))
        _print_run(runs[-1])
    checks = _checks(runs, opening)
    print_checks(checks)
    print(json.dumps({
        "checks": figures_of(checks),
        "weight_bytes": weights,
        "budget_bytes": budget,
        "opening": opening,
        "runs": runs,
    }))  # fmt: skip


def _checks(runs: Sequence[Record], opening: Record) -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for run in runs:
        name = f"held_at_{run['limit']}" if run["limit"] else "not_held"
        if run["limit"] and run["limit_error"] is not None:
            checks[name] = run["limit_error"]
            continue
        first, *more = run["points"]
        checks[f"{name}: turns_to_packed_of_one_session"] = (first["turns_to_packed"], 1.03, "at most")
        bound = [point for point in more if point["pass_seconds"] <= point["turns"]["read_seconds"]]
        checks[f"{name}: sweep_of_n_to_one_while_read_bound"] = (
            (max(point["turns"]["sweep_seconds"] for point in bound) / first["turns"]["sweep_seconds"], 1.05, "at most")
            if bound
            else "with more sessions than one, passes take longer than the read"
        )
        if run["limit"] == _AGGREGATE_LIMIT:
            ratios = {point["sessions"]: point["turns"]["tokens_to_one_session"] for point in run["points"]}
            checks[f"{name}: tokens_per_s_of_{_AGGREGATE_AT}_to_one"] = (
                (ratios[_AGGREGATE_AT], 15 / 16 * _AGGREGATE_AT, "at least")
                if _AGGREGATE_AT in ratios
                else f"give --sessions 1,{_AGGREGATE_AT}"
            )
    checks["opening_of_turns_to_packed"] = (opening["turns_to_packed"], 1.1, "at most")
    return checks


# --- opening ---


def measure_openings(path: Path, budget: int, numbers: Sequence[int], num_tokens: int) -> Record:
    """Seconds from entering an engine to its first line, each in a process that has opened none before."""
    seconds: dict[str, list[float]] = {batching: [] for batching in BATCHINGS}
    for idx in range(_OPENINGS):
        for batching in BATCHINGS[:: 1 if idx % 2 else -1]:
            seconds[batching].append(run_alone(run_opening, path, budget, batching, numbers, num_tokens)["seconds"])
    medians = {batching: statistics.median(each) for batching, each in seconds.items()}
    ratio = statistics.median(
        turns / packed for packed, turns in zip(*(seconds[name] for name in BATCHINGS), strict=True)
    )
    print(f"opening: packed {medians['packed']:.2f} s, turns {medians['turns']:.2f} s ({ratio:.2f})", flush=True)
    return {"seconds": seconds, "medians": medians, "turns_to_packed": ratio}


def run_opening(path: Path, budget: int, batching: str, numbers: Sequence[int], num_tokens: int) -> Record:
    async def opening() -> float:
        started = time.perf_counter()
        async with Engine(path, memory_budget=budget, config=config):
            return time.perf_counter() - started

    config = _config(batching, numbers, kv_budget=None)
    return {"seconds": anyio.run(opening, backend_options={"use_uvloop": True})}


# --- points, in a process of its own ---


def run_points(path: Path, budget: int, limit: int, numbers: Sequence[int], num_tokens: int, rounds: int) -> Record:
    """What each number of sessions takes, in both batchings, with the disk held at `limit` MiB/s (0: not held)."""
    with limited_disk(path, limit * MIB or None) as error:
        record = anyio.run(
            _measure_points, path, budget, numbers, num_tokens, rounds, backend_options={"use_uvloop": True}
        )
    return {"limit": limit, "limit_error": error, **record}


async def _measure_points(path: Path, budget: int, numbers: Sequence[int], num_tokens: int, rounds: int) -> Record:
    kv_bytes = await anyio.to_thread.run_sync(kv_needed, path, numbers[-1], num_tokens)
    one_pass = await anyio.to_thread.run_sync(pass_seconds, path)
    rows: dict[tuple[int, str], list[Record]] = {(number, name): [] for number in numbers for name in BATCHINGS}
    async with AsyncExitStack() as engines:
        opened = {
            name: await engines.enter_async_context(
                Engine(path, memory_budget=budget, config=_config(name, numbers, kv_budget=kv_bytes))
            )
            for name in BATCHINGS
        }
        for name, engine in opened.items():
            print(f"{name}: {engine.plan}", flush=True)
            if engine.plan.bytes_per_sweep == 0:
                raise SystemExit("everything is resident, and nothing is read: give a smaller --budget")
            await engine.complete(_prompt(0), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        for idx in range(rounds):
            for number in numbers:
                for name in BATCHINGS[:: 1 if idx % 2 else -1]:
                    before = await read_seconds(opened[name].plan)
                    prompts = [_prompt(seed) for seed in range(number)]
                    point = await measure_point(opened[name], prompts, num_tokens)
                    if point["sweep_seconds"] is None:
                        raise SystemExit("the prompts took all the time: give more --tokens")
                    read = (before + await read_seconds(opened[name].plan)) / 2
                    rows[number, name].append(point | {"read_seconds": read})
        plans = {name: engine.plan.as_dict() for name, engine in opened.items()}
    points = [_point(number, {name: rows[number, name] for name in BATCHINGS}, one_pass) for number in numbers]
    for point in points:
        for name in BATCHINGS:
            alone = points[0][name]["decode_tokens_per_s"]
            point[name]["tokens_to_one_session"] = point[name]["decode_tokens_per_s"] / alone
    return {"points": points, "one_pass_seconds": one_pass, "plans": plans}


def _point(number: int, rows: dict[str, list[Record]], one_pass: float) -> Record:
    """The medians of all rounds, beside what limits them."""
    point: Record = {"sessions": number, "pass_seconds": number * one_pass}
    for name, rounds in rows.items():
        figures = {
            key: statistics.median(each[key] for each in rounds)
            for key in ("sweep_seconds", "decode_tokens_per_s", "compute_seconds", "read_seconds")
        }
        passes = number * one_pass if name == "turns" else one_pass
        limit = max(figures["read_seconds"], passes)
        point[name] = figures | {"share_of_limit": limit / figures["sweep_seconds"]}
        point[name]["share_of_disk"] = figures["read_seconds"] / figures["sweep_seconds"]
    sweeps = zip(*([each["sweep_seconds"] for each in rows[name]] for name in BATCHINGS), strict=True)
    point["turns_to_packed"] = statistics.median(turns / packed for packed, turns in sweeps)
    return point


def _print_run(run: Record) -> None:
    held = f"held at {run['limit']} MiB/s" if run["limit"] else "not held"
    if run["limit"] and run["limit_error"] is not None:
        held = f"NOT held: {run['limit_error']}"
    print(f"\ndisk {held}; limit of turns: max(read, n passes), one pass {run['one_pass_seconds']:.3f} s")
    print(
        f"  {'sessions':>8} {'batching':>8} {'sweep s':>8} {'tokens/s':>8} {'of one':>7} {'read s':>7} "
        f"{'passes s':>8} {'of disk':>8} {'of limit':>8} {'turns/packed':>12}"
    )
    for point in run["points"]:
        for name in BATCHINGS:
            figures = point[name]
            passes = point["pass_seconds"] if name == "turns" else run["one_pass_seconds"]
            ratio = f"{point['turns_to_packed']:12.3f}" if name == "turns" else ""
            print(
                f"  {point['sessions']:8} {name:>8} {figures['sweep_seconds']:8.3f} "
                f"{figures['decode_tokens_per_s']:8.2f} {figures['tokens_to_one_session']:7.2f} "
                f"{figures['read_seconds']:7.3f} {passes:8.3f} {figures['share_of_disk']:8.3f} "
                f"{figures['share_of_limit']:8.3f} {ratio}",
                flush=True,
            )


def _config(batching: str, numbers: Sequence[int], *, kv_budget: int | None) -> EngineConfig:
    return EngineConfig(
        batching=batching,
        kv_budget=kv_budget,
        max_sequences=numbers[-1],
        prompt_lookup=False,  # random weights repeat themselves, and their repetitions would be drafted
        share_prefixes=False,
    )


def kv_needed(path: Path, number: int, num_tokens: int) -> int:
    """The KV bytes that so many sessions need, in the batching that needs more."""
    needed = []
    for batching in BATCHINGS:
        opened = open_model(path, "1TiB", EngineConfig(batching=batching))
        opened.close()
        needed.append(number * opened.probe.cache.nbytes(max(_PROMPT_TOKENS + num_tokens, _COUNTED_TOKENS)))
    return max(needed)


def pass_seconds(path: Path) -> float:
    """Seconds of one pass over all weights in memory, for one token: a layer's, once for each layer, and the head's."""
    config = AutoConfig.from_pretrained(path)
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 1
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype="auto").eval()
    with torch.inference_mode():
        input_ids = torch.tensor([_prompt(0)])
        cache = DynamicCache(config=config)
        output = model.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        layers, heads = [], []
        for _ in range(_PASSES):
            started = time.perf_counter()
            output = model.model(input_ids=input_ids[:, :1], past_key_values=cache, use_cache=True)
            middle = time.perf_counter()
            model.lm_head(output.last_hidden_state[:, -1:])
            layers.append(middle - started)
            heads.append(time.perf_counter() - middle)
    return num_layers * statistics.median(layers) + statistics.median(heads)


def _prompt(seed: int) -> list[int]:
    return [1 + (seed * 131 + idx * 17) % 1000 for idx in range(_PROMPT_TOKENS)]


if __name__ == "__main__":
    main()
