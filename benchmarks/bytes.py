"""Measures what fewer bytes give: quantized checkpoints beside the same model in bf16, in the same memory budget.

    python -m benchmarks.bytes [--size 3] [--budget 0.4] [--limits 500,0] [--formats fp8,int4,int4_machine,...]
                               [--tokens 16] [--rounds 3] [--no-llama-cpp] [--folder FOLDER]

A quick try: --size 0.6 --tokens 6 --rounds 1. Needs root: the page cache is dropped before each measurement, and the
disk is held by a cgroup. llama.cpp is built once, as for `benchmarks.gguf`.

While the disk is the limit, a sweep takes its stored bytes over the disk's rate. So a token of a model in 8 or 4 bits
costs a half or a quarter, and less in the same budget, because more of the model stays in memory. A sweep takes at
least max(read, dequantize and compute). The read is measured with plain direct reads of the same extents. Dequantizing
and computing alone is a sweep of an engine in which all weights stay.

The Layer Profiler measures each checkpoint first, with the disk held as in the measurement, so that plans are made for
this disk. Its profiles are kept in a folder of the benchmark, which is deleted at the end.

Each format is given a share of its own bytes as budget, and bf16 the same bytes. Both engines are open at once, and
take turns: what the machine does meanwhile, it does to both. Weights are random; each format has its true layout. Last
come rows with all weights in memory: the engine with both kinds of kernels, and llama.cpp on the same shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import torch

from benchmarks.bytes_in_memory import (
    checks_in_memory,
    config,
    figures,
    prompt,
    report_in_memory,
    run_in_memory,
    stored_bytes,
    warm_up,
)
from benchmarks.checkpoints import llama_config
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.processes import preload, run_alone
from benchmarks.profiles import print_profile, profile_store, run_profile
from benchmarks.quantized_checkpoints import FORMATS, quantized_checkpoint
from benchmarks.sessions import measure_point, read_seconds
from hermes_async import Engine, EngineConfig, HermesError, format_bytes
from hermes_async.engine.opening import open_model
from hermes_async.memory.library_caches import reused_heap
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import PlainEncoding, StoredMatrix
from hermes_async.storage.tensor_spec import TensorSpec

MIB = 2**20

_FORMATS = "fp8,int4,int4_machine,int8,q4_k_m"
_HELD_AT = 500  # MiB/s, where tokens a second have a target
_RATIO_TARGETS = {"fp8": 1.9, "int4": 3.3, "int4_machine": 3.3}  # tokens a second to those of bf16
_ELEMENT_TARGETS = {"fp8": 4e9, "int4": 1e9, "q4_k_m": 1e9}  # a second and core
_BLOCK_ELEMENTS = 1 << 20
_DEQUANTIZED_ELEMENTS = 1 << 27  # of several matrices, more than caches have
_DEQUANTIZING_ROUNDS = 5

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB of weights in bf16 (default 3)")
    parser.add_argument("--budget", type=float, default=0.4, help="share of a format's bytes as budget (default 0.4)")
    parser.add_argument("--limits", default="500,0", help="MiB/s that the disk is held at; 0: not held (default 500,0)")
    parser.add_argument("--formats", default=_FORMATS, help=f"default {_FORMATS}")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each measurement (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, whose medians count (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    parser.add_argument("--no-llama-cpp", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hermes-async").expanduser(), help="for llama.cpp")
    args = parser.parse_args()
    names, limits = args.formats.split(","), [int(limit) for limit in args.limits.split(",")]
    unknown = [name for name in names if name not in FORMATS or name == "bf16"]
    if unknown or args.tokens < 3:
        parser.error(f"unknown formats: {', '.join(unknown)}" if unknown else "three tokens are needed")
    preload("benchmarks.sessions", "benchmarks.quantized_checkpoints", "hermes_async.profiler.profiler")
    model = llama_config(int(args.size * 2**30), torch.bfloat16)
    with ExitStack() as exits:
        exits.enter_context(profile_store())
        paths = {
            name: exits.enter_context(quantized_checkpoint(FORMATS[name], model, args.folder))
            for name in ("bf16", *names)
        }
        print(f"bf16: {format_bytes(stored_bytes(paths['bf16']))} of weights; page cache bypassed (direct reads)")
        dequantizers = report_dequantizers({name: paths[name] for name in names})
        measured = {"bf16": paths["bf16"]} | {name: paths[name] for name in names if "error" not in dequantizers[name]}
        runs = report_limits(measured, args.budget, limits, args.tokens, args.rounds)
        llama_cpp = None if args.no_llama_cpp else (args.cache, args.folder)
        in_memory = report_in_memory(measured, model, args.tokens, args.rounds, llama_cpp)
    checks = _checks(runs, dequantizers) | checks_in_memory(in_memory, names)
    print_checks(checks)
    result = {"dequantizers": dequantizers, "runs": runs, "in_memory": in_memory}
    print(json.dumps({"checks": figures_of(checks), **result}))


def report_dequantizers(paths: dict[str, Path]) -> dict[str, Record]:
    records = {}
    for name, path in paths.items():
        records[name] = run_alone(measure_dequantizer, path)
        _print_dequantizer(name, records[name])
    return records


def report_limits(
    paths: dict[str, Path], share: float, limits: Sequence[int], num_tokens: int, rounds: int
) -> list[Record]:
    """Profiles each checkpoint at each limit, and runs each format beside bf16."""
    runs: list[Record] = []
    bf16 = paths["bf16"]
    alone = {name: run_alone(run_in_memory, path, num_tokens) for name, path in paths.items() if name != "bf16"}
    for limit in limits:
        print()
        profiles = {}
        for name, path in paths.items():
            profiles[name] = run_alone(run_profile, path, int(share * stored_bytes(path)), limit)
            print_profile(name, profiles[name])
        for name, resident in alone.items():
            pair = run_alone(run_pair, paths[name], bf16, share, limit, num_tokens, rounds)
            runs.append(_with_limits({"format": name, "limit": limit, "resident": resident, **pair}))
            runs[-1]["profiles"] = {"quantized": profiles[name], "bf16": profiles["bf16"]}
            _print_run(runs[-1])
    return runs


def _with_limits(run: Record) -> Record:
    own, plain = run["quantized"], run["bf16"]
    own["to_read"] = own["sweep_seconds"] / own["read_seconds"]
    own["to_limit"] = own["sweep_seconds"] / max(own["read_seconds"], run["resident"]["sweep_seconds"])
    return run | {"tokens_to_bf16": own["decode_tokens_per_s"] / plain["decode_tokens_per_s"]}


def _checks(runs: Sequence[Record], dequantizers: Record) -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for name, record in dequantizers.items():
        key = f"{name}: elements_per_s_and_core"
        if "error" in record:
            checks[key] = record["error"]
        elif name in _ELEMENT_TARGETS:
            checks[key] = (record["elements_per_s"] / 1e9, _ELEMENT_TARGETS[name] / 1e9, "at least")
    for run in runs:
        name, limit, own = run["format"], run["limit"], run["quantized"]
        if not limit:
            checks[f"{name}, disk not held: sweep_to_limit"] = (own["to_limit"], 1.15, "at most")
        elif run["limit_error"] is not None:
            checks[f"{name}, held at {limit}"] = run["limit_error"]
        else:
            checks[f"{name}, held at {limit}: sweep_to_read"] = (own["to_read"], 1.05, "at most")
            if limit == _HELD_AT and name in _RATIO_TARGETS:
                checks[f"{name}, held at {limit}: tokens_per_s_to_bf16"] = (
                    run["tokens_to_bf16"],
                    _RATIO_TARGETS[name],
                    "at least",
                )
    return checks


# --- one format beside bf16, in a process of its own ---


def run_pair(path: Path, bf16: Path, share: float, limit: int, num_tokens: int, rounds: int) -> Record:
    """One session on the format and on bf16, in the same budget, with the disk held at `limit` MiB/s (0: not held)."""
    nbytes = stored_bytes(path)
    with limited_disk(bf16, limit * MIB or None) as error:
        pair = anyio.run(
            measure_pair, path, bf16, int(share * nbytes), num_tokens, rounds, backend_options={"use_uvloop": True}
        )
    return {"limit_error": error, "stored_bytes": nbytes, "budget_bytes": int(share * nbytes), **pair}


async def measure_pair(path: Path, bf16: Path, budget: int, num_tokens: int, rounds: int) -> Record:
    """The medians of some rounds, in which both engines generate, in alternating order."""
    rows: dict[str, list[Record]] = {"quantized": [], "bf16": []}
    async with (
        Engine(path, memory_budget=budget, config=config()) as quantized,
        Engine(bf16, memory_budget=budget, config=config()) as plain,
    ):
        engines = {"quantized": quantized, "bf16": plain}
        for name, engine in engines.items():
            print(f"{name}: {engine.plan}", flush=True)
            if engine.plan.bytes_per_sweep == 0:
                raise SystemExit("everything is resident, and nothing is read: give a smaller --budget")
            await warm_up(engine)
        for idx in range(rounds):
            for name, engine in list(engines.items())[:: 1 if idx % 2 else -1]:
                before = await read_seconds(engine.plan)
                point = await measure_point(engine, [prompt()], num_tokens)
                read_s = (before + await read_seconds(engine.plan)) / 2
                rows[name].append(figures(point) | {"read_seconds": read_s})
        plans = {name: engine.plan.as_dict() for name, engine in engines.items()}
    medians = {
        name: {key: statistics.median(each[key] for each in rounds_of) for key in rounds_of[0]}
        for name, rounds_of in rows.items()
    }
    return medians | {"plans": plans}


# --- the dequantizer alone, in a process of its own ---


def measure_dequantizer(path: Path) -> Record:
    """Elements a second of one thread, in blocks as one token has them, and the bits of a stored weight.

    Of a mixture of encodings: all elements over the seconds of all. If the engine refuses the checkpoint: its message.
    """
    try:
        opened = open_model(path, "1TiB", EngineConfig())
    except HermesError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    opened.close()
    torch.set_num_threads(1)
    matrices = [matrix for one in opened.skeleton.encoded.values() if _is_matrix(one) for matrix in one.matrices]
    matrices = [matrix for matrix in matrices if not isinstance(matrix.encoding, PlainEncoding)]
    if not matrices:
        return {"error": "no weight of it is dequantized"}
    stored = sum(spec.nbytes for matrix in matrices for spec in matrix.parts.values())
    total = sum(torch.Size(matrix.shape).numel() for matrix in matrices)
    chosen: list[StoredMatrix] = []
    num_elements = 0
    for matrix in matrices:
        if num_elements < _DEQUANTIZED_ELEMENTS:
            chosen.append(matrix)
            num_elements += torch.Size(matrix.shape).numel()
    dtype = opened.skeleton.dtype
    parts = [{part: _read(spec) for part, spec in matrix.parts.items()} for matrix in chosen]
    seconds = []
    with torch.inference_mode(), reused_heap():
        for _ in range(_DEQUANTIZING_ROUNDS):
            started = time.thread_time()  # of the processor: what other processes take does not count
            for matrix, tensors in zip(chosen, parts, strict=True):
                _dequantize(matrix, tensors, dtype)
            seconds.append(time.thread_time() - started)
    return {
        "bits_per_weight": 8 * stored / total,
        "elements_per_s": num_elements / statistics.median(seconds),
        "encodings": sorted({matrix.encoding.name for matrix in matrices}),
    }


def _is_matrix(parameter: EncodedParameter) -> bool:
    return not parameter.whole and len(parameter.shape) == 2


def _read(spec: TensorSpec) -> torch.Tensor:
    with Path(spec.file).open("rb") as file:
        file.seek(spec.offset)
        data = bytearray(file.read(spec.nbytes))
    return torch.frombuffer(data, dtype=torch.uint8).view(spec.dtype).view(spec.shape)


def _dequantize(matrix: StoredMatrix, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    rows, columns = matrix.shape
    step = matrix.encoding.row_step
    block_rows = min(rows, max(step, _BLOCK_ELEMENTS // columns // step * step))
    out = torch.empty((block_rows, columns), dtype=dtype)
    for start in range(0, rows, block_rows):
        stop = min(rows, start + block_rows)
        matrix.encoding.dequantize(parts, start, stop, out[: stop - start])


# --- tables ---


def _print_dequantizer(name: str, record: Record) -> None:
    if "error" in record:
        print(f"\n{name}: not measured: {record['error']}", flush=True)
        return
    print(
        f"\n{name} ({', '.join(record['encodings'])}): {record['bits_per_weight']:.3f} bits a weight, dequantized at "
        f"{record['elements_per_s'] / 1e9:.2f}e9 elements a second by one thread",
        flush=True,
    )


def _print_run(run: Record) -> None:
    held = f"held at {run['limit']} MiB/s" if run["limit"] else "not held"
    if run["limit"] and run["limit_error"] is not None:
        held = f"NOT held: {run['limit_error']}"
    print(
        f"\n{run['format']}: {format_bytes(run['stored_bytes'])} stored, both in {format_bytes(run['budget_bytes'])}; "
        f"disk {held}; dequantizing and computing alone {run['resident']['sweep_seconds']:.3f} s"
    )
    print(f"  {'':10} {'sweep s':>8} {'read s':>8} {'compute s':>9} {'tokens/s':>9}")
    for name, label in (("quantized", run["format"]), ("bf16", "bf16")):
        one = run[name]
        print(
            f"  {label:10} {one['sweep_seconds']:8.3f} {one['read_seconds']:8.3f} {one['compute_seconds']:9.3f} "
            f"{one['decode_tokens_per_s']:9.2f}"
        )
    own = run["quantized"]
    print(
        f"  {run['tokens_to_bf16']:.2f} times the tokens of bf16; a sweep takes {own['to_read']:.3f} times its read, "
        f"and {own['to_limit']:.3f} times max(read, dequantize and compute)",
        flush=True,
    )


if __name__ == "__main__":
    main()
