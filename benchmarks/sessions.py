"""Measures what many sessions at once cost, and what prompt lookup saves, while the disk is the limit.

    python -m benchmarks.sessions [--size 3] [--dtype bfloat16] [--budget 0.4] [--limit 500] [--sessions 1,2,4,...,64]
                                  [--tokens 64]

A decode sweep reads all weights that are not resident, for any number of sessions, and computes one token of each. So
it takes at least max(read, compute), and n sessions get at most n / max(read, compute) tokens a second: n times one
session's, until computing takes longer than reading. A prompt takes one sweep for each of its chunks, and all prompts
share the tokens of a sweep. Prompt lookup drafts tokens, which a sweep verifies with the next one. If a of them are
right, a sweep gives 1 + a tokens, and never more. A CPU without bf16 instructions is slow at many bf16 tokens, and
computes longer than the disk reads. There, float32 shows what sharing gives. The disk is held at a steady rate, and
the same run measures that rate with plain direct reads of the same extents.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import plots
from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.folders import temporary_folder
from benchmarks.soak import float32_copy
from benchmarks.sweep import disk_seconds
from hermes_async import Engine, EngineConfig, EngineStatistics, Plan, SamplingParams, format_bytes
from hermes_async.demo import MODEL_PATH
from hermes_async.engine.opening import open_model

MIB = 2**20

_PROMPT_TOKENS = (16, 128)
_READ_BYTES = 2 * 2**30
_NEWCOMERS = (16, 44, 72, 100, 128)
_DEMO_SLOWDOWN = 10
_DEMO_BUDGET = 0.8
_DEMO_TOKENS = 128
_DEMO_TEXT = """First Citizen:
We have no corn, and the gods know it well;
Who speaks for us? The senate is not kind.

MENENIUS:
Good friends, the helms of the state do care for you;
Go home, go home, and pray for better days.

