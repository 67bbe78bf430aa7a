"""Measures how close a sweep comes to the disk's rate, what it holds in memory, and what sharing it costs.

    python -m benchmarks.sweep [--size 3] [--budget 0.4] [--limit 500] [--folder DIR]

A decode sweep reads S - R bytes (all weights less the resident ones). So it takes at least (S - R) / B at a disk rate
of B, and at least as long as computing. The same run measures B just before and after the sweeps, with plain direct
reads of the same extents by as many threads as there are loading agents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from hermes_async import Engine, SamplingParams, format_bytes
from hermes_async.storage.threads import run_in_thread  # keeps no kernel threads, which slow the engine

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB of weights (default 3)")
    parser.add_argument("--budget", type=float, default=0.4, help="share of the weights given as budget (default 0.4)")
    parser.add_argument("--limit", type=int, default=500, help="MiB/s that the disk is held at (default 500)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each comparison (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint: the disk to measure")
    parser.add_argument("--checkpoint", type=Path, default=None, help="use this one instead of making one")
    parser.add_argument("--child", choices=["streamed", "resident"], help=argparse.SUPPRESS)
    parser.add_argument("--held", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args)
        return
    if args.checkpoint is not None:
        report(args, args.checkpoint)
        return
    with random_checkpoint(llama_config(int(args.size * 2**30), torch.bfloat16), torch.bfloat16, args.folder) as path:
        report(args, path)


def report(args: argparse.Namespace, path: Path) -> None:
    num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    budget = int(num_bytes * args.budget)
    print(f"{format_bytes(num_bytes)} of weights, budget {format_bytes(budget)}; page cache bypassed (direct reads)")
    held = run_child("streamed", path, budget, args.rounds, held=args.limit)
    free = run_child("streamed", path, budget, args.rounds)
    resident = run_child("resident", path, num_bytes * 2, args.rounds)
    checks: dict[str, Check] = {
        "sweep_share_held": held["limit_error"] or (held["share_of_disk"], 0.95, "at least"),
        "sweep_share_unthrottled": (free["share_of_disk"], 0.85, "at least"),
        "bytes_per_sweep": (abs(free["bytes_per_sweep"] / free["bytes_expected"] - 1), 0.01, "at most"),
        "peak_in_use_of_budget": (max(held["peak_in_use"], free["peak_in_use"]), 1.0, "at most"),
        "peak_rss_of_allowance": (max(held["peak_rss"], free["peak_rss"]), 1.0, "at most"),
        "decode_step_of_transformers": (resident["step_ratio"], 1.05, "at most"),
        "sweeps_of_eight_sessions": (held["eight_sweeps"], 1.1, "at most"),
        "time_of_eight_sessions": (held["eight_time"], 1.2, "at most"),
    }
    print_checks(checks)
    print(json.dumps({
        "weight_bytes": num_bytes,
        "budget_bytes": budget,
        "checks": figures_of(checks),
        "held": held,
        "unthrottled": free,
        "resident": resident,
    }))  # fmt: skip


def run_child(kind: str, path: Path, budget: int, rounds: int, *, held: int = 0) -> dict[str, Any]:
    """Runs one measurement in a process of its own, so that its peak memory is its own too."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--child", kind, "--checkpoint", str(path)]
    command += ["--size", str(budget), "--rounds", str(rounds), "--held", str(held)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            if last:
                print(last)
            last = line.rstrip()
    if process.returncode:
        raise SystemExit(f"{kind}: the measurement failed with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(last)
    return result


def child(args: argparse.Namespace) -> None:
    budget, path = int(args.size), args.checkpoint
    if args.child == "resident":
        print(json.dumps(anyio.run(measure_resident, path, budget, args.rounds)))
        return
    with limited_disk(path, args.held * MIB if args.held else None) as error:
        result = anyio.run(
            measure_streamed, path, budget, args.rounds, bool(args.held), backend_options={"use_uvloop": True}
        )
    result["limit_error"] = error if args.held else None
    print(json.dumps(result))


async def measure_streamed(path: Path, budget: int, rounds: int, held: bool) -> dict[str, Any]:
    async with Engine(path, memory_budget=budget) as engine:
        plan = engine.plan
        groups = [stage.ranges for idx, stage in enumerate(plan.stages) if idx not in plan.resident]
        threads = plan.num_loading_agents
        seconds = await disk_seconds(groups, threads)
        print(f"\n{plan}\nlimit: a sweep of {format_bytes(plan.bytes_per_sweep)} in {seconds:.2f} s", flush=True)
        shares, steps, read = [], [], []
        for _ in range(rounds):
            before = engine.statistics()
            step = await decode_step(engine, 6)
            after = engine.statistics()
            again = await disk_seconds(groups, threads)
            shares.append((seconds + again) / 2 / step)
            steps.append(step)
            read.append((after.bytes_read - before.bytes_read) / (after.sweeps - before.sweeps))
            print(f"  sweep {step:.3f} s, disk {seconds:.3f} and {again:.3f} s, share {shares[-1]:.3f}", flush=True)
            seconds = again
        sweeps, times = [], []
        for _ in range(1 if held else max(1, rounds // 2)):
            one, eight = await session_cost(engine, 1), await session_cost(engine, 8)
            sweeps.append(eight[0] / one[0])
            times.append(eight[1] / one[1])
            print(f"  eight sessions: {sweeps[-1]:.3f} of the sweeps, {times[-1]:.3f} of the time of one", flush=True)
        counts = engine.statistics()
        allowance = counts.baseline_bytes + budget * 1.05
        return {
            "share_of_disk": statistics.median(shares),
            "sweep_seconds": statistics.median(steps),
            "disk_bytes_per_second": plan.bytes_per_sweep / statistics.median(steps) / statistics.median(shares),
            "bytes_per_sweep": statistics.median(read),
            "bytes_expected": plan.weight_bytes - plan.resident_bytes,
            "peak_in_use": counts.peak_bytes_in_use / budget,
            "peak_rss": counts.process_peak_rss_bytes / allowance,
            "eight_sweeps": statistics.median(sweeps),
            "eight_time": statistics.median(times),
            "plan": plan.as_dict(),
            "statistics": counts.as_dict(),
        }


async def disk_seconds(groups: Sequence[Sequence[Any]], num_threads: int) -> float:
    """Seconds of plain direct reads, in a process that shares this one's cgroup."""
    asked = {
        "groups": [[[str(item.file), item.offset, item.nbytes] for item in group] for group in groups],
        "num_threads": num_threads,
    }
    command = [sys.executable, "-m", "benchmarks.disk"]
    done = await anyio.run_process(command, input=json.dumps(asked).encode(), stderr=None)
    return float(done.stdout)


async def decode_step(engine: Engine, num_steps: int) -> float:
    """Seconds from one token to the next, of one session."""
    params = SamplingParams(max_tokens=num_steps + 1, temperature=0, ignore_eos=True)
    times = [time.perf_counter() async for _ in engine.generate(list(range(1, 17)), params)]
    return (times[-1] - times[0]) / num_steps


async def session_cost(engine: Engine, num_sessions: int) -> tuple[int, float]:
    """Sweeps and seconds of sessions of equal length that start together."""
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    before, started = engine.statistics().sweeps, time.perf_counter()
    async with anyio.create_task_group() as group:
        for idx in range(num_sessions):
            group.start_soon(engine.complete, [idx + 1, *range(1, 8)], params)
    return engine.statistics().sweeps - before, time.perf_counter() - started


async def measure_resident(path: Path, budget: int, rounds: int) -> dict[str, Any]:
    """A decode step with all weights in memory, and transformers' own forward on the same weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    async with Engine(path, memory_budget=budget) as engine:
        print(f"\n{engine.plan}", flush=True)
        ratios, ours, theirs = [], [], []
        for _ in range(max(5, rounds)):
            ours.append(await decode_step(engine, 16))
            theirs.append(await run_in_thread(transformers_step, model, 16))
            ratios.append(ours[-1] / theirs[-1])
            print(f"  decode step {ours[-1] * 1e3:.1f} ms, transformers' forward {theirs[-1] * 1e3:.1f} ms", flush=True)
    return {
        "step_ratio": statistics.median(ratios),
        "step_seconds": statistics.median(ours),
        "transformers_seconds": statistics.median(theirs),
    }


def transformers_step(model: torch.nn.Module, num_steps: int) -> float:
    """Seconds of one forward with a cache, of one token."""
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        logits = model(input_ids=torch.arange(1, 17)[None], past_key_values=cache, use_cache=True).logits
        started = time.perf_counter()
        for _ in range(num_steps):
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        return (time.perf_counter() - started) / num_steps


if __name__ == "__main__":
    main()
