"""Lets every point of every scenario go wrong, in each way, one after another.

    python -m tests.every_failure [--scenario NAME ...] [--kind KIND ...] [--stride N [--first N]]

Prints what was tried for each scenario, and what faults did that they may not do. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
import transformers

from tests.every_failure.every_failure import every, try_faults
from tests.every_failure.points import FAULTS
from tests.every_failure.scenarios import SCENARIOS


def main() -> int:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", choices=names, help="only this one; may be given several times")
    parser.add_argument("--kind", action="append", choices=FAULTS, help="only points of this kind; as --scenario")
    parser.add_argument("--stride", type=int, default=1, help="try every so manieth point (default 1: all of them)")
    parser.add_argument("--first", type=int, default=1, help="the first point that is tried (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    choice = every(tuple(args.kind or FAULTS), args.stride, args.first)
    report = {}
    for scenario in SCENARIOS:
        if args.scenario and scenario.name not in args.scenario:
            continue
        started = time.monotonic()
        tried = try_faults(scenario, choice, lambda what, name=scenario.name: print(f"  {name}: {what}", flush=True))
        points = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(tried.points.items()))
        took = f"{time.monotonic() - started:.0f} s"
        print(
            f"{scenario.name}: points: {points}; {tried.num_runs} runs in {took}; broken: {len(tried.broken)}",
            flush=True,
        )
        report[scenario.name] = {"points": tried.points, "runs": tried.num_runs, "broken": len(tried.broken)}
    print(json.dumps(report))
    return int(any(entry["broken"] for entry in report.values()))


if __name__ == "__main__":
    sys.exit(main())
