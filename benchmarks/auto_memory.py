"""Checks that `memory_budget="auto"` stays within hard limits, and uses nearly all that they leave.

    python -m benchmarks.auto_memory [--trials sessions,engines,processes,page_cache,share] [--folder DIR]

Needs root, the memory controller of cgroups, 4 GiB of memory and 2 GiB of disk.
Makes checkpoints with true shapes as sparse files: their weights are zeros, which take as much memory as others. Each
trial runs in a cgroup of its own. The kernel enforces its limit, and kills a process that exceeds it. The trials:

    sessions     16 short sessions at once with a small model, in 320 and 350 MiB
    engines      two automatic engines in one process in 1,500 MiB, one after the other and both at once
    processes    two processes with an automatic engine each, started together, in 1,500 and 1,000 MiB
    page_cache   one engine in 2,104 MiB, where the page cache holds a file that was read twice
    share        one engine in 500, 1,000 and 2,000 MiB

The baseline is the cgroup's use after its processes have imported torch, transformers and this package, and before an
engine opens. The ceiling for engines is (limit - baseline). `taken` is the share of the ceiling that the plans'
budgets and the memory set aside beside them take: at least 0.90, for models that are larger. `used` is the largest
share that was in memory, without page cache that can be reclaimed. It is less if there are few requests, because
memory for KV and activations is meant for more of them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from transformers import LlamaConfig

from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.folders import temporary_folder
from benchmarks.memory_group import let_go_on, line_of, memory_group
from hermes_async import Engine, SamplingParams
from hermes_async.memory.available import OVERHEAD_BYTES

MIB = 2**20

_LEAST_SHARE = 0.90
_LEAST_OF_FAIR_SHARE = 0.8
_NUM_REQUESTS = 16
_LARGER = 1.3  # a model than its limit
_SHAPES = {  # hidden, intermediate, heads, key heads, vocabulary
    "small": (768, 2048, 12, 4, 8_000),
    "SmolLM2 360M": (960, 2560, 15, 5, 49_152),
    "Qwen2.5 0.5B": (896, 4864, 14, 2, 151_936),
    "Llama 3.2 1B": (2048, 8192, 32, 8, 128_256),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", default=",".join(_TRIALS), help="which (default: all)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints")
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        anyio.run(_inside, json.loads(args.inside))
        return
    records = [record for name in args.trials.split(",") for record in _TRIALS[name](args.folder)]
    broken = [f"{record['trial']}: {fault}" for record in records for fault in record["broken"]]
    print(*broken, sep="\n")
    print(json.dumps({"trials": records, "broken": broken}))
    if broken:
        raise SystemExit(1)


# --- the trials ---


def sessions(folder: Path | None) -> Iterator[dict[str, Any]]:
    with _checkpoint("small", 120, folder) as path:
        for limit in (320, 350):
            yield _tried(f"sessions in {limit} MiB", limit, [{"path": path, "requests": "sessions"}], least=None)


def engines(folder: Path | None) -> Iterator[dict[str, Any]]:
    with _checkpoint("Llama 3.2 1B", 1500 * _LARGER, folder) as path:
        for how in ("one after the other", "both at once"):
            inside = {"path": path, "requests": "plain", "engines": 2, "together": how == "both at once"}
            yield _tried(f"two engines, {how}", 1500, [inside])


def processes(folder: Path | None) -> Iterator[dict[str, Any]]:
    for shape, limit in (("Llama 3.2 1B", 1500), ("SmolLM2 360M", 1000)):
        with _checkpoint(shape, limit * _LARGER, folder) as path:
            inside = {"path": path, "requests": "plain"}
            yield _tried(f"two processes in {limit} MiB", limit, [inside, inside])


def page_cache(folder: Path | None) -> Iterator[dict[str, Any]]:
    with _checkpoint("Llama 3.2 1B", 2104 * _LARGER, folder) as path, _file(1300 * MIB, folder) as file:
        yield _tried("page cache", 2104, [{"path": path, "requests": "plain", "cached": file}])


def share(folder: Path | None) -> Iterator[dict[str, Any]]:
    for shape, limit in (("SmolLM2 360M", 500), ("Qwen2.5 0.5B", 1000), ("Llama 3.2 1B", 2000)):
        with _checkpoint(shape, limit * _LARGER, folder) as path:
            yield _tried(f"share of {limit} MiB", limit, [{"path": path, "requests": "plain"}])


_TRIALS = {trial.__name__: trial for trial in (sessions, engines, processes, page_cache, share)}


@contextmanager
def _checkpoint(shape: str, size_mib: float, folder: Path | None) -> Iterator[str]:
    hidden, intermediate, heads, key_heads, vocabulary = _SHAPES[shape]
    layer = hidden * (2 * hidden + 2 * hidden * key_heads // heads + 3 * intermediate)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=round((size_mib * MIB / 2 - vocabulary * hidden) / layer),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with sparse_checkpoint(config, folder) as path:
        yield str(path)


@contextmanager
def _file(num_bytes: int, folder: Path | None) -> Iterator[str]:
    with temporary_folder(folder) as made:
        path = made / "read"
        with path.open("wb") as file:
            for _ in range(num_bytes // MIB):
                file.write(bytes(MIB))
        subprocess.run(["sync", path], check=True)
        yield str(path)


# --- one trial, from outside of its group ---


def _tried(trial: str, limit_mib: int, insides: list[dict[str, Any]], least: float | None = _LEAST_SHARE) -> Any:
    limit = limit_mib * MIB
    with memory_group(limit) as group, ExitStack() as exits:
        started = []
        for inside in insides:
            process = group.start(["-m", "benchmarks.auto_memory", "--inside", json.dumps(inside)])
            exits.callback(end_process, process)
            started.append(process)
        ready = [line_of(process.stdout) for process in started]
        baseline = group.used_bytes
        cached = group.page_cache_bytes
        with group.sampled():
            for process in started:
                let_go_on(process)
            said = [line_of(process.stdout) for process in started]
            for process in started:  # none leaves before all have used their memory
                let_go_on(process)
            codes = [process.wait() for process in started]
        record = {
            "trial": trial,
            "limit_bytes": limit,
            "baseline_bytes": baseline,
            "page_cache_bytes": cached,
            "peak_used_bytes": group.peak_used_bytes,
            "exit_codes": codes,
            "killed": group.num_killed,
        }
    ended = [json.loads(text) for text in said if text]
    budgets = [budget for one in ended for budget in one["budgets"]]
    ceiling = limit - baseline
    record |= {
        "used": (group.peak_used_bytes - baseline) / ceiling,
        "taken": (sum(budgets) + len(insides) * OVERHEAD_BYTES) / ceiling,
        "budgets": budgets,
        "first_budgets": [budget for one in ended for budget in one["first_budgets"]],
        "peak_lease_bytes": [leases for one in ended for leases in one["peak_lease_bytes"]],
    }
    record["broken"] = broken = []
    if not all(ready) or any(codes) or record["killed"]:
        broken.append(f"not all processes came to an end: {codes}, {record['killed']} killed")
    elif least is not None:
        if record["taken"] < least:
            broken.append(f"{record['taken']:.3f} of what there is were taken, less than {least}")
        fair = _LEAST_OF_FAIR_SHARE * sum(budgets) / len(budgets)
        if min(budgets) < fair:
            broken.append(f"one budget is {min(budgets) / MIB:.0f} MiB, less than {fair / MIB:.0f}")
    print(
        f"{trial:32} limit {limit_mib:5}  baseline {baseline / MIB:5.0f}  peak {group.peak_used_bytes / MIB:5.0f}  "
        f"taken {record['taken']:5.3f}  used {record['used']:5.3f}  "
        f"budgets {' + '.join(f'{budget / MIB:.0f}' for budget in budgets)}"
        f"{'  BROKEN' if broken else ''}",
        flush=True,
    )
    return record


def end_process(process: subprocess.Popen[str]) -> None:
    """Ends a process, and closes its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()


