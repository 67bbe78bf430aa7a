"""Checks that a process stays within its memory, for prompts of any length.

    python -m benchmarks.memory [--format bf16] [--size 1.4] [--budget 700] [--lengths 419] [--folder DIR]

Libraries keep kernels for each number of tokens. Those are in no lease, so only the whole process shows them. The
limit is the baseline, the budget, and the constant that an engine may take beside both, for any model and length.
Prompts of 1 to `--lengths` tokens come one after another, as from users, and each number of tokens is new to all
kernels. The figure is the most that the process held at any time, also within a sweep. Weights are random; those of
other formats are dequantized, for which the heap keeps some memory within a sweep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import torch

from benchmarks.checkpoints import llama_config
from benchmarks.quantized_checkpoints import FORMATS, quantized_checkpoint
from hermes_async import Engine, EngineConfig, SamplingParams, format_bytes
from hermes_async.memory.available import process_rss_bytes
from hermes_async.memory.library_caches import BESIDE_BUDGET_BYTES

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of the linear layers (default bf16)")
    parser.add_argument("--kernels", default="auto", help="auto, transformers or fastest")
    parser.add_argument("--size", type=float, default=1.4, help="GiB that the weights take in bf16 (default 1.4)")
    parser.add_argument("--budget", type=int, default=700, help="MiB (default 700)")
    parser.add_argument("--lengths", type=int, default=419, help="the longest prompt, in tokens (default 419)")
    parser.add_argument("--step", type=int, default=3, help="tokens from one prompt to the next (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint")
    args = parser.parse_args()
    config, lengths = llama_config(int(args.size * 2**30), torch.bfloat16), range(1, args.lengths + 1, args.step)
    # What making the checkpoint takes is not the engine's, so that runs in a process of its own.
    spawn = multiprocessing.get_context("spawn")
    with (
        quantized_checkpoint(FORMATS[args.format], config, args.folder) as path,
        ProcessPoolExecutor(1, mp_context=spawn) as process,
    ):
        result = process.submit(anyio.run, measure, path, args.budget * MIB, lengths, args.kernels).result()
    share = result["peak_rss_bytes"] / result["limit_bytes"]
    beside = result["peak_rss_bytes"] - result["baseline_bytes"] - result["peak_lease_bytes"]
    print(f"\n  beside baseline and leases: {format_bytes(max(0, beside))} at the most", end="")
    print(f"\n  peak_rss_of_limit {share:7.3f}  (at most 1: {'met' if share <= 1 else 'MISSED'})")
    print(json.dumps({**result, "checks": {"peak_rss_of_limit": share}}))
    if share > 1:
        raise SystemExit(1)


async def measure(path: Path, budget: int, lengths: range, kernels: str) -> dict[str, Any]:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    async with Engine(path, memory_budget=budget, config=EngineConfig(kernels=kernels)) as engine:
        print(engine.plan, flush=True)
        baseline = engine.statistics().baseline_bytes
        limit = baseline + budget + BESIDE_BUDGET_BYTES
        print(
            f"limit: {format_bytes(limit)}: {format_bytes(baseline)} baseline, {format_bytes(budget)} budget, "
            f"{format_bytes(BESIDE_BUDGET_BYTES)} beside them",
            flush=True,
        )
        first = 0
        for num_tokens in lengths:
            await engine.complete([2 + (num_tokens + idx) % 1000 for idx in range(num_tokens)], params)
            engine.drop_prefixes()
            first = first or process_rss_bytes()
            if num_tokens // 50 > (num_tokens - lengths.step) // 50 or num_tokens == lengths[-1]:
                now, peak = format_bytes(process_rss_bytes()), format_bytes(_peak_rss_bytes())
                print(f"  {num_tokens:4} tokens: {now}, {peak} at the most", flush=True)
        leases = engine.statistics().peak_bytes_in_use
    return {
        "limit_bytes": limit,
        "baseline_bytes": baseline,
        "budget_bytes": budget,
        "peak_lease_bytes": leases,
        "first_rss_bytes": first,
        "last_rss_bytes": process_rss_bytes(),
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _peak_rss_bytes() -> int:
    """The peak of this program alone. `getrusage` also counts what the process held before it started this program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the system does not tell the most memory that a process held")


if __name__ == "__main__":
    main()
