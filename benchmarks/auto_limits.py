"""Checks that `memory_budget="auto"` uses hard limits and never exceeds them, in a hundred different runs.

    python -m benchmarks.auto_limits [--runs 100] [--seed 0] [--folder DIR] [--json FILE]

Needs root, the memory controller of cgroups, and 3 GiB of memory. Makes a checkpoint with the shapes of a small Llama
as a sparse file: its weights are zeros, which take as much memory as others. Each run is a process of its own in a new
cgroup. It imports everything, and the cgroup's use is then the baseline. Then the hard limit is set, an engine opens
with an automatic budget, and 1 to 64 sessions generate. Runs differ in

    room        the limit less the baseline, from the smallest that an engine opens in to more than it can use
    sessions    1, 4, 16 or 64 at once
    prompt      the first session's, from 8 to 4,000 tokens; or the longest that the plan has KV memory for
    limit       of the process's own cgroup, or of its parent
    neighbour   none, or a process under the same limit that takes a seventh of the room, and gives it back

`used` is the most that was in memory at once of the room, without page cache that can be reclaimed. `mean` is the mean
over the time in which sessions generate. Both are to be at least 0.90 where the model is larger than the room. No
process may be killed, or have memory swapped out. An engine may refuse a room that is too small for its smallest
budget and what is kept free.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from transformers import LlamaConfig

from benchmarks.auto_memory import end_process, tell
from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.memory_group import MemoryGroup, let_go_on, line_of, memory_group
from hermes_async import Engine, EngineConfig, MemoryBudgetError, SamplingParams
from hermes_async.engine.lifetime import import_torch
from hermes_async.engine.opening import plans_by_budget
from hermes_async.memory.available import headroom

MIB = 2**20

_LEAST_SHARE = 0.90
_SESSIONS = (1, 4, 16, 64)
_PROMPTS = (8, 100, 1000, 4000)
_ROOMS = (1.0, 1.3, 1.7, 2.2, 3.0)  # times the smallest, and then up to all
_SHARES = (0.5, 0.75, 0.95, 1.6)  # of the weights
_OTHER_PROMPTS = 8  # tokens of the other sessions
_NEW_TOKENS = 8
_NEIGHBOUR_SHARE = 1 / 7
_NUM_SWEEPS = 14  # in which sessions generate, at least
_NEIGHBOUR_SECONDS = 20.0  # at least, with a neighbour
_SECONDS_BETWEEN_SAMPLES = 0.05
_OPENING_BYTES = 16 * MIB  # that the process takes while an engine opens, at most; measured: less than 10 MiB
_REFUSED = "refused: "


@dataclass(frozen=True)
class Run:
    """What a run is like.

    Attributes:
        room_bytes: The limit less the baseline.
        prompt_tokens: Of the first session.
    """

    room_bytes: int
    num_sessions: int
    prompt_tokens: int
    on_parent: bool
    neighbour: bool


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto_limits", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of runs (default 0)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoint")
    parser.add_argument("--rooms", default=None, help="MiB, such as 100,200 (default: from the smallest to all)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the records")
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        anyio.run(_inside, json.loads(args.inside))
        return
    with sparse_checkpoint(_config(), args.folder) as path:
        everything = plans_by_budget(path, EngineConfig(), 2)[-1]
        minimum, weight_bytes = everything.minimum_budget, everything.weight_bytes
        print(f"weights {_mib(weight_bytes)} MiB, smallest budget {_mib(minimum)} MiB", flush=True)
        if args.rooms is not None:
            rooms = [int(room) * MIB for room in args.rooms.split(",")]
        else:
            rooms = _rooms(_smallest_room(path, minimum, weight_bytes), weight_bytes)
        print(f"\n{_HEADER}", flush=True)
        records = []
        for run in _runs(args.runs, args.seed, rooms):
            records.append(_tried(run, path, minimum, weight_bytes))
            print(_line(records[-1]), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(records))
    print("", *_by_room(records), "", sep="\n")
    broken = [f"run {number}: {fault}" for number, record in enumerate(records, 1) for fault in record["broken"]]
    print(*broken, sep="\n")
    larger = [record for record in records if record["model_is_larger"] and not record["refused"]]
    print(
        json.dumps(
            {
                "runs": len(records),
                "refused": sum(bool(record["refused"]) for record in records),
                "killed": sum(record["killed"] for record in records),
                "swapped": sum(record["swapped_bytes"] > 0 for record in records),
                "larger": len(larger),
                "least_used": min((record["used"] for record in larger), default=None),
                "least_mean": min((record["mean"] for record in larger), default=None),
                "broken": len(broken),
            }
        )
    )
    if broken:
        raise SystemExit(1)


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=45,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=8000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )


def _rooms(smallest: int, weight_bytes: int) -> list[int]:
    rooms = [int(smallest * factor) for factor in _ROOMS]
    return rooms + [room for share in _SHARES if (room := int(weight_bytes * share)) > rooms[-1]]


def _runs(count: int, seed: int, rooms: Sequence[int]) -> Iterator[Run]:
    """All rooms in turn, each with other sessions, prompts, limits and neighbours. Long prompts are rarer."""
    numbers = random.Random(seed)
    for idx in range(count):
        yield Run(
            room_bytes=rooms[idx % len(rooms)],
            num_sessions=numbers.choice(_SESSIONS),
            prompt_tokens=numbers.choices(_PROMPTS, (4, 4, 2, 1))[0],
            on_parent=numbers.random() < 0.5,
            neighbour=numbers.random() < 0.25,
        )


def _smallest_room(path: Path, minimum: int, weight_bytes: int) -> int:
    """The smallest room that an engine opens and answers in, to within 8 MiB."""
    room = minimum + 8 * MIB
    while True:
        record = _tried(Run(room, 1, 8, on_parent=False, neighbour=False), path, minimum, weight_bytes)
        if record["killed"]:
            raise SystemExit(f"an engine was killed in {_mib(room)} MiB: {'; '.join(record['broken'])}")
        if not record["refused"]:
            return room
        print(f"an engine does not open in {_mib(room)} MiB: {record['refused']}", flush=True)
        room += 8 * MIB


# --- one run, from outside of its group ---


def _tried(run: Run, path: Path, minimum: int, weight_bytes: int) -> dict[str, Any]:
    with memory_group(None) as group, ExitStack() as exits:
        engines = exits.enter_context(group.inner("engine")) if run.on_parent else group
        others = exits.enter_context(group.inner("neighbour")) if run.on_parent else group
        seconds = _NEIGHBOUR_SECONDS if run.neighbour else 0.0
        process = _started(engines, exits, ["--inside", json.dumps({**asdict(run), "path": str(path), "s": seconds})])
        neighbour = None
        if run.neighbour:
            neighbour = _started(others, exits, ["--taken", str(int(run.room_bytes * _NEIGHBOUR_SHARE))], _NEIGHBOUR)
        started = [one for one in (process, neighbour) if one is not None]
        ready = [line_of(one.stdout) for one in started]
        baseline = group.used_bytes
        group.limit(baseline + run.room_bytes)
        group.forget_peak()
        with group.sampled():
            let_go_on(process)
            opened = line_of(process.stdout)
            refused = opened.startswith(_REFUSED)
            if neighbour is not None:
                let_go_on(neighbour)
            let_go_on(process)
            first = len(group.samples)
            said = line_of(process.stdout)
            generating = group.samples[first:]
            let_go_on(process)
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
        process.wait()
        inside = json.loads(said) if said else {"refused": opened.removeprefix(_REFUSED)} if refused else {}
        record: dict[str, Any] = {
            **asdict(run),
            "refused": "",
            **inside,
            "baseline_bytes": baseline,
            "used": (group.peak_used_bytes - baseline) / run.room_bytes,
            "mean": (sum(generating) / max(1, len(generating)) - baseline) / run.room_bytes,
            "peak_bytes": group.peak_bytes,
            "page_cache_bytes": group.page_cache_bytes,
            "swapped_bytes": group.swapped_bytes,
            "killed": group.num_killed,
            "model_is_larger": weight_bytes > run.room_bytes,
        }
    record["broken"] = broken = []
    enough = minimum + headroom(run.room_bytes, neighbours=run.neighbour) + _OPENING_BYTES
    if not all(ready) or not (said or refused) or process.returncode or record["killed"]:
        broken.append(f"ended early, with exit code {process.returncode}; {record['killed']} killed; {opened}")
    elif record["swapped_bytes"]:
        broken.append(f"{_mib(record['swapped_bytes'])} MiB were swapped out")
    elif refused:
        if run.room_bytes > enough:
            broken.append(f"refused, although {_mib(enough)} MiB should do: {record['refused']}")
    elif record["model_is_larger"] and record["used"] < _LEAST_SHARE:
        broken.append(f"{record['used']:.3f} of {_mib(run.room_bytes)} MiB were in use")
    return record


def _started(
    group: MemoryGroup,
    exits: ExitStack,
    arguments: list[str],
    program: Sequence[str] = ("-m", "benchmarks.auto_limits"),
) -> subprocess.Popen[str]:
    process = group.start([*program, *arguments])
    exits.callback(end_process, process)
    return process


_COLUMNS = (*("budget", "resident", "lent", "ring", "kv_set_aside", "kv_leased", "workspace", "activations", "beside"),)
_HEADER = (
    "run: room MiB, sessions, prompt, limit   used  mean  MiB of the room: "
    + " ".join(f"{name:>9.9}" for name in (*_COLUMNS, "free"))
    + "   page cache, kernel's peak"
)


def _line(record: dict[str, Any]) -> str:
    marks = ("P" if record["on_parent"] else "-") + ("N" if record["neighbour"] else "-")
    figures = " ".join(f"{_mib(record[name]) if name in record else '':>9}" for name in _COLUMNS)
    free = record["room_bytes"] - record["used"] * record["room_bytes"]
    peak = "" if record["peak_bytes"] is None else f"{(record['peak_bytes'] - record['baseline_bytes']) / MIB:.0f}"
    return (
        f"{_mib(record['room_bytes']):>12} {record['num_sessions']:>8} {record.get('prompt', 0):>8} {marks:>6}"
        f"  {record['used']:5.3f} {record['mean']:5.3f}{'  ' if record['model_is_larger'] else ' *'}"
        f"{'':16}{figures} {_mib(free):>9}   {_mib(record['page_cache_bytes'])} {peak}"
        f"{'  BROKEN' if record['broken'] else '  refused' if record['refused'] else ''}"
    )


def _by_room(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each room: how its runs ended, and the shares of it that were in use."""
    yield "room MiB   runs  refused  killed  swapped   used: least  median   mean: least  median"
    by_room: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_room.setdefault(record["room_bytes"], []).append(record)
    for room, of_room in sorted(by_room.items()):
        ran = [record for record in of_room if not record["refused"]]
        used, mean = ([record[name] for record in ran] for name in ("used", "mean"))
        shares = "  ".join(
            f"{min(share):17.3f} {statistics.median(share):7.3f}" if share else f"{'':25}" for share in (used, mean)
        )
        yield (
            f"{_mib(room):>8} {len(of_room):>6} {len(of_room) - len(ran):>8} "
            f"{sum(record['killed'] for record in of_room):>7} "
            f"{sum(record['swapped_bytes'] > 0 for record in of_room):>8}{shares}"
        )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.0f}"