"""
_RUNS = (1, 2, 4, 6, 9, 16, 32)
_LOOKUP_NOTE = (
    "with drafts of k tokens, each right with chance p whatever the others are, a sweep gives "
    "(1 - p^(k+1)) / (1 - p) tokens: at most 1.5 for p = 1/3. A third of the drafted tokens gives more only where "
    "right ones come in runs, as copied text has them: 1 + k/3 tokens a sweep. This task has such runs."
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sessions", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=3.0, help="GiB of weights (default 3)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--budget", type=float, default=0.4, help="share of the weights given as budget (default 0.4)")
    parser.add_argument("--limit", type=int, default=500, help="MiB/s that the disk is held at (default 500)")
    parser.add_argument("--sessions", default="1,2,4,8,16,32,64", help="numbers of sessions (default 1,2,4,...,64)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each session (default 64)")
    parser.add_argument("--sweep-tokens", type=int, default=None, help="most tokens of a sweep (default: the plan's)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    parser.add_argument("--checkpoint", type=Path, default=None, help="use this one instead of making one")
    parser.add_argument("--plot", type=Path, default=None, help="draw the points into this PNG file (needs matplotlib)")
    parser.add_argument("--skip-lookup", action="store_true", help="leave prompt lookup out")
    parser.add_argument("--child", choices=["sessions", "demo", "copies"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sessions = sorted({int(count) for count in args.sessions.split(",")})
    if args.sessions[0] < 1 or args.tokens < 2:
        parser.error("at least one session and two tokens are needed")
    if args.child is not None:
        child(args)
    elif args.checkpoint is not None:
        report(args, args.checkpoint)
    else:
        dtype = getattr(torch, args.dtype)
        config = llama_config(int(args.size * 2**30), dtype)
        with random_checkpoint(config, dtype, args.folder) as path:
            report(args, path)


def report(args: argparse.Namespace, path: Path) -> None:
    result: dict[str, Any] = {"sessions": run_child("sessions", path)}
    if not args.skip_lookup:
        result |= {"demo": run_child("demo", path), "copies": run_child("copies", path)}
    checks = _checks(result)
    print_checks(checks)
    for kind, part in result.items():
        if part["limit_error"] is not None:
            print(f"  {kind}: the disk was not held: {part['limit_error']}")
    if args.plot is not None:
        draw(result["sessions"]["points"], args.plot)
    print(json.dumps({"checks": figures_of(checks), **result}))


def _checks(result: dict[str, Any]) -> dict[str, Check]:
    points, newcomers = result["sessions"]["points"], result["sessions"]["newcomers"]
    first, last = points[0], points[-1]
    most = last["sessions"]
    checks: dict[str, Check] = {}
    if first["sessions"] != 1 or most == 1:
        checks["tokens_per_s_of_one_session"] = "give --sessions 1 and a larger number"
    else:
        ratio = last["tokens_per_s"] / first["tokens_per_s"]
        checks[f"tokens_per_s_of_{most}_to_one_session"] = (ratio, most * 50 / 64, "at least")
    extra = result["sessions"]["extra_session_of_sweep"]
    checks["extra_session_of_sweep"] = (
        "fewer than two points were read-bound" if extra is None else (extra, 0.02, "at most")
    )
    above = last["first_token_max_sweeps_above"]
    checks[f"first_token_of_{most}_at_once_sweeps_above"] = (
        "the prompts took too long: give more --tokens" if above is None else (above, 4, "at most")
    )
    checks[f"first_token_beside_{most - 1}_sweeps_above"] = (
        "needs more sessions or tokens"
        if newcomers is None
        else (max(item["sweeps_above"] for item in newcomers), 4, "at most")
    )
    if "copies" in result:
        third = result["copies"]["third"]
        checks["lookup_speedup_at_a_third_right"] = (
            "nothing was drafted" if third is None else (third["speedup"], 2, "at least")
        )
        same = all(item["same_tokens"] for item in [result["demo"], *result["copies"]["shares"]])
        checks["lookup_gives_the_same_tokens"] = (float(same), 1, "at least")
    return checks


def run_child(kind: str, path: Path) -> dict[str, Any]:
    """Runs one part in a process of its own, under a limit of its own."""
    command = [sys.executable, "-m", "benchmarks.sessions", *sys.argv[1:], "--checkpoint", str(path), "--child", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            if last:
                print(last, flush=True)
            last = line.rstrip()
    if process.returncode:
        raise SystemExit(f"{kind}: the measurement failed with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(last)
    return result


def child(args: argparse.Namespace) -> None:
    uvloop = {"use_uvloop": True}
    if args.child == "sessions":
        path = args.checkpoint
        budget = int(_weight_bytes(path) * args.budget)
        with limited_disk(path, args.limit * MIB) as error:
            asked = (args.sessions, args.tokens, args.sweep_tokens)
            result = anyio.run(measure_sessions, path, budget, *asked, backend_options=uvloop)
    elif args.child == "demo":
        limit = args.limit * MIB // _DEMO_SLOWDOWN
        with float32_copy(MODEL_PATH, args.folder) as path, limited_disk(path, limit) as error:
            result = anyio.run(measure_demo, path, backend_options=uvloop)
    else:
        with cycling_checkpoint(args.folder) as (path, cycle), limited_disk(path, args.limit * MIB) as error:
            budget = int(_weight_bytes(path) * args.budget)
            result = anyio.run(measure_copies, path, cycle, budget, args.tokens, backend_options=uvloop)
    print(json.dumps({**result, "limit_error": error}))


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


# --- many sessions ---


async def measure_sessions(
    path: Path, budget: int, numbers: Sequence[int], num_tokens: int, sweep_tokens: int | None
) -> dict[str, Any]:
    vocab_size, kv_bytes = await anyio.to_thread.run_sync(kv_needed, path, numbers, num_tokens)
    config = EngineConfig(
        prompt_lookup=False,
        kv_budget=kv_bytes,
        max_sequences=numbers[-1],
        max_tokens_per_sweep=sweep_tokens,
    )
    async with Engine(path, memory_budget=budget, config=config) as engine:
        plan = engine.plan
        if plan.bytes_per_sweep == 0:
            raise SystemExit("everything is resident, and nothing is read: give a smaller --budget")
        disk = await read_seconds(plan)
        print(
            f"{format_bytes(plan.weight_bytes)} of weights, page cache bypassed (direct reads)\n{plan}\n"
            f"limit: a sweep of {format_bytes(plan.bytes_per_sweep)} in {disk:.2f} s, "
            f"{1 / disk:.2f} tokens/s for each session\nprompt lookup is off: random weights repeat themselves, and "
            "their repetitions would be drafted",
            flush=True,
        )
        chunk = max(1, plan.max_tokens_per_sweep - plan.max_sequences)
        short = [_prompt(vocab_size, min(length, chunk), f"newcomer {length}") for length in _NEWCOMERS]
        alone = statistics.median([await first_token(engine, prompt) for prompt in short])
        print(f"first token of one session after {alone:.2f} s", flush=True)
        points: list[dict[str, Any]] = []
        again = [numbers[0]] if len(numbers) > 1 and numbers[0] == 1 else []
        for number in [*numbers, *again]:
            engine.drop_prefixes()
            prompts = _prompts(vocab_size, number)
            point = await measure_point(engine, prompts, num_tokens)
            before, disk = disk, await read_seconds(plan)
            points.append(_with_limits(point, (before + disk) / 2, alone))
            _print_point(points[-1])
            if number == numbers[-1]:
                sweep = points[-1]["sweep_seconds"]
                newcomers = await measure_newcomers(engine, prompts, short, num_tokens, alone, sweep)
        if again:
            points[0] = _median(points[0], points.pop())
        result = {
            "points": points,
            "first_token_alone_s": alone,
            "extra_session_of_sweep": _extra_session(points),
            "newcomers": newcomers,
            "plan": plan.as_dict(),
            "statistics": engine.statistics().as_dict(),
        }
    if result["extra_session_of_sweep"] is not None:
        print(f"while read-bound, an extra session costs {result['extra_session_of_sweep']:.2%} of a sweep")
    for item in newcomers or ():
        print(
            f"a prompt of {item['prompt_tokens']} tokens that comes beside {item['beside']} sessions: first token "
            f"after {item['first_token_s']:.2f} s, {item['sweeps_above']:.2f} sweeps above one session's",
            flush=True,
        )
    return result


async def read_seconds(plan: Plan) -> float:
    """Seconds of plain direct reads of one sweep's extents; of several sweeps if a limit's first burst would count."""
    groups = [stage.ranges for idx, stage in enumerate(plan.stages) if idx not in plan.resident]
    repeats = max(1, _READ_BYTES // plan.bytes_per_sweep)
    return await disk_seconds(groups * repeats, plan.num_loading_agents) / repeats


def kv_needed(path: Path, numbers: Sequence[int], num_tokens: int) -> tuple[int, int]:
    """The size of the vocabulary, and the KV bytes that the sessions of any point and a newcomer need."""
    opened = open_model(path, "1TiB", EngineConfig())
    opened.close()
    kv = opened.probe.kv
    points = [sum(kv.nbytes(length + num_tokens) for length in _lengths(number)) for number in numbers]
    return opened.skeleton.vocab_size, max(points) + kv.nbytes(max(_NEWCOMERS) + 1)


def _lengths(number: int) -> list[int]:
    chosen = random.Random(f"lengths {number}")
    return [chosen.randint(*_PROMPT_TOKENS) for _ in range(number)]


def _prompt(vocab_size: int, length: int, seed: str) -> list[int]:
    chosen = random.Random(f"{seed} {length}")
    return [chosen.randrange(vocab_size) for _ in range(length)]


def _prompts(vocab_size: int, number: int) -> list[list[int]]:
    return [_prompt(vocab_size, length, f"{number} {idx}") for idx, length in enumerate(_lengths(number))]


async def first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds to the first token of a prompt."""
    completion = await engine.complete(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    return completion.timings.first_token_s


async def measure_point(engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> dict[str, Any]:
    """Runs sessions that start together. The decode phase is the time in which all of them decode."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    arrivals: list[list[float]] = [[] for _ in prompts]
    decode_counts: list[EngineStatistics] = []
    first_counts = engine.statistics()
    started = time.perf_counter()

    async def session(idx: int) -> None:
        async for chunk in engine.generate(prompts[idx], params):
            first = not arrivals[idx]
            arrivals[idx] += [time.perf_counter()] * len(chunk.token_ids)
            if (first and all(arrivals)) or (chunk.finish_reason is not None and len(decode_counts) == 1):
                decode_counts.append(engine.statistics())

    async with anyio.create_task_group() as group:
        for idx in range(len(prompts)):
            group.start_soon(session, idx)
    waits = sorted(times[0] - started for times in arrivals)
    point = {
        "sessions": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "tokens_per_s": len(prompts) * num_tokens / (max(times[-1] for times in arrivals) - started),
        "first_token_median_s": statistics.median(waits),
        "first_token_max_s": waits[-1],
        "decode_tokens_per_s": None,
        "sweep_seconds": None,
        "compute_seconds": None,
        "prompt_sweeps": None,
        "prompt_compute_seconds": None,
    }
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    ticks = [moment for moment in arrivals[0] if start <= moment <= end]
    if len(ticks) < 2:
        print("  the prompts took all the time that the first answer did: give more --tokens", flush=True)
        return point
    before, after = decode_counts
    prompt_sweeps = before.sweeps - first_counts.sweeps
    num_decoded = sum(start < moment <= end for times in arrivals for moment in times)
    return point | {
        "decode_tokens_per_s": num_decoded / (end - start),
        "sweep_seconds": statistics.median(later - earlier for earlier, later in pairwise(ticks)),
        "compute_seconds": (after.compute_seconds - before.compute_seconds) / (after.sweeps - before.sweeps),
        "prompt_sweeps": prompt_sweeps,
        "prompt_compute_seconds": before.compute_seconds - first_counts.compute_seconds,
    }


async def measure_newcomers(
    engine: Engine,
    prompts: Sequence[list[int]],
    short: Sequence[list[int]],
    num_tokens: int,
    alone: float,
    sweep: float | None,
) -> list[dict[str, Any]] | None:
    """Times to the first token of prompts of one chunk that arrive while all other sessions decode.

    They come one after another, at different moments of a sweep, after `prompts` have been computed again.
    """
    if len(prompts) < 2 or sweep is None:
        return None
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    num_decoding = 0
    all_decode = anyio.Event()

    async def session(prompt: list[int]) -> None:
        nonlocal num_decoding
        decodes = False
        async for _ in engine.generate(prompt, params):
            num_decoding += not decodes
            decodes = True
            if num_decoding == len(prompts) - 1:
                all_decode.set()

    newcomers = []
    async with anyio.create_task_group() as group:
        for prompt in prompts[1:]:
            group.start_soon(session, prompt)
        await all_decode.wait()
        for idx, prompt in enumerate(short):
            await anyio.sleep(sweep * idx / len(short))
            waited = await first_token(engine, prompt)
            newcomers.append({
                "prompt_tokens": len(prompt),
                "beside": engine.statistics().num_running,
                "first_token_s": waited,
                "sweeps_above": (waited - alone) / sweep,
            })  # fmt: skip
        group.cancel_scope.cancel()
    return newcomers


def _with_limits(point: dict[str, Any], read: float, alone: float) -> dict[str, Any]:
    point = point | {"read_seconds": read, "limit_seconds": None, "limit_tokens_per_s": None, "share_of_limit": None}
    sweep = point["sweep_seconds"]
    for name in ("median", "max"):
        above = None if sweep is None else (point[f"first_token_{name}_s"] - alone) / sweep
        point[f"first_token_{name}_sweeps_above"] = above
    if sweep is not None:
        limit = max(read, point["compute_seconds"])
        point |= {
            "limit_seconds": limit,
            "limit_tokens_per_s": point["sessions"] / limit,
            "share_of_limit": limit / sweep,
        }
    return point


def _print_point(point: dict[str, Any]) -> None:
    print(f"  {point['sessions']:3} sessions: {point['tokens_per_s']:.2f} tokens/s", end="")
    if point["sweep_seconds"] is not None:
        print(
            f", decoding {point['decode_tokens_per_s']:.2f} (limit {point['limit_tokens_per_s']:.2f}); sweep "
            f"{point['sweep_seconds']:.3f} s (read {point['read_seconds']:.3f}, compute "
            f"{point['compute_seconds']:.3f}: {point['share_of_limit']:.3f} of the limit); first token after "
            f"{point['first_token_median_s']:.2f} s, the last after {point['first_token_max_s']:.2f} s "
            f"({point['first_token_median_sweeps_above']:.1f} and {point['first_token_max_sweeps_above']:.1f} sweeps "
            f"above one session's; {point['prompt_tokens']} prompt tokens in {point['prompt_sweeps']} sweeps, which "
            f"computed for {point['prompt_compute_seconds'] / point['sweep_seconds']:.1f} sweeps' time)",
            end="",
        )
    print(flush=True)


def _median(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The point that was measured twice."""
    return {
        name: one[name] if one[name] == other[name] or other[name] is None else (one[name] + other[name]) / 2
        for name in one
    }


def _extra_session(points: Sequence[dict[str, Any]]) -> float | None:
    """The cost of a further session while reading takes longest, as a share of the sweep of one session."""
    bound = [item for item in points if item["sweep_seconds"] and item["read_seconds"] >= item["compute_seconds"]]
    if len(bound) < 2:
        return None
    sweeps = [item["sweep_seconds"] for item in bound]
    slope: float = statistics.linear_regression([item["sessions"] for item in bound], sweeps).slope / sweeps[0]
    return slope


# --- prompt lookup ---


async def measure_demo(path: Path) -> dict[str, Any]:
    """The demo model continues a text that repeats itself."""
    budget = int(_weight_bytes(path) * _DEMO_BUDGET)
    prompt = _DEMO_TEXT * 6
    print(
        f"\nprompt lookup, demo model in float32, the disk held at a {_DEMO_SLOWDOWN}th: "
        f"a sweep keeps 1 + a tokens of a session, a of its drafts being right",
        flush=True,
    )
    (off,) = await measure_answers(path, budget, False, [prompt], _DEMO_TOKENS, kv_tokens=512 + _DEMO_TOKENS)
    (on,) = await measure_answers(path, budget, True, [prompt], _DEMO_TOKENS, kv_tokens=512 + _DEMO_TOKENS)
    result = _compare(off, on) | {"same_tokens": off["token_ids"] == on["token_ids"]}
    _print_lookup(f"{on['prompt_tokens']} tokens of prompt", result)
    return result


async def measure_copies(path: Path, cycle: Sequence[int], budget: int, num_tokens: int) -> dict[str, Any]:
    """A model whose tokens form a cycle, and prompts with runs of the cycle that each end in a wrong token."""
    length = 4 * num_tokens
    chosen = random.Random(0)
    tasks = {f"runs of {run}": copying_prompt(cycle, repeat(run), length) for run in _RUNS}
    # The last one is what p stands for in the note.
    independent = (_geometric(chosen, 1 / 3) for _ in range(length))
    tasks["each right with chance 1/3"] = copying_prompt(cycle, independent, length)
    kv_tokens = max(map(len, tasks.values())) + length
    print(f"\nprompt lookup, copying task, {format_bytes(_weight_bytes(path))} in float32\n{_LOOKUP_NOTE}", flush=True)
    prompts = list(tasks.values())
    (off,) = await measure_answers(path, budget, False, prompts[:1], num_tokens, kv_tokens=kv_tokens)
    answers = await measure_answers(path, budget, True, prompts, length, kv_tokens=kv_tokens)
    shares = []
    for name, on in zip(tasks, answers, strict=True):
        right = on["token_ids"] == list(cycle[1 : length + 1]) and off["token_ids"] == on["token_ids"][:num_tokens]
        shares.append(_compare(off, on) | {"task": name, "same_tokens": right})
        _print_lookup(name, shares[-1])
    drafted = [item for item in shares if item["share_accepted"] is not None]
    third = min(drafted, key=lambda item: abs(item["share_accepted"] - 1 / 3), default=None)
    if third is not None:
        print(f"nearest to a third: {third['task']}, {third['share_accepted']:.0%} of the drafted tokens right")
    return {"shares": shares, "third": third, "note": _LOOKUP_NOTE}


def _geometric(chosen: random.Random, chance: float) -> int:
    """The expected number of successes in a row, for this probability."""
    count = 0
    while chosen.random() < chance:
        count += 1
    return count


async def measure_answers(
    path: Path, budget: int, lookup: bool, prompts: Sequence[str | list[int]], num_tokens: int, *, kv_tokens: int
) -> list[dict[str, Any]]:
    """The greedy answer to each prompt, one after another, and its decode phase: what comes after the first token."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    opened = await anyio.to_thread.run_sync(open_model, path, "1TiB", EngineConfig())
    opened.close()
    config = EngineConfig(prompt_lookup=lookup, kv_budget=opened.probe.kv.nbytes(kv_tokens))
    answers = []
    async with Engine(path, memory_budget=budget, config=config) as engine:
        if not lookup:
            print(engine.plan, flush=True)
        for prompt in prompts:
            token_ids: list[int] = []
            moments: list[tuple[float, int, EngineStatistics]] = []
            async for chunk in engine.generate(prompt, params):
                token_ids += chunk.token_ids
                moments.append((time.perf_counter(), len(token_ids), engine.statistics()))
                usage = chunk.usage
            assert usage is not None
            (started, num_first, before), (ended, num_all, after) = moments[0], moments[-1]
            sweeps, seconds = len(moments) - 1, ended - started
            answers.append({
                "token_ids": token_ids,
                "prompt_tokens": usage.prompt_tokens,
                "sweep_seconds": seconds / sweeps,
                "tokens_per_sweep": (num_all - num_first) / sweeps,
                "tokens_per_s": (num_all - num_first) / seconds,
                "compute_seconds": (after.compute_seconds - before.compute_seconds) / (after.sweeps - before.sweeps),
                "drafted_per_sweep": (after.drafted_tokens - before.drafted_tokens) / sweeps,
                "accepted_per_sweep": (after.accepted_tokens - before.accepted_tokens) / sweeps,
            })  # fmt: skip
    return answers


def _compare(off: dict[str, Any], on: dict[str, Any]) -> dict[str, Any]:
    names = ("sweep_seconds", "compute_seconds", "tokens_per_sweep", "tokens_per_s")
    return {
        "speedup": on["tokens_per_s"] / off["tokens_per_s"],
        "ceiling": 1 + on["accepted_per_sweep"],
        "drafted_per_sweep": on["drafted_per_sweep"],
        "share_accepted": on["accepted_per_sweep"] / on["drafted_per_sweep"] if on["drafted_per_sweep"] else None,
        "prompt_tokens": on["prompt_tokens"],
        **{f"{name}_on": on[name] for name in names},
        **{f"{name}_off": off[name] for name in names},
    }


def _print_lookup(name: str, result: dict[str, Any]) -> None:
    share = "nothing drafted" if result["share_accepted"] is None else f"{result['share_accepted']:.0%} right"
    print(
        f"  {name}: {result['drafted_per_sweep']:.2f} tokens drafted a sweep, {share}; "
        f"{result['tokens_per_sweep_on']:.2f} tokens a sweep, {result['speedup']:.2f} times the tokens/s without "
        f"(ceiling 1 + accepted = {result['ceiling']:.2f}); sweep {result['sweep_seconds_on']:.3f} s, without "
        f"{result['sweep_seconds_off']:.3f} s; tokens {'equal' if result['same_tokens'] else 'DIFFER'}",
        flush=True,
    )


@contextmanager
def cycling_checkpoint(folder: Path | None) -> Iterator[tuple[Path, list[int]]]:
    """A Llama whose next token is a fixed one for each token, and the single cycle in which they come.

    Nothing is added to the residual stream, so the head, the embedding's rows in another order, sees the last token
    alone. Every matrix is in its true shape and has to be read and multiplied all the same.
    """
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=2,
        head_dim=128, vocab_size=4096, max_position_embeddings=4096, tie_word_embeddings=False, dtype=torch.float32,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    cycle = list(range(config.vocab_size))
    random.Random(0).shuffle(cycle)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = model.model.embed_tokens.weight
        model.lm_head.weight[torch.tensor(cycle[1:] + cycle[:1])] = rows[torch.tensor(cycle)]
    with temporary_folder(folder) as path:
        model.save_pretrained(path)
        yield path, cycle


def copying_prompt(cycle: Sequence[int], runs: Iterable[int], length: int) -> list[int]:
    """Pieces of the cycle's first `length` tokens, a wrong one after each, and then the cycle's first token.

    Each piece begins with the last tokens that come before its run, so that what was written so far is found in it, and
    the draft from there has the run's right tokens and then wrong ones. The next run begins one token behind it.
    """
    overlap = 4
    prompt: list[int] = []
    wrong = iter(cycle[length + 1 :])
    start = 1
    for run in runs:
        prompt += [cycle[idx] for idx in range(start - overlap, start + run)]
        prompt.append(next(wrong))
        start += run + 1
        if start > length:
            break
    return prompt + [cycle[idx] for idx in range(1 - overlap, 1)]


def draw(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens/s and seconds a sweep against sessions, with their limits."""
    pyplot = plots.pyplot()
    if pyplot is None:
        return
    from matplotlib import ticker

    points = [item for item in points if item["sweep_seconds"] is not None]
    numbers = [item["sessions"] for item in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(numbers, [item["limit_tokens_per_s"] for item in points], "k--", label="limit: max(read, compute)")
    left.plot(numbers, [item["decode_tokens_per_s"] for item in points], "o-", label="decoding")
    left.plot(numbers, [item["tokens_per_s"] for item in points], "s:", label="prompts included")
    left.set_ylabel("tokens/s of all sessions")
    right.plot(numbers, [item["read_seconds"] for item in points], "k--", label="limit: read")
    right.plot(numbers, [item["compute_seconds"] for item in points], "k:", label="limit: compute")
    right.plot(numbers, [item["sweep_seconds"] for item in points], "o-", label="sweep")
    right.set_ylabel("seconds a sweep")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="sessions", xticks=numbers, xticklabels=numbers)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=150)
    print(f"  plot: {file}")


if __name__ == "__main__":
    main()
