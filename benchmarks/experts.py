"""Measures what experts on demand give: mixtures that read just the experts that tokens are routed to.

    python -m benchmarks.experts [--size 15] [--formats bf16,fp8,mxfp4] [--budget 0.2] [--limit 500] [--zipf 0,1]
                                 [--sessions 1,2,4,...,64] [--tokens 24] [--rounds 2] [--folder FOLDER] [--true-shape]

A quick try: --size 2 --formats bf16 --sessions 1,4 --rounds 1 --prompt 0. Widths are those of Qwen3-30B-A3B, and
for MXFP4 those of gpt-oss-120b. Weights are random. Routers choose all experts about as often, or with a Zipf-like
skew, and what they choose is printed. The same engine reading all experts of each layer in each sweep stands beside
it, in the same budget, or in the smallest one that it works in if that is more. Both are open at once and take turns:
what the machine does meanwhile, it does to both. The disk is held at a steady rate, and plain direct reads of the same
extents measure it.

A sweep must read the always-used weights that are not resident, and each expert that it needs and that is not in
memory. It is known what a layer needs when its router has computed, so a sweep takes at least the bytes over the disk's
rate, and beside that: what is computed outside of experts (attention, norms, routers, the head, and the time between
two sweeps), and one expert of each layer, that which was read last. `--true-shape` instead opens all 48 layers in FP8
in 6 GiB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.expert_checkpoints import FORMATS, config_of_size, mixture_checkpoint, mixture_config, set_routes
from benchmarks.expert_sweeps import NAMES, measure_shape, measure_sides
from benchmarks.processes import preload, run_alone
from hermes_async import format_bytes

MIB = 2**20

_SPEEDUPS = {0.0: 6.0, 1.0: 10.0}  # tokens a second of one session against reading all, by the routes' skew
_TRUE_LAYERS = 48
_TRUE_BUDGET = 6 * 2**30

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=15.0, help="GiB of each checkpoint (default 15)")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"default {','.join(FORMATS)}")
    parser.add_argument("--budget", type=float, default=0.2, help="share of the weights given as budget (default 0.2)")
    parser.add_argument("--limit", type=int, default=500, help="MiB/s that the disk is held at; 0: not held")
    parser.add_argument("--zipf", default="0,1", help="exponents of the routes' skew; 0: none (default 0,1)")
    parser.add_argument("--sessions", default="1,2,4,8,16,32,64", help="numbers of sessions (default 1,2,4,...,64)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each session (default 24)")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of a long prompt; 0: none (default 2000)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, whose medians count (default 2)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    parser.add_argument("--true-shape", action="store_true", help="open all of Qwen3-30B-A3B in FP8 in 6 GiB, instead")
    args = parser.parse_args()
    names = args.formats.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown or args.tokens < 4:
        parser.error(f"unknown formats: {', '.join(unknown)}" if unknown else "four tokens are needed")
    preload("benchmarks.expert_sweeps")
    if args.true_shape:
        report_true_shape(args)
        return
    numbers = sorted({int(number) for number in args.sessions.split(",")})
    runs: list[Record] = []
    for name in names:
        with mixture_checkpoint(name, config_of_size(name, int(args.size * 2**30)), args.folder) as path:
            for zipf in map(float, args.zipf.split(",")):
                set_routes(path, zipf)
                runs.append(run_alone(run_routes, name, path, zipf, numbers, args))
                _print_run(runs[-1])
    checks = _checks(runs)
    print_checks(checks)
    print(json.dumps({"checks": figures_of(checks), "runs": runs}))


def run_routes(name: str, path: Path, zipf: float, numbers: Sequence[int], args: argparse.Namespace) -> Record:
    """Both sides on one checkpoint; in a process of its own, whose reads are held at `args.limit` MiB/s."""
    nbytes = stored_bytes(path)
    budget = int(args.budget * nbytes)
    limit = args.limit * MIB or None
    uvloop = {"use_uvloop": True}
    print(f"\n{name}, skew {zipf:g}: {format_bytes(nbytes)} of weights, {format_bytes(budget)}", flush=True)
    with limited_disk(path, limit) as error:
        asked = (numbers, args.tokens, args.prompt, args.rounds)
        record = anyio.run(measure_sides, path, budget, *asked, backend_options=uvloop)
    return {
        "format": name,
        "zipf": zipf,
        "limit": args.limit,
        "limit_error": error if limit else None,
        "stored_bytes": nbytes,
        "budget_bytes": budget,
        **record,
    }


def stored_bytes(path: Path) -> int:
    """Bytes of a checkpoint's files of weights."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _checks(runs: Sequence[Record]) -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for run in runs:
        key = f"{run['format']}, skew {run['zipf']:g}"
        if run["limit_error"] is not None:
            checks[f"{key}: disk held"] = run["limit_error"]
        for point in run["points"]:
            own, number = point["on demand"], point["sessions"]
            if number == 1:
                checks[f"{key}: bytes_to_needed_bytes"] = (own["bytes"] / own["needed_bytes"], 1.05, "at most")
                checks[f"{key}: sweep_to_limit"] = (own["sweep_seconds"] / own["limit_seconds"], 1.1, "at most")
                if run["zipf"] in _SPEEDUPS:
                    checks[f"{key}: tokens_to_reading_all"] = (point["speedup"], _SPEEDUPS[run["zipf"]], "at least")
            else:
                checks[f"{key}: seconds_of_{number}_to_reading_all"] = (1 / point["speedup"], 1.03, "at most")
        if run["prompt"] is not None:
            checks[f"{key}: prompt_to_reading_all"] = (run["prompt"]["ratio"], 1.0, "at most")
    return checks


