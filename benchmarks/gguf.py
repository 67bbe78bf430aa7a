"""Measures decoding from one GGUF file beside llama.cpp, each within the same memory.

    python -m benchmarks.gguf [--size 3] [--types Q4_K_M,Q8_0,Q4_0] [--shares 0.3,0.5,0.8,0] [--limits 500,0]
                              [--sessions 1,16] [--tokens 8] [--rounds 3] [--folder DIR]

A quick try: --size 1 --types Q8_0 --shares 0.5 --limits 500 --sessions 1 --rounds 1. Needs root, cgroups of version 1
(memory and blkio), a C++ compiler for llama.cpp, and the package `gguf`. llama.cpp is built once for this processor, in
an environment of its own in a folder for caches.

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
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import LlamaConfig

from benchmarks.checkpoints import llama_config
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.folders import temporary_folder
from benchmarks.gguf_files import RECIPES, write_gguf
from benchmarks.memory_group import line_of, memory_group
from benchmarks.processes import drop_page_cache, preload, run_alone
from benchmarks.profiles import print_profile, profile_store, run_profile
from benchmarks.sessions import measure_point
from hermes_async import Engine, EngineConfig, format_bytes

MIB = 2**20
LLAMA_CPP = "llama-cpp-python==0.3.36"
SIDES = ("engine", "llama.cpp")

_LLAMA_CPP_CHILD = str(Path(__file__).with_name("llama_cpp_decode.py"))
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
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hermes-async").expanduser(), help="for llama.cpp")
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        anyio.run(_inside, json.loads(args.inside), backend_options={"use_uvloop": True})
        return
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


def llama_cpp_environment(cache: Path) -> Path:
    """The Python of an environment that has llama.cpp, built for this processor. Makes it if it is not there.

    A virtual machine may list a processor's matrix instructions (AMX) and end a program that uses them. Then llama.cpp
    is built without them.
    """
    folder = cache / LLAMA_CPP.replace("==", "-")
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        for flags in ("", "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"):
            _build(folder, flags)
            code = _tried(python, cache)
            if code == 0:
                complete.write_text(f"built for this processor {flags}")
                break
            print(f"llama.cpp ends with code {code}, built with the flags {flags!r}", flush=True)
        else:
            raise SystemExit("llama.cpp does not run on this machine")
    text = "import llama_cpp; print(llama_cpp.__version__, llama_cpp.llama_print_system_info().decode())"
    said = subprocess.run([python, "-I", "-c", text], check=True, capture_output=True, text=True).stdout
    print(f"llama-cpp-python {said.strip()} {complete.read_text()}", flush=True)
    return python


def _build(folder: Path, flags: str) -> None:
    print(f"building {LLAMA_CPP} in {folder}; it takes some minutes", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    names = ["--no-binary", "llama-cpp-python", "--no-cache-dir", LLAMA_CPP]
    options = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CFLAGS": flags, "CXXFLAGS": flags}
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *names], env=os.environ | options, check=True)


def _tried(python: Path, folder: Path) -> int:
    """The exit code of llama.cpp after it decoded from a very small file."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    with gguf_file(config, "Q4_K_M", folder) as path:
        arguments = [python, "-I", _LLAMA_CPP_CHILD, path, "1,16", "3", str(_PROMPT_TOKENS), "copied"]
        return subprocess.run(arguments, input="go\n" * 2, stdout=subprocess.DEVNULL, text=True).returncode


@contextmanager
def gguf_file(config: LlamaConfig, recipe: str, folder: Path | None) -> Iterator[Path]:
    """A file of `config` with random weights, which is deleted at the end."""
    with temporary_folder(folder) as path:
        write_gguf(path / "model.gguf", config, recipe)
        yield path / "model.gguf"


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


# --- one run, from outside of its group ---


def run_side(side: str, case: Record, asked: Record) -> Record:
    """Decodes with one side in a memory cgroup of its own, with an empty page cache."""
    path, numbers = str(case["path"]), ",".join(map(str, asked["numbers"]))
    if side == "engine":
        inside = {"path": path, "numbers": asked["numbers"], "tokens": asked["tokens"]}
        arguments, python = ["-m", "benchmarks.gguf", "--inside", json.dumps(inside)], Path(sys.executable)
    else:
        layout = "mapped" if case["share"] else "copied"
        arguments = ["-I", _LLAMA_CPP_CHILD, path, numbers, str(asked["tokens"]), str(_PROMPT_TOKENS), layout]
        python = case["python"]
    drop_page_cache()
    with memory_group(None) as group:
        process = group.start(arguments, python)
        try:
            if line_of(process.stdout) != "ready":
                raise SystemExit(f"{side} did not start")
            baseline = group.used_bytes
            if case["share"]:
                group.limit(baseline + int(case["share"] * Path(path).stat().st_size))
            with limited_disk(Path(path), case["limit"] * MIB or None, process.pid) as error, group.sampled():
                _say(process)
                said = line_of(process.stdout)
                while said and not said.startswith("{"):
                    print(f"  {side}: {said}", flush=True)
                    said = line_of(process.stdout)
            if said:
                _say(process)
            process.wait()
        finally:
            process.kill()
            process.wait()
        if not said:
            raise SystemExit(f"{side} failed with exit code {process.returncode}; {group.num_killed} processes killed")
        record: Record = json.loads(said)
        wrong = error if case["limit"] else None
        return record | {
            "baseline_bytes": baseline,
            "peak_used_bytes": group.peak_used_bytes,
            "limit_error": wrong,
        }


def _say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


# --- the engine's side, inside of the group ---


async def _inside(asked: Record) -> None:
    _tell("ready")
    config = EngineConfig(
        max_sequences=max(asked["numbers"]),
        prompt_lookup=False,  # random weights repeat themselves, and their repetitions would be drafted
        share_prefixes=False,
    )
    started = time.perf_counter()
    points = []
    async with Engine(asked["path"], config=config) as engine:
        opened = time.perf_counter() - started
        for number in asked["numbers"]:
            point = await measure_point(engine, [_prompt(seed) for seed in range(number)], asked["tokens"])
            if point["decode_tokens_per_s"] is None:
                raise SystemExit("the prompts took all the time: give more --tokens")
            points.append(point)
        plan = engine.plan.as_dict()
    _tell(json.dumps({"opening_s": opened, "points": points, "plan": plan}))


def _tell(text: str) -> None:
    """Prints a line, and waits for one."""
    print(text, flush=True)
    sys.stdin.readline()


def _prompt(seed: int) -> list[int]:
    return [1 + (seed * 131 + idx * 17) % 1000 for idx in range(_PROMPT_TOKENS)]


if __name__ == "__main__":
    main()
