"""Measures what fewer bytes give: quantized checkpoints beside the same model in bf16, in the same memory budget.

    python -m benchmarks.bytes [--size 3] [--budget 0.4] [--limits 500,0] [--formats fp8,int4,q4_k_m] [--tokens 16]
                               [--rounds 3] [--folder FOLDER]

A quick try: --size 0.3 --tokens 6 --rounds 1. While the disk is the limit, a sweep takes its stored bytes over the
disk's rate. So a token of a model in 8 or 4 bits costs a half or a quarter, and less in the same budget, because more
of the model stays in memory. A sweep takes at least max(read, dequantize and compute). The read is measured with plain
direct reads of the same extents. Dequantizing and computing alone is a sweep of an engine in which all weights stay.

Each format is given a share of its own bytes as budget, and bf16 the same bytes. Both engines are open at once, and
take turns: what the machine does meanwhile, it does to both. Weights are random; each format has its true layout.
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

from benchmarks.checkpoints import llama_config
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.processes import preload, run_alone
from benchmarks.quantized_checkpoints import FORMATS, quantized_checkpoint
from benchmarks.sessions import measure_point, read_seconds
from hermes_async import Engine, EngineConfig, HermesError, SamplingParams, format_bytes
from hermes_async.engine.opening import open_model
from hermes_async.memory.library_caches import reused_heap
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import PlainEncoding, StoredMatrix
from hermes_async.storage.tensor_spec import TensorSpec

MIB = 2**20

_PROMPT_TOKENS = 8
_HELD_AT = 500  # MiB/s, where tokens a second have a target
_RATIO_TARGETS = {"fp8": 1.9, "int4": 3.3}  # tokens a second to those of bf16
_ELEMENT_TARGETS = {"fp8": 4e9, "int4": 1e9, "q4_k_m": 1e9}  # a second and core
_BLOCK_ELEMENTS = 1 << 18
_DEQUANTIZED_ELEMENTS = 1 << 27  # of several matrices, more than caches have
_DEQUANTIZING_ROUNDS = 5

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB of weights in bf16 (default 3)")
    parser.add_argument("--budget", type=float, default=0.4, help="share of a format's bytes as budget (default 0.4)")
    parser.add_argument("--limits", default="500,0", help="MiB/s that the disk is held at; 0: not held (default 500,0)")
    parser.add_argument("--formats", default="fp8,int4,q4_k_m", help="default fp8,int4,q4_k_m; there is int8, too")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each measurement (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, whose medians count (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    args = parser.parse_args()
    names = args.formats.split(",")
    unknown = [name for name in names if name not in FORMATS or name == "bf16"]
    if unknown or args.tokens < 3:
        parser.error(f"unknown formats: {', '.join(unknown)}" if unknown else "three tokens are needed")
    preload("benchmarks.sessions", "benchmarks.quantized_checkpoints")
    config = llama_config(int(args.size * 2**30), torch.bfloat16)
    with ExitStack() as exits:
        paths = {
            name: exits.enter_context(quantized_checkpoint(FORMATS[name], config, args.folder))
            for name in ("bf16", *names)
        }
        report(paths, args.budget, [int(limit) for limit in args.limits.split(",")], args.tokens, args.rounds)


def report(paths: dict[str, Path], share: float, limits: Sequence[int], num_tokens: int, rounds: int) -> None:
    bf16 = paths.pop("bf16")
    print(f"bf16: {format_bytes(stored_bytes(bf16))} of weights; page cache bypassed (direct reads)", flush=True)
    runs: list[Record] = []
    dequantizers: Record = {}
    for name, path in paths.items():
        dequantizers[name] = run_alone(measure_dequantizer, path)
        _print_dequantizer(name, dequantizers[name])
        if "error" in dequantizers[name]:
            continue
        for limit in limits:
            runs.append(run_alone(run_pair, name, path, bf16, share, limit, num_tokens, rounds))
            _print_run(runs[-1])
    checks = _checks(runs, dequantizers)
    print_checks(checks)
    print(json.dumps({"checks": figures_of(checks), "dequantizers": dequantizers, "runs": runs}))


def stored_bytes(path: Path) -> int:
    """Bytes of a checkpoint's files of weights."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


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


