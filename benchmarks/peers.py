"""Decodes one checkpoint with the engine, llama.cpp, accelerate, AirLLM, oLLM and transformers, in the same memory.

    python -m benchmarks.peers [--size 6] [--small] [--sides engine,llama.cpp,...] [--shares 0.3,0.5,0.8,0]
                               [--limits 500,0] [--sessions 32] [--tokens 8] [--prompts 512,2048] [--runs 3]
                               [--threads N] [--timeout 1800] [--no-profile] [--folder DIR] [--cache DIR] [--json FILE]
                               [--plot FOLDER]

A quick try: --small --shares 0.5,0 --limits 500 --runs 1. Needs root, cgroups (memory, and blkio or io), a C++ compiler
for llama.cpp, the package `gguf`, disk space for three times the weights, and 6 GiB in the folder for caches. There,
each library is installed once from PyPI, in an environment of its own and with pinned versions.

A run is a process of its own in a memory cgroup. Its limit is a share of the weights' bytes above what the process
holds when it has imported everything; 0 stands for no limit. The page cache is empty before each run, and counts
towards the limit. A run opens the model, generates from a prompt of 8 tokens, and then computes one token of each
longer prompt. A second run has several sessions at once, for the engine and for llama.cpp. The sides alternate, and
medians count.

All get the same weights in bf16: a checkpoint of a Llama's shape, its tensors in a GGUF file, AirLLM's files of single
layers. Writing these is not measured. Neither is the Layer Profiler, which runs first with the disk held as in the
runs.

    engine            `memory_budget="auto"`
    llama.cpp         maps the file. With a limit it computes with the mapped bytes (`--no-repack`)
    llama.cpp-direct  reads the file with direct I/O into memory of its own (`--load-mode dio`)
    accelerate        `device_map="auto"`, with as much of the limit for weights as the kernel lets it have, and the
                      others offloaded to the disk; only with a limit
    airllm            `AutoModel.from_pretrained(..., device="cpu")`
    ollm              `Inference(..., device="cpu")`
    transformers      `from_pretrained`: only without a limit

A side that fails has its error in the table. A token needs all weights, and those that are not in memory are read. So
one session has at most rate / (weights - memory) tokens a second; the table says so for each limit.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import peers_report
from benchmarks.checks import figures_of, print_checks
from benchmarks.environments import CACHE
from benchmarks.memory_group import MemoryGroupError, memory_group
from benchmarks.peer_sides import SIDES, Files, files, fitting_config, pythons, split_for_airllm
from benchmarks.processes import forget_files, preload, run_within
from benchmarks.profiles import print_profile, profile_store, run_profile
from benchmarks.side_runs import default_threads, prompt, run_program
from hermes_async import format_bytes

Record = dict[str, Any]

_PROMPT_TOKENS = 8
_MANY = ("engine", "llama.cpp")  # run several sessions at once
_PROFILED_IN = 0.5  # of the weights, so that some stages stream and some stay
_PROFILE_S = 900.0
_OFFLOAD_SHARES = (1.0, 0.85, 0.7, 0.5, 0.3)  # of the limit, for weights that accelerate keeps in memory
_SMALL_GIB = 1.5
_LEAST_TOKENS_OF_MANY = 16  # so that some are decoded by all sessions at once, after the last prompt


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))  # so that processes and files are removed
    names: list[str] = args.sides.split(",")
    config = fitting_config(_SMALL_GIB if args.small else args.size, names, args.folder)
    wrong = _without_limits()
    if wrong is not None:
        print(f"no limits on memory: {wrong}\nonly the rows without a limit are measured", flush=True)
    print("versions:", flush=True)
    found, errors = pythons([SIDES[name] for name in names], args.cache)
    preload("hermes_async.profiler.profiler")
    with profile_store(), files(config, [name for name in names if name in found], args.folder) as made:
        prepared = None
        if "airllm" in found:
            prepared = split_for_airllm(made, found["airllm"], args.threads)
            if prepared["error"] is not None:
                errors["airllm"] = f"its files cannot be written: {prepared['error']}"
        print(f"\n{format_bytes(made.weight_bytes)} of weights, {args.threads} threads", flush=True)
        rows, profiles = [], []
        for limit in args.limits:
            if not args.no_profile:
                profiles.append(_profile(made, limit))
            for case in _cases(args, limit):
                runs = _measure(case, args, made, found, errors, wrong)
                rows += (measured := peers_report.rows(case, runs, made.weight_bytes))
                print("\n".join(peers_report.lines(case, measured, made.weight_bytes)), flush=True)
                result = {
                    "weight_bytes": made.weight_bytes,
                    "threads": args.threads,
                    "versions": {name: SIDES[name].versions for name in names},
                    "airllm_split_s": None if prepared is None else prepared.get("opening_s"),
                    "profiles": profiles,
                    "rows": rows,
                }
                if args.json is not None:
                    args.json.write_text(json.dumps(result))
    checks = peers_report.checks(rows)
    print_checks(checks)
    if args.plot is not None:
        peers_report.draw(rows, args.plot)
    result["checks"] = figures_of(checks)
    if args.json is not None:
        args.json.write_text(json.dumps(result))
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=6.0, help="GiB that the weights take in bf16 (default 6)")
    parser.add_argument("--small", action="store_true", help=f"{_SMALL_GIB} GiB instead")
    parser.add_argument("--sides", default=",".join(SIDES), help="which (default: all)")
    parser.add_argument("--shares", default="0.3,0.5,0.8,0", help="of the weights, as memory; 0: no limit")
    parser.add_argument("--limits", default="500,0", help="MiB/s that the disk is held at; 0: not held (default 500,0)")
    parser.add_argument("--sessions", type=int, default=32, help="at once in the second run; 0: none (default 32)")
    parser.add_argument("--tokens", type=int, default=8, help="of each session, 16 or more of several (default 8)")
    parser.add_argument("--prompts", default="512,2048", help="tokens of further prompts (default 512,2048)")
    parser.add_argument("--runs", type=int, default=3, help="runs, whose medians count (default 3)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each side (default: all cores)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a run is ended (default 1800)")
    parser.add_argument("--no-profile", action="store_true", help="do not run the Layer Profiler first")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the files: the disk to measure")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where libraries are installed")
    parser.add_argument("--json", type=Path, default=None, help="write the result into this file too, after each case")
    parser.add_argument("--plot", type=Path, default=None, help="draw a PNG for each limit there (needs matplotlib)")
    args = parser.parse_args()
    if unknown := set(args.sides.split(",")) - SIDES.keys():
        parser.error(f"unknown sides: {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    if args.tokens < 3 or args.sessions < 0 or args.runs < 1 or args.threads < 1:
        parser.error("at least three tokens, one run and one thread are needed")
    if find_spec("gguf") is None and "llama.cpp" in args.sides:
        parser.error("the file for llama.cpp is written with the package gguf: pip install gguf")
    try:
        args.shares = [float(share) for share in args.shares.split(",")]
        args.limits = [int(limit) for limit in args.limits.split(",")]
        args.prompts = [int(number) for number in args.prompts.split(",") if number]
    except ValueError as error:
        parser.error(f"numbers with commas between them are needed: {error}")
    if not all(0 <= share < 1 for share in args.shares) or min(args.limits) < 0 or min([*args.prompts, 1]) < 1:
        parser.error("shares are from 0 to 1, and limits and prompts are positive")
    return args


def _without_limits() -> str | None:
    """Why there are no limits on memory; None if there are."""
    try:
        with memory_group(None):
            return None
    except MemoryGroupError as error:
        return str(error)


def _profile(made: Files, limit: int) -> Record | None:
    try:
        profile = run_within(_PROFILE_S, run_profile, made.checkpoint, int(_PROFILED_IN * made.weight_bytes), limit)
    except (TimeoutError, EOFError) as error:
        print(f"  not profiled: {type(error).__name__}", flush=True)
        return None
    print_profile("  engine", profile)
    return profile


def _cases(args: argparse.Namespace, limit: int) -> Iterator[Record]:
    for share in args.shares:
        for sessions in (1, args.sessions) if args.sessions > 1 else (1,):
            names = [
                name
                for name in args.sides.split(",")
                if SIDES[name].runs_in(share) and (sessions == 1 or name in _MANY)
            ]
            yield {"limit": limit, "share": share, "sessions": sessions, "sides": names}


def _measure(
    case: Record,
    args: argparse.Namespace,
    made: Files,
    found: dict[str, Path],
    errors: dict[str, str],
    wrong: str | None,
) -> dict[str, list[Record]]:
    """The runs of each side. A side that fails is not tried again."""
    runs: dict[str, list[Record]] = {name: [] for name in case["sides"]}
    points = _points(case["sessions"], args)
    for idx in range(args.runs):
        for name in case["sides"][:: -1 if idx % 2 else 1]:
            if any(run["error"] is not None for run in runs[name]):
                continue
            error = errors.get(name)
            if wrong is not None and case["share"]:
                error = "not measured: nothing limits the memory"
            if error is not None:
                runs[name].append({"points": [], "error": error})
                continue
            runs[name].append(_run(name, case, points, args, made, found[name], runs[name], wrong is None))
    return runs


def _points(sessions: int, args: argparse.Namespace) -> list[Record]:
    first = {"prompts": [prompt(_PROMPT_TOKENS, seed) for seed in range(sessions)], "tokens": args.tokens}
    if sessions > 1:
        return [first | {"tokens": max(args.tokens, _LEAST_TOKENS_OF_MANY)}]
    return [first, *({"prompts": [prompt(number, number)], "tokens": 1} for number in args.prompts)]


def _run(
    name: str,
    case: Record,
    points: list[Record],
    args: argparse.Namespace,
    made: Files,
    python: Path,
    before: Sequence[Record],
    grouped: bool,
) -> Record:
    """One run; of accelerate, the first that the kernel does not end, with fewer and fewer weights in memory."""
    memory = int(case["share"] * made.weight_bytes) or None
    offload = before[-1]["offload_share"] if before and name == "accelerate" else None
    shares = [None] if name != "accelerate" else [offload] if offload is not None else _OFFLOAD_SHARES
    for share in shares:
        kept = None if share is None or memory is None else int(share * memory)
        asked = made.asked(SIDES[name], case["share"], kept) | {"threads": args.threads, "points": points}
        cached = forget_files([made.checkpoint, made.own])
        record = run_program(
            SIDES[name].program,
            asked,
            python,
            memory_bytes=memory,
            disk_limit=case["limit"],
            grouped=grouped,
            timeout_s=args.timeout,
        )
        record |= {"offload_share": share, "cache_error": cached}
        if not record["out_of_memory"]:
            break
    return record


if __name__ == "__main__":
    main()
