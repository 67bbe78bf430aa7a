"""Measures decoding from one GGUF file beside llama.cpp, each within the same memory.

    python -m benchmarks.gguf [--size 3] [--types Q4_K_M,Q8_0,Q4_0] [--shares 0.3,0.5,0.8,0] [--limits 500,0]
                              [--sessions 1,16] [--tokens 8] [--rounds 3] [--folder DIR]

A quick try: --size 1 --types Q8_0 --shares 0.5 --limits 500 --sessions 1 --rounds 1. Needs root, cgroups (memory, and
blkio or io), a C++ compiler for llama.cpp, and the package `gguf`. llama.cpp is built once for this processor, in an
environment of its own in a folder for caches.

Each run is a process of its own in a memory cgroup. Its limit is a share of the file's bytes above what the process
holds when it has imported everything, so that both have as much for the model. The page cache is empty before each run,
and it counts towards the limit: llama.cpp maps the file, as it does by default. With a limit it computes with the
mapped bytes (`--no-repack`). By default it copies weights into the layout of its kernels; the copy does not fit, and
the kernel ends the process. Without a limit it does that. The Layer Profiler measures each file first, with the disk
held as in the runs; its profiles are deleted at the end.

A token needs all weights. Those that are not in memory are read, so a token takes at least (file - memory) / rate. A
mapped file whose pages are used in turn keeps few of them until they are used again. Then nearly the whole file is read
for each token. Both sides decode what follows prompts of a few tokens, and only the decode phase counts. The sides
alternate, and medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import llama_config
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.environments import CACHE, LLAMA_CPP, llama_cpp_environment
from benchmarks.gguf_files import RECIPES, gguf_file
from benchmarks.processes import drop_page_cache, preload, run_alone
from benchmarks.profiles import print_profile, profile_store, run_profile
from benchmarks.side_runs import default_threads, prompt, run_program
from hermes_async import format_bytes

MIB = 2**20
SIDES = ("engine", "llama.cpp")

_PROMPT_TOKENS = 8
_PROFILED_IN = 0.5  # of the file, so that some stages stream and some stay
_TARGETS = {0.3: 1.3, 0.5: 1.8, 0.8: 4.0}  # times llama.cpp's tokens/s of one session, the disk held
_TARGET_LIMIT = 500  # MiB/s

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB that the weights take in bf16 (default 3)")
    parser.add_argument("--types", default=",".join(RECIPES), help="kinds of files (default: all)")
    parser.add_argument("--shares", default="0.3,0.5,0.8,0", help="of the file, as memory; 0: no limit (default: all)")
    parser.add_argument("--limits", default="500,0", help="MiB/s that the disk is held at; 0: not held (default 500,0)")
    parser.add_argument("--sessions", default="1,16", help="numbers of sessions (default 1,16)")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of each session (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, whose medians count (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the files: the disk to measure")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for llama.cpp")
    args = parser.parse_args()
    numbers = sorted({int(number) for number in args.sessions.split(",")})
    if numbers[0] < 1 or args.tokens < 3:
        parser.error("at least one session and three tokens are needed")
    if find_spec("gguf") is None:
        raise SystemExit("files are written with the package gguf: pip install gguf")
    python = llama_cpp_environment(args.cache)
    shares, limits = [float(share) for share in args.shares.split(",")], [int(one) for one in args.limits.split(",")]
    preload("hermes_async.profiler.profiler")
    config = llama_config(int(args.size * 2**30), torch.bfloat16)
    files = []
    with profile_store():
        for recipe in args.types.split(","):
            with gguf_file(config, recipe, args.folder) as path:
                case = {"python": python, "path": path}
                cases = [case | {"share": share, "limit": limit} for limit in limits for share in shares]
                files.append(report(recipe, path, cases, {"numbers": numbers, "tokens": args.tokens}, args.rounds))
    checks = _checks(files)
    print_checks(checks)
    print(json.dumps({"checks": figures_of(checks), "llama_cpp": LLAMA_CPP, "files": files}))


def report(recipe: str, path: Path, cases: Sequence[Record], asked: Record, rounds: int) -> Record:
    """Runs all cases of one file."""
    nbytes = path.stat().st_size
    print(f"\n{recipe}: {format_bytes(nbytes)}", flush=True)
    print(f"  {'memory':>7} {'MiB/s':>6} {'sessions':>8} {'side':>10} {'tokens/s':>9} {'of disk':>9} {'ratio':>7}")
    done = []
    profiles: dict[int, Record] = {}
    for case in cases:  # those of one limit come one after another: a file has one profile at a time
        limit = case["limit"]
        if limit not in profiles:
            profiles[limit] = run_alone(run_profile, path, int(_PROFILED_IN * nbytes), limit)
            print_profile(f"  {recipe}", profiles[limit])
        runs: dict[str, list[Record]] = {side: [] for side in SIDES}
        for idx in range(rounds):
            for side in SIDES[:: 1 if idx % 2 else -1]:
                runs[side].append(run_side(side, case, asked))
        for place, number in enumerate(asked["numbers"]):
            record: Record = {"share": case["share"], "limit": case["limit"], "sessions": number}
            for side in SIDES:
                rates = [run["points"][place]["decode_tokens_per_s"] for run in runs[side]]
                record[side] = {
                    "tokens_per_s": statistics.median(rates),
                    "rounds": [run["points"][place] for run in runs[side]],
                    "peak_used_bytes": max(run["peak_used_bytes"] for run in runs[side]),
                    "baseline_bytes": max(run["baseline_bytes"] for run in runs[side]),
                    "limit_error": next((run["limit_error"] for run in runs[side] if run["limit_error"]), None),
                }
            record["ratio"] = record["engine"]["tokens_per_s"] / record["llama.cpp"]["tokens_per_s"]
            record["disk_tokens_per_s"] = _disk_limit(nbytes, case, number)
            _print_point(record)
            done.append(record)
    return {"type": recipe, "file_bytes": nbytes, "profiles": profiles, "points": done}


def _disk_limit(nbytes: int, case: Record, sessions: int) -> float | None:
    """Tokens/s if the disk alone took time, and all memory held weights."""
    if not case["limit"] or not 0 < case["share"] < 1:
        return None
    return float(sessions * case["limit"] * MIB / (nbytes * (1 - case["share"])))


def _print_point(record: Record) -> None:
    share = f"{record['share']:.0%}" if record["share"] else "all"
    disk = record["disk_tokens_per_s"]
    for side in SIDES:
        rate = record[side]["tokens_per_s"]
        of_limit = f"{rate / disk:9.3f}" if disk else " " * 9
        ratio = f"{record['ratio']:7.2f}" if side == SIDES[-1] else ""
        held = record["limit"] or "free"
        print(f"  {share:>7} {held:>6} {record['sessions']:8} {side:>10} {rate:9.2f} {of_limit} {ratio}", flush=True)


def _checks(files: Sequence[Record]) -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for file in files:
        for point in file["points"]:
            target = _TARGETS.get(point["share"])
            if target is None or point["limit"] != _TARGET_LIMIT:
                continue
            error = point["engine"]["limit_error"] or point["llama.cpp"]["limit_error"]
            least = target if point["sessions"] == 1 else 1.0
            name = f"{file['type']}: tokens_per_s_to_llama_cpp_at_{point['share']:.0%}_of_{point['sessions']}"
            checks[name] = error or (point["ratio"], least, "at least")
    return checks


# --- one run ---


def run_side(side: str, case: Record, asked: Record) -> Record:
    """Decodes with one side in a memory cgroup of its own, with an empty page cache."""
    points = [
        {"prompts": [prompt(_PROMPT_TOKENS, seed) for seed in range(number)], "tokens": asked["tokens"]}
        for number in asked["numbers"]
    ]
    inside: Record = {"path": str(case["path"]), "threads": default_threads(), "points": points}
    program, python = "benchmarks.engine_decode", Path(sys.executable)
    if side != "engine":
        program, python = "benchmarks.llama_cpp_decode", case["python"]
        inside["load"] = "mapped" if case["share"] else "copied"
    memory = int(case["share"] * case["path"].stat().st_size) or None
    drop_page_cache()
    record = run_program(program, inside, python, memory_bytes=memory, disk_limit=case["limit"])
    if record["error"] is not None:
        raise SystemExit(f"{side} failed: {record['error']}")
    return record


if __name__ == "__main__":
    main()
