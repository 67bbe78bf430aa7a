"""Measures how close sweeps come to max(read, compute), from few weights in memory to nearly all.

    python -m benchmarks.floor [--size 3] [--shares 0.05,0.25,0.5,0.75,0.95] [--limits 500,0] [--rounds 5]

Needs root for a held disk. An engine opens for each share and limit, with a fixed budget that keeps about so much of
the weights in memory. One session decodes. In each round, plain direct reads of the same extents by as many threads as
there are loading agents give `read`, just before and just after the sweeps. A second engine, in which all weights stay,
gives `compute`. So what other programs on the machine do happens to all three. The medians of the rounds count.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch

from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.sweep import decode_step, disk_seconds
from hermes_async import Engine, EngineConfig

MIB = 2**20
_SHARES = "0.05,0.25,0.5,0.75,0.95"
_HELD, _NOT_HELD = 0.97, 0.92  # of max(read, compute) over the sweep, at least
_SECONDS_OF_SWEEPS = 6.0  # in a round, about
_HEADER = f"{'MiB/s':>6} {'resident':>9} {'agents':>7} {'read, s':>8} {'compute, s':>11} {'sweep, s':>9} {'share':>6}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB of weights in bf16 (default 3)")
    parser.add_argument("--shares", default=_SHARES, help=f"of the weights that stay in memory (default {_SHARES})")
    parser.add_argument("--limits", default="500,0", help="MiB/s that the disk is held at; 0: not held (default 500,0)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, whose medians count (default 5)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint: the disk to measure")
    args = parser.parse_args()
    config = llama_config(int(args.size * 2**30), torch.bfloat16)
    with random_checkpoint(config, torch.bfloat16, args.folder) as path:
        limits = [int(limit) for limit in args.limits.split(",")]
        shares = [float(share) for share in args.shares.split(",")]
        num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        measured = partial(measure, path, num_bytes, limits, shares, args.rounds)
        records = anyio.run(measured, backend_options={"use_uvloop": True})
    checks: dict[str, Check] = {}
    for record in records:
        name = f"{record['limit'] or 'not held'}, {record['resident']:.0%} resident"
        share = (record["share"], _HELD if record["limit"] else _NOT_HELD, "at least")
        checks[name] = record["limit_error"] or share
    print_checks(checks)
    print(json.dumps({"checks": figures_of(checks), "records": records}))


async def measure(
    path: Path, num_bytes: int, limits: list[int], shares: list[float], num_rounds: int
) -> list[dict[str, Any]]:
    """A record for each limit and share."""
    records = []
    config = EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False)
    print(_HEADER, flush=True)
    async with Engine(path, memory_budget=2 * num_bytes, config=config) as everything:
        await decode_step(everything, 4)
        beside = everything.plan.minimum_budget
        for limit in limits:
            with limited_disk(path, limit * MIB or None) as error:
                for share in shares:
                    async with Engine(path, memory_budget=beside + int(share * num_bytes), config=config) as engine:
                        record = await measure_share(engine, everything, num_rounds)
                    records.append({"limit": limit, "limit_error": error if limit else None, **record})
                    print(_line(records[-1]), flush=True)
    return records


async def measure_share(engine: Engine, everything: Engine, num_rounds: int) -> dict[str, Any]:
    """The medians of what the rounds took."""
    plan = engine.plan
    groups = [stage.ranges for idx, stage in enumerate(plan.stages) if idx not in plan.resident]
    await decode_step(engine, 2)  # which also loads what stays
    read = await disk_seconds(groups, plan.num_loading_agents)
    compute = await decode_step(everything, 8)
    num_steps = max(2, round(_SECONDS_OF_SWEEPS / max(read, compute)))
    reads, computes, sweeps, shares = [], [], [], []
    for _ in range(num_rounds):
        sweep = await decode_step(engine, num_steps)
        read_after = await disk_seconds(groups, plan.num_loading_agents)
        compute_after = await decode_step(everything, 8)
        reads.append((read + read_after) / 2)
        computes.append((compute + compute_after) / 2)
        sweeps.append(sweep)
        shares.append(max(reads[-1], computes[-1]) / sweep)
        read, compute = read_after, compute_after
    return {
        "resident": plan.resident_bytes / plan.weight_bytes,
        "num_loading_agents": plan.num_loading_agents,
        "read_seconds": statistics.median(reads),
        "compute_seconds": statistics.median(computes),
        "sweep_seconds": statistics.median(sweeps),
        "share": statistics.median(shares),
        "shares": shares,
    }


def _line(record: dict[str, Any]) -> str:
    return (
        f"{record['limit'] or '-':>6} {record['resident']:9.1%} {record['num_loading_agents']:7} "
        f"{record['read_seconds']:8.3f} {record['compute_seconds']:11.3f} {record['sweep_seconds']:9.3f} "
        f"{record['share']:6.3f}"
    )


if __name__ == "__main__":
    main()
