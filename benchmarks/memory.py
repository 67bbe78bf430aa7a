"""Whether a process stays in its memory in bf16, whatever the lengths of its prompts.

    python -m benchmarks.memory [--size 1.4] [--budget 700] [--lengths 419] [--folder DIR]

Kernels that libraries keep for each number of tokens belong to no lease, so only the whole process shows them. The
limit: the baseline, the budget, and what an engine may take beside it. Prompts of 1 to `--lengths` tokens come one
after another, as they would from users, and each number of tokens is new to all kernels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import anyio
import torch

from benchmarks.checkpoints import llama_config, random_checkpoint
from hermes_async import Engine, SamplingParams, format_bytes
from hermes_async.pipeload.memory import headroom, process_rss_bytes

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.4, help="GiB of weights (default 1.4)")
    parser.add_argument("--budget", type=int, default=700, help="MiB (default 700)")
    parser.add_argument("--lengths", type=int, default=419, help="the longest prompt, in tokens (default 419)")
    parser.add_argument("--step", type=int, default=3, help="tokens from one prompt to the next (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint")
    args = parser.parse_args()
    with random_checkpoint(llama_config(int(args.size * 2**30), torch.bfloat16), torch.bfloat16, args.folder) as path:
        result = anyio.run(measure, path, args.budget * MIB, range(1, args.lengths + 1, args.step))
    share = result["peak_rss_bytes"] / result["limit_bytes"]
    print(f"\n  peak_rss_of_limit {share:7.3f}  (at most 1: {'met' if share <= 1 else 'MISSED'})")
    print(json.dumps({**result, "checks": {"peak_rss_of_limit": share}}))
    if share > 1:
        raise SystemExit(1)


async def measure(path: Path, budget: int, lengths: range) -> dict[str, Any]:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    async with Engine(path, memory_budget=budget) as engine:
        baseline = engine.statistics().baseline_bytes
        limit = baseline + budget + headroom(budget)
        print(
            f"limit: {format_bytes(limit)}: {format_bytes(baseline)} baseline, {format_bytes(budget)} budget, overhead",
            flush=True,
        )
        first = peak = 0
        for num_tokens in lengths:
            await engine.complete([2 + (num_tokens + idx) % 1000 for idx in range(num_tokens)], params)
            engine.drop_prefixes()
            now = process_rss_bytes()
            first, peak = first or now, max(peak, now)
            if num_tokens // 50 > (num_tokens - lengths.step) // 50:
                print(f"  {num_tokens:4} tokens: {format_bytes(now)}", flush=True)
        leases = engine.statistics().peak_bytes_in_use
    return {
        "limit_bytes": limit,
        "baseline_bytes": baseline,
        "budget_bytes": budget,
        "peak_lease_bytes": leases,
        "first_rss_bytes": first,
        "peak_rss_bytes": peak,
    }


if __name__ == "__main__":
    main()