def _print_run(run: Record) -> None:
    held = f"held at {run['limit']} MiB/s" if run["limit"] else "not held"
    if run["limit_error"] is not None:
        held = f"NOT held: {run['limit_error']}"
    routes = run["routes"]
    print(
        f"\n{run['format']}, skew {run['zipf']:g}, disk {held}. Routes of one session: a tenth of a layer's experts "
        f"has {routes['top_tenth']:.2f} of the choices, and {routes['of_last_token']:.2f} of the choices are those of "
        f"the token before. They are as hard to guess as even choices among {routes['perplexity']:.0f} of "
        f"{routes['num_experts']} experts"
    )
    for name in NAMES:
        print(f"  {name}: {format_bytes(run['budgets'][name])}, opened in {run['opening_seconds'][name]:.1f} s")
    print(
        f"  {'sessions':>8} {'':>10} {'tokens/s':>8} {'sweep s':>8} {'union':>6} {'hits':>5} {'GiB read':>8} "
        f"{'needed':>7} {'read s':>7} {'outside':>7} {'limit s':>7} {'speedup':>7}"
    )
    for point in run["points"]:
        for name in NAMES:
            one = point[name]
            line = f"  {point['sessions']:8} {name:>10} {one['tokens_per_s']:8.3f} {one['sweep_seconds']:8.3f} "
            if name == NAMES[0]:
                line += (
                    f"{one['union']:6.1f} {one['hit_rate']:5.2f} {one['bytes'] / 2**30:8.3f} "
                    f"{one['needed_bytes'] / 2**30:7.3f} {one['read_seconds']:7.3f} {one['outside_seconds']:7.3f} "
                    f"{one['limit_seconds']:7.3f} {point['speedup']:7.2f}"
                )
            else:
                line += f"{'':6} {'':5} {one['bytes'] / 2**30:8.3f}"
            print(line)
    if run["prompt"] is not None:
        prompt = run["prompt"]
        seconds = ", ".join(f"{name} {prompt[name]:.1f} s" for name in NAMES)
        print(f"  a prompt of {prompt['num_tokens']} tokens: {seconds} ({prompt['ratio']:.2f})", flush=True)


# --- the true shape ---


def report_true_shape(args: argparse.Namespace) -> None:
    config = mixture_config("fp8", _TRUE_LAYERS)
    with mixture_checkpoint("fp8", config, args.folder) as path:
        set_routes(path, 1.0)
        print(
            f"Qwen3-30B-A3B's shape in FP8: {format_bytes(stored_bytes(path))}, {format_bytes(_TRUE_BUDGET)}",
            flush=True,
        )
        record = run_alone(run_true_shape, path, args)
    print(
        f"opened in {record['opening_seconds']:.1f} s, resident weights in memory after "
        f"{record['loaded_seconds']:.1f} s; {record['tokens_per_s']:.2f} tokens a second of one session, hit rate "
        f"{record['hit_rate']:.2f}; peak of the leases {format_bytes(record['peak_lease_bytes'])}, of the process "
        f"{format_bytes(record['peak_rss_bytes'])}"
    )
    checks: dict[str, Check] = {
        "leases_of_budget": (record["peak_lease_bytes"] / record["budget_bytes"], 1, "at most"),
        "peak_rss_of_limit": (record["peak_rss_bytes"] / record["limit_bytes"], 1, "at most"),
    }
    print_checks(checks)
    print(json.dumps({"checks": figures_of(checks), **record}))


def run_true_shape(path: Path, args: argparse.Namespace) -> Record:
    with limited_disk(path, args.limit * MIB or None) as error:
        record = anyio.run(measure_shape, path, _TRUE_BUDGET, args.tokens, backend_options={"use_uvloop": True})
    return {"limit": args.limit, "limit_error": error, **record}


if __name__ == "__main__":
    main()