# --- inside of the group ---


async def _inside(trial: dict[str, Any]) -> None:
    if "cached" in trial:
        await anyio.to_thread.run_sync(_read_twice, Path(trial["cached"]))
    tell("ready")
    path, opened = trial["path"], trial.get("engines", 1)
    async with AsyncExitStack() as exits:
        engines = [Engine(path) for _ in range(opened)]
        if trial.get("together"):
            async with anyio.create_task_group() as group:
                for engine in engines:
                    group.start_soon(exits.enter_async_context, engine)
        else:
            for engine in engines:
                await exits.enter_async_context(engine)
                await _ask(engine, trial["requests"])
        first = [engine.plan.memory_budget for engine in engines]
        async with anyio.create_task_group() as group:
            for engine in engines:
                group.start_soon(_ask, engine, trial["requests"])
        budgets = [engine.plan.memory_budget for engine in engines]
        leases = [engine.statistics().peak_bytes_in_use for engine in engines]
        await anyio.to_thread.run_sync(
            tell, json.dumps({"budgets": budgets, "first_budgets": first, "peak_lease_bytes": leases})
        )


def _read_twice(path: Path) -> None:
    for _ in range(2):
        with path.open("rb", buffering=0) as file:
            while file.read(MIB):
                pass


def tell(text: str) -> None:
    """Writes a line, and waits for one."""
    print(text, flush=True)
    sys.stdin.readline()


async def _ask(engine: Engine, requests: str) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    numbers = random.Random(0)

    async def session() -> None:
        async with engine.session() as chat:
            for _ in range(2):
                prompt = [numbers.randrange(2, 1000) for _ in range(numbers.randrange(4, 40))]
                async for _ in chat.generate(prompt, params):
                    pass

    async def prompt(num_tokens: int) -> None:
        await engine.complete([numbers.randrange(2, 1000) for _ in range(num_tokens)], params)

    async with anyio.create_task_group() as group:
        if requests == "sessions":
            for _ in range(16):
                group.start_soon(session)
        else:
            for _ in range(_NUM_REQUESTS):
                group.start_soon(prompt, numbers.randrange(2, 9))


if __name__ == "__main__":
    main()