_NEIGHBOUR = (
    "-c",
    """
import mmap, sys, time
most, piece = int(sys.argv[2]), 1 << 19
print("ready", flush=True)
sys.stdin.readline()
pause = 6.0 * piece / most
while True:
    taken = []
    while len(taken) * piece < most:
        memory = mmap.mmap(-1, piece)
        memory.write(b"x" * piece)
        taken.append(memory)
        time.sleep(pause)
    time.sleep(2)
    for memory in taken:
        memory.close()
    time.sleep(14)
""",
)


# --- inside of the group ---


async def _inside(run: dict[str, Any]) -> None:
    import_torch()
    await anyio.to_thread.run_sync(tell, "ready")
    bytes_before = _anonymous_bytes()
    async with AsyncExitStack() as exits:
        try:
            engine = await exits.enter_async_context(Engine(run["path"]))
        except MemoryBudgetError as error:
            print(f"{_REFUSED}{error}", flush=True)
            return
        await anyio.to_thread.run_sync(tell, "opened")
        samples = _Samples(engine, bytes_before)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(samples.take)
            prompt = await _generate(engine, run)
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(tell, json.dumps({**samples.account(), "prompt": prompt}))


async def _generate(engine: Engine, run: dict[str, Any]) -> int:
    """Lets all sessions generate, again and again, for some sweeps; returns the tokens of the first one's prompt."""
    params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0, ignore_eos=True)
    plan, numbers = engine.plan, random.Random(0)
    longest = plan.kv_bytes // plan.kv_bytes_per_token // 16 * 16 - 16 - _NEW_TOKENS
    first = min(run["prompt_tokens"], longest)

    async def session(num_tokens: int) -> None:
        async with engine.session() as chat:
            async for _ in chat.generate([numbers.randrange(2, 1000) for _ in range(num_tokens)], params):
                pass

    async def user(num_tokens: int) -> None:
        while True:
            await session(num_tokens)
            num_tokens = _OTHER_PROMPTS

    ends_at = time.monotonic() + run["s"]
    async with anyio.create_task_group() as users:
        for num_tokens in (first, *[_OTHER_PROMPTS] * (run["num_sessions"] - 1)):
            users.start_soon(user, num_tokens)
        while engine.statistics().sweeps < _NUM_SWEEPS or time.monotonic() < ends_at:  # noqa: ASYNC110
            await anyio.sleep(_SECONDS_BETWEEN_SAMPLES)
        users.cancel_scope.cancel()
    return first


