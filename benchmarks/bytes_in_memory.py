"""Measures one session of a checkpoint whose weights all stay in memory, also beside llama.cpp."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
from transformers import LlamaConfig

from benchmarks.checks import Check
from benchmarks.environments import llama_cpp_environment
from benchmarks.gguf import run_side
from benchmarks.gguf_files import gguf_file
from benchmarks.processes import run_alone
from benchmarks.sessions import measure_point
from hermes_async import Engine, EngineConfig, SamplingParams

PROMPT_TOKENS = 8
_UVLOOP = {"use_uvloop": True}
_COUNTERPARTS = {"int4": "Q4_0", "int8": "Q8_0"}  # formats of llama.cpp with about as many bits
_OF_LLAMA_CPP = 0.7  # of its tokens a second
_KERNELS = ("auto", "fastest")

Record = dict[str, Any]


def config(kernels: str = "auto") -> EngineConfig:
    return EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False, kernels=kernels)


def prompt() -> list[int]:
    return [300 + idx * 17 for idx in range(PROMPT_TOKENS)]


async def warm_up(engine: Engine) -> None:
    await engine.complete(prompt(), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))


def figures(point: Record) -> Record:
    if point["sweep_seconds"] is None:
        raise SystemExit("the prompt took all the time: give more --tokens")
    return {key: point[key] for key in ("sweep_seconds", "decode_tokens_per_s", "compute_seconds")}


def run_in_memory(path: Path, num_tokens: int, kernels: str = "auto") -> Record:
    """One session with all weights in memory: what dequantizing and computing take alone."""
    return anyio.run(_measure, path, num_tokens, kernels, backend_options=_UVLOOP)


async def _measure(path: Path, num_tokens: int, kernels: str) -> Record:
    budget = 2 * stored_bytes(path) + 2**30
    async with Engine(path, memory_budget=budget, config=config(kernels)) as engine:
        if engine.plan.bytes_per_sweep:
            raise SystemExit(f"{path}: not all weights are resident in twice their bytes")
        await warm_up(engine)
        return figures(await measure_point(engine, [prompt()], max(num_tokens, PROMPT_TOKENS)))


def stored_bytes(path: Path) -> int:
    """Bytes of a checkpoint's files of weights."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


# --- beside each other, and beside llama.cpp ---


def report_in_memory(
    paths: dict[str, Path], model: LlamaConfig, num_tokens: int, rounds: int, llama_cpp: tuple[Path, Path | None] | None
) -> dict[str, Record]:
    """The medians of some rounds by format, in which the engine and llama.cpp alternate.

    Args:
        model: Of which llama.cpp gets a file with random weights.
        llama_cpp: The folder in which it is built, and the one for its files; None leaves it out.
    """
    python = None if llama_cpp is None else llama_cpp_environment(llama_cpp[0])
    print(f"\nall in memory, one session\n  {'':10} {'kernels':>9} {'sweep s':>8} {'tokens/s':>9}", flush=True)
    found: dict[str, Record] = {}
    for name, path in paths.items():
        recipe = _COUNTERPARTS.get(name)
        with _counterpart(model, recipe, python, llama_cpp) as case:
            rows: dict[str, list[Record]] = {}
            for idx in range(rounds):
                sides = [*_KERNELS, *([] if case is None else ["llama.cpp"])]
                for side in sides[:: 1 if idx % 2 else -1]:
                    rows.setdefault(side, []).append(_row(side, path, case, num_tokens))
        found[name] = {
            side: {key: statistics.median(row[key] for row in rows[side]) for key in rows[side][0]} for side in sides
        }
        _print_rows(name, recipe, found[name])
    return found


@contextmanager
def _counterpart(
    model: LlamaConfig, recipe: str | None, python: Path | None, llama_cpp: tuple[Path, Path | None] | None
) -> Iterator[Record | None]:
    """What llama.cpp runs; None if there is nothing."""
    if recipe is None or python is None or llama_cpp is None:
        yield None
        return
    with gguf_file(model, recipe, llama_cpp[1]) as file:
        yield {"python": python, "path": file, "share": 0.0, "limit": 0}


def _row(side: str, path: Path, case: Record | None, num_tokens: int) -> Record:
    if side != "llama.cpp" or case is None:
        return run_alone(run_in_memory, path, num_tokens, side)
    asked = {"numbers": [1], "tokens": max(num_tokens, PROMPT_TOKENS)}
    point = run_side("llama.cpp", case, asked)["points"][0]
    return {
        "sweep_seconds": statistics.median(point["step_seconds"]),
        "decode_tokens_per_s": point["decode_tokens_per_s"],
    }


def _print_rows(name: str, recipe: str | None, rows: Record) -> None:
    for side, row in rows.items():
        label, kernels = (recipe, side) if side == "llama.cpp" else (name, side)
        print(
            f"  {label:10} {kernels:>9} {row['sweep_seconds']:8.4f} {row['decode_tokens_per_s']:9.2f}",
            flush=True,
        )


def checks_in_memory(found: dict[str, Record], formats: Sequence[str]) -> dict[str, Check]:
    """Tokens a second with the fastest kernels, as a share of llama.cpp's."""
    checks: dict[str, Check] = {}
    for name, recipe in _COUNTERPARTS.items():
        if name not in formats:
            continue
        key = f"{name}, all in memory: tokens_per_s_to_llama_cpp_{recipe}"
        rows = found.get(name, {})
        if "llama.cpp" not in rows:
            checks[key] = "llama.cpp was left out"
            continue
        ratio = rows["fastest"]["decode_tokens_per_s"] / rows["llama.cpp"]["decode_tokens_per_s"]
        checks[key] = (ratio, _OF_LLAMA_CPP, "at least")
    return checks