def run_pair(name: str, path: Path, bf16: Path, share: float, limit: int, num_tokens: int, rounds: int) -> Record:
    """One session on the format and on bf16, in the same budget, with the disk held at `limit` MiB/s (0: not held)."""
    nbytes = stored_bytes(path)
    uvloop = {"use_uvloop": True}
    resident = anyio.run(measure_resident, path, nbytes, num_tokens, backend_options=uvloop)
    with limited_disk(bf16, limit * MIB or None) as error:
        pair = anyio.run(measure_pair, path, bf16, int(share * nbytes), num_tokens, rounds, backend_options=uvloop)
    own, plain = pair["quantized"], pair["bf16"]
    own["to_read"] = own["sweep_seconds"] / own["read_seconds"]
    own["to_limit"] = own["sweep_seconds"] / max(own["read_seconds"], resident["sweep_seconds"])
    return {
        "format": name,
        "limit": limit,
        "limit_error": error,
        "stored_bytes": nbytes,
        "budget_bytes": int(share * nbytes),
        "resident": resident,
        "tokens_to_bf16": own["decode_tokens_per_s"] / plain["decode_tokens_per_s"],
        **pair,
    }


async def measure_resident(path: Path, nbytes: int, num_tokens: int) -> Record:
    """One session with all weights in memory: what dequantizing and computing take alone."""
    async with Engine(path, memory_budget=2 * nbytes + 2**30, config=_config()) as engine:
        if engine.plan.bytes_per_sweep:
            raise SystemExit(f"{path}: not all weights are resident in twice their bytes")
        await _warm_up(engine)
        return _figures(await measure_point(engine, [_prompt()], max(num_tokens, _PROMPT_TOKENS)))


async def measure_pair(path: Path, bf16: Path, budget: int, num_tokens: int, rounds: int) -> Record:
    """The medians of some rounds, in which both engines generate, in alternating order."""
    rows: dict[str, list[Record]] = {"quantized": [], "bf16": []}
    async with (
        Engine(path, memory_budget=budget, config=_config()) as quantized,
        Engine(bf16, memory_budget=budget, config=_config()) as plain,
    ):
        engines = {"quantized": quantized, "bf16": plain}
        for name, engine in engines.items():
            print(f"{name}: {engine.plan}", flush=True)
            if engine.plan.bytes_per_sweep == 0:
                raise SystemExit("everything is resident, and nothing is read: give a smaller --budget")
            await _warm_up(engine)
        for idx in range(rounds):
            for name, engine in list(engines.items())[:: 1 if idx % 2 else -1]:
                before = await read_seconds(engine.plan)
                point = await measure_point(engine, [_prompt()], num_tokens)
                read_s = (before + await read_seconds(engine.plan)) / 2
                rows[name].append(_figures(point) | {"read_seconds": read_s})
        plans = {name: engine.plan.as_dict() for name, engine in engines.items()}
    medians = {
        name: {key: statistics.median(each[key] for each in rounds_of) for key in rounds_of[0]}
        for name, rounds_of in rows.items()
    }
    return medians | {"plans": plans}


def _figures(point: Record) -> Record:
    if point["sweep_seconds"] is None:
        raise SystemExit("the prompt took all the time: give more --tokens")
    return {key: point[key] for key in ("sweep_seconds", "decode_tokens_per_s", "compute_seconds")}


async def _warm_up(engine: Engine) -> None:
    await engine.complete(_prompt(), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))


def _config() -> EngineConfig:
    return EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False)


def _prompt() -> list[int]:
    return [300 + idx * 17 for idx in range(_PROMPT_TOKENS)]


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