def _anonymous_bytes() -> int:
    """Memory of this process, without pages of files, such as the libraries' code."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()


class _Samples:
    """What the engine holds, looked at again and again.

    Args:
        bytes_before: What the process had before the engine was opened.
    """

    def __init__(self, engine: Engine, bytes_before: int) -> None:
        self._engine = engine
        self._before = bytes_before
        self._most: dict[str, int] = {}
        self._least_beside: int | None = None

    async def take(self) -> None:
        while True:
            self._look()
            await anyio.sleep(_SECONDS_BETWEEN_SAMPLES)

    def _look(self) -> None:
        plan, snapshot, statistics = self._engine.plan, self._engine.snapshot(), self._engine.statistics()
        grown = _anonymous_bytes() - self._before
        ready = [stage for stage in snapshot.stages if stage.activity in ("ready", "computing", "computed")]
        resident = sum(stage.nbytes for stage in ready if stage.resident)
        ring = sum(stage.nbytes for stage in ready if not stage.resident)
        rest = grown - resident - plan.ring_bytes - statistics.kv_bytes
        if statistics.sweeps > 2 and (self._least_beside is None or rest < self._least_beside):
            self._least_beside = rest
        if grown > self._most.get("grown", 0):
            self._most = {
                "grown": grown,
                "budget": plan.memory_budget,
                "resident": resident,
                "ring": plan.ring_bytes,
                "ring_in_use": ring,
                "kv_set_aside": plan.kv_bytes,
                "kv_leased": statistics.kv_bytes,
                "lent": statistics.bytes_lent,
                "workspace": plan.workspace_bytes,
                "rest": rest,
            }

    def account(self) -> dict[str, int]:
        """The figures of the moment at which the process held the most."""
        beside = max(0, self._least_beside or 0)
        return {
            **self._most,
            "beside": beside,
            "activations": self._most["rest"] - beside,
            "last_budget": self._engine.plan.memory_budget,
        }


if __name__ == "__main__":
    main()
