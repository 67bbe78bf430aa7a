"""Checks that nothing remains and nothing goes wrong when users leave hundreds of requests in every possible way.

    python -m benchmarks.soak [--minutes 10] [--in-flight 200] [--seed 0] [--checkpoint PATH] [--memory SIZE]
        [--batching turns] [--check 1000] [--check-minutes 10]

There is KV memory for a tenth of the requests. So requests wait, prefixes are dropped, and idle chat sessions are
parked. Users iterate, read slowly, cancel their task, break off, abort or set a deadline; others chat, fork and idle,
or run forward passes. Meanwhile the budget changes, and reads and writes fail, are cut short or are late.

At the end, the checks are exact: there are only the engine's own leases, no more tasks, files, threads and parked bytes
than before. While it runs, there are as much memory, files, threads and tasks as after the first minute. Every request
got the tokens that it gets alone. This is checked for as many requests as `--check` and `--check-minutes` allow, of all
kinds in turn; the output says how many. The weights are computed in float32, in which tokens do not depend on other
requests of the sweep.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import pickle
import random
import shutil
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import torch
from transformers import AutoModelForCausalLM

from benchmarks.folders import temporary_folder
from benchmarks.soak_alone import Record, check_alone
from benchmarks.soak_faults import MADE_TO_FAIL, FaultyFiles
from hermes_async import (
    Chunk,
    DeadlineExceededError,
    Engine,
    EngineConfig,
    MemoryBudgetError,
    ReadError,
    SamplingParams,
    Session,
    format_bytes,
)
from hermes_async.demo import MODEL_PATH
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.engine.prompt import has_chat_template
from hermes_async.memory.available import process_rss_bytes

_ENGINE_LEASES = 4
_KV_TOKENS = 2048
_SWEEP_TOKENS = 64
_TOLERANCES = {"rss_bytes": (0.05, 16 * 2**20), "files": (0, 4), "threads": (0, 4), "tasks": (0.05, 20)}
"""How much more there may be at the end than after a minute: a share of that, and so many beside."""
_SECONDS_OF_IDLE_THREADS = 15
_SAMPLES = 24
_NUM_PASSES = 16
_PASSING_USERS = 4
_DRAIN_SECONDS = 120
_LINES = 20

_TURN_TOKENS = 40
_TEXT = "The king is dead, and we shall not speak of it again: who would? O my lord, my lord, it is not well."

_COUNTED = ("turns", "forks", "prefixes_dropped", "forwards", "forwards_cancelled", "resizes", "ended_by_faults")
"""What a soak must have come to try, besides what the engine counts."""

_MANNERS = {"complete": 4, "iterate": 4, "slow": 3, "break": 2, "drop": 1, "cancel": 2, "abort": 2, "deadline": 2}
"""How users take their tokens, by weight. `drop` breaks off without closing the iterator, and is not for chats."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    parser.add_argument("--in-flight", type=int, default=200, help="requests in flight at all times (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument("--checkpoint", type=Path, default=MODEL_PATH, help="default: the demo model")
    parser.add_argument("--memory", default=None, help="budget (default: the least, and half of the weights)")
    parser.add_argument("--check", type=int, default=1000, help="requests to run again alone, at most (default 1000)")
    parser.add_argument("--check-minutes", type=float, default=10, help="how long they run, at most (default 10)")
    parser.add_argument("--batching", default="auto", choices=("auto", "packed", "turns"), help="as of EngineConfig")
    parser.add_argument("--fault-every", type=float, default=5, help="seconds between two faults (default 5)")
    parser.add_argument("--resize-every", type=float, default=20, help="seconds between two resizes (default 20)")
    args = parser.parse_args()
    with float32_copy(args.checkpoint) as path, temporary_folder() as folder:
        result, failures = anyio.run(run, args, path, folder, backend_options={"use_uvloop": True})
    print()
    for failure in failures[:_LINES]:
        print(f"FAILED: {failure}")
    if len(failures) > _LINES:
        print(f"FAILED: and {len(failures) - _LINES} more")
    print(json.dumps({"passed": not failures, "failures": failures[:_LINES], **result}))
    sys.exit(bool(failures))


@contextmanager
def float32_copy(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """The checkpoint in float32, in a temporary directory in `folder` that is deleted at the end."""
    with temporary_folder(folder) as copied:
        shutil.copytree(path, copied, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(copied)
        yield copied


async def run(args: argparse.Namespace, path: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Runs the soak and then its check; returns figures and failures."""
    parking = folder / "parking"
    parking.mkdir()
    opened, config = await anyio.to_thread.run_sync(_configure, path, parking, args.batching)
    memory = args.memory or opened.plan.minimum_budget + opened.plan.weight_bytes // 2
    tasks, files, threads = asyncio.all_tasks(), _open_files(), _threads()
    faulty = FaultyFiles([path, parking])
    # Records go to a file, so that they do not count as memory.
    with (folder / "records").open("wb") as records:
        async with Engine(path, memory_budget=memory, config=config) as engine:
            print(f"{engine.plan}\n{args.in_flight} requests in flight for {args.minutes:g} minutes", flush=True)
            soak = Soak(engine, opened, records, faulty, args)
            await soak.prepare()
            with faulty.in_use():
                await soak.run(args.minutes * 60)
            await soak.check_idle()
        if soak.engine.statistics().num_leases:
            soak.failures.append(f"leases after the engine was left: {soak.engine.statistics().holders}")
    result, failures = soak.result(), soak.failures
    print(
        f"{result['requests']} requests ({sum(result['left_early'].values())} left early: {result['left_early']}), "
        f"{result['turns']} turns and {result['forks']} forks of sessions, {result['parkings']} parked; "
        f"{result['forwards']} forward passes, {result['resizes']} resizes, faults: {result['faults']}, which ended "
        f"{result['ended_by_faults']} calls; "
        f"{result['prefix_hits']} prefixes shared, {result['accepted_tokens']} of {result['drafted_tokens']} drafted "
        "tokens right",
        flush=True,
    )
    del soak, engine
    gc.collect()
    await anyio.sleep(_SECONDS_OF_IDLE_THREADS)
    more = _threads() - threads
    if more:
        failures.append(f"threads are left: {dict(more)}")
    left = asyncio.all_tasks() - tasks
    if left:
        failures.append(f"{len(left)} tasks are left: {sorted(task.get_name() for task in left)[:5]}")
    open_files = _open_files() - files
    if +open_files:
        failures.append(f"files are left open: {dict(+open_files)}")
    if parked := list(parking.iterdir()):
        failures.append(f"{len(parked)} parking files are left, {parked[0]} for one")
    alone = EngineConfig(share_prefixes=False, prompt_lookup=False, batching=args.batching)
    async with Engine(path, memory_budget="64GiB", config=alone) as engine:
        seconds, order = 60 * args.check_minutes, random.Random(f"{args.seed} check")
        result |= await check_alone(engine, folder / "records", failures, most=args.check, seconds=seconds, order=order)
    return result, failures


def _configure(path: Path, parking: Path, batching: str) -> tuple[OpenedModel, EngineConfig]:
    """The model without weights, and options: little KV, and few chunks that a slow user may leave."""
    opened = open_model(path, "1TiB", EngineConfig())
    opened.close()
    config = EngineConfig(
        kv_budget=opened.probe.kv.nbytes(_KV_TOKENS),
        max_buffered_chunks=4,
        max_tokens_per_sweep=_SWEEP_TOKENS,
        batching=batching,
        parking_dir=parking,
    )
    opened = open_model(path, "1TiB", config)
    opened.close()
    return opened, config


def _open_files() -> Counter[str]:
    files: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            files[str(link.readlink())] += 1
    return files


def _threads() -> Counter[str]:
    """By name, without a number at its end."""
    return Counter(thread.name.rstrip("0123456789_-") for thread in threading.enumerate())


class Soak:
    """The users of one engine, and their requests."""

    def __init__(
        self, engine: Engine, opened: OpenedModel, records: IO[bytes], faulty: FaultyFiles, args: argparse.Namespace
    ) -> None:
        self.engine = engine
        self.failures: list[str] = []
        self._records = records
        self._faulty = faulty
        self._seed = seed = args.seed
        self._in_flight = args.in_flight
        self._fault_every, self._resize_every = args.fault_every, args.resize_every
        self._budget = engine.plan.memory_budget
        self._smallest = engine.plan.minimum_budget
        self._vocab_size = opened.skeleton.vocab_size
        self._has_text = opened.tokenizer is not None
        self._has_messages = has_chat_template(opened)
        common = random.Random(f"{seed} prefixes")
        self._prefixes = [self._tokens(common, 16 * common.randint(1, 12)) for _ in range(8)]
        # All mutable state. `_ended` is set and made anew whenever a request ends; `_typical` is about how long one
        # takes; `_seen` is the last state seen; the others count.
        self._asking = 0
        self._ended = anyio.Event()
        self._typical = 1.0
        self._stopping = False
        self._seen: dict[str, int] = {}
        self._tried: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
        self._most: Counter[str] = Counter()
        self._fewest_asking = sys.maxsize
        self._samples: list[tuple[float, dict[str, int]]] = []
        self._compared: dict[str, dict[str, int]] = {}
        self._passes: list[tuple[list[list[int]], torch.Tensor]] = []

    def result(self) -> dict[str, Any]:
        counts = self.engine.statistics()
        return {
            "requests": sum(self._tried.values()),
            "tried": dict(self._tried),
            "left_early": dict(self._cut),
            **self._counts,
            "fewest_in_flight": self._fewest_asking,
            **{f"most_{name}": self._most[name] for name in sorted(self._most)},
            "parkings": counts.num_parkings,
            "prefix_hits": counts.prefix_hits,
            "prefix_tokens": counts.prefix_tokens,
            "drafted_tokens": counts.drafted_tokens,
            "accepted_tokens": counts.accepted_tokens,
            **self._compared,
            "faults": dict(self._faulty.done),
            "statistics": counts.as_dict(),
        }

    # --- while it runs ---

    async def prepare(self) -> None:
        """Runs some forward passes alone, to compare others with."""
        chosen = random.Random(f"{self._seed} passes")
        for _ in range(_NUM_PASSES):
            length = chosen.randint(1, _SWEEP_TOKENS // 2)
            inputs = [list(self._tokens(chosen, length)) for _ in range(chosen.randint(1, 2))]
            output = await self.engine.forward(input_ids=inputs)
            self._passes.append((inputs, output.logits.clone()))

    async def run(self, seconds: float) -> None:
        """Keeps the users at work for this time, then lets them end."""
        async with anyio.create_task_group() as watching:
            watching.start_soon(self._watch, seconds)
            with anyio.move_on_after(seconds + _DRAIN_SECONDS) as limit:
                async with anyio.create_task_group() as users:
                    for idx in range(self._in_flight):
                        users.start_soon(self._user, idx)
                    for idx in range(self._in_flight // 5):  # besides, because they idle between their turns
                        users.start_soon(self._chatter, idx)
                    for idx in range(_PASSING_USERS):
                        users.start_soon(self._passer, idx)
                    async with anyio.create_task_group() as disturbing:
                        disturbing.start_soon(self._disturb)
                        disturbing.start_soon(self._resize)
                        await anyio.sleep(seconds)
                        disturbing.cancel_scope.cancel()
                    self._stopping = True
            watching.cancel_scope.cancel()
        if limit.cancelled_caught:
            self.failures.append(f"not all requests ended in {_DRAIN_SECONDS} s; last seen: {self._seen}")

    async def check_idle(self) -> None:
        """Checks that nothing is left when nothing runs any more."""
        for _ in range(200):  # iterators that were dropped are closed by the event loop, when it comes to it
            if not any(self._state().values()):
                break
            await anyio.sleep(0.05)
        counts = self.engine.statistics()
        if any(self._state().values()):
            self.failures.append(f"not idle: {self._state()}")
        if counts.num_leases != _ENGINE_LEASES:
            self.failures.append(f"{counts.num_leases} leases instead of {_ENGINE_LEASES}: {counts.holders}")
        self.engine.drop_prefixes()
        counts = self.engine.statistics()
        if counts.prefix_bytes or counts.kv_bytes:
            self.failures.append(
                f"{counts.prefix_bytes} bytes of prefixes and {counts.kv_bytes} of KV are left after drop_prefixes()"
            )
        if counts.peak_bytes_in_use > counts.memory_budget:
            self.failures.append(f"{counts.peak_bytes_in_use} bytes were leased of a budget of {counts.memory_budget}")
        untried = [name for name in ("paused", "waiting", "sessions") if not self._most[name]]
        tried = ("num_parkings", "prefix_hits", "drafted_tokens", "accepted_tokens")
        untried += [name for name in tried if not getattr(counts, name)]
        untried += [name for name in _COUNTED if not self._counts[name]]
        untried += [name for name in ("break", "drop", "cancel", "abort", "deadline") if not self._cut[name]]
        if untried:
            self.failures.append(f"the soak did not come to try: {', '.join(untried)}")
        if self._fewest_asking < self._in_flight:
            self.failures.append(f"only {self._fewest_asking} requests were in flight at a time")
        self._check_growth()

    def _state(self) -> dict[str, int]:
        counts = self.engine.statistics()
        return {name: getattr(counts, f"num_{name}") for name in ("running", "waiting", "paused", "sessions", "parked")}

    async def _watch(self, seconds: float) -> None:
        started, prefix_bytes, next_report = time.monotonic(), 0, 60.0
        while True:
            await anyio.sleep(0.1)
            self._seen = self._state()
            if self._stopping:
                continue
            elapsed, counts = time.monotonic() - started, self.engine.statistics()
            for name, figure in self._seen.items():
                self._most[name] = max(self._most[name], figure)
            self._fewest_asking = min(self._fewest_asking, self._asking)
            self._counts["prefixes_dropped"] += counts.prefix_bytes < prefix_bytes
            prefix_bytes = counts.prefix_bytes
            # A smaller budget takes less memory, so there is nothing to compare then.
            is_due = not self._samples or elapsed - self._samples[-1][0] >= min(1.0, seconds / 100)
            if is_due and counts.memory_budget == self._budget:
                self._samples.append((elapsed, _sample()))
            if elapsed >= next_report:
                next_report += 60
                print(
                    f"  {elapsed / 60:.0f} min: {sum(self._tried.values())} requests, {counts.tokens_generated} tokens "
                    f"in {counts.sweeps} sweeps, {_shown(self._samples[-1][1])}; {self._seen}",
                    flush=True,
                )

    def _check_growth(self) -> None:
        """Compares what the process had after a minute with what it had at the end, as medians of some samples."""
        end = self._samples[-1][0]
        minute = min(60.0, end / 4)
        first = _medians([sample for at, sample in self._samples if at >= 0.8 * minute][:_SAMPLES])
        last = _medians([sample for _, sample in self._samples[-_SAMPLES:]])
        self._compared = {"after_first_minute": first, "at_end": last}
        print(f"after {minute:.0f} s: {_shown(first)}; at the end: {_shown(last)}")
        for name, (share, most) in _TOLERANCES.items():
            if last[name] > first[name] * (1 + share) + most:
                self.failures.append(f"{name} grew from {first[name]} to {last[name]}")

    # --- what disturbs them ---

    async def _disturb(self) -> None:
        """Lets a read or a write go wrong now and then."""
        chosen = random.Random(f"{self._seed} faults")
        while True:
            await anyio.sleep(chosen.expovariate(1 / self._fault_every))
            self._faulty.ask(chosen)

    async def _resize(self) -> None:
        """Makes the budget smaller for some seconds, now and then."""
        chosen = random.Random(f"{self._seed} resizes")
        try:
            while True:
                await anyio.sleep(chosen.expovariate(1 / self._resize_every))
                await self._set_budget(chosen.randint(self._smallest, self._budget))
                await anyio.sleep(chosen.uniform(0, self._resize_every / 4))
                await self._set_budget(self._budget)
        finally:
            with anyio.CancelScope(shield=True):
                await self._set_budget(self._budget)

    async def _set_budget(self, budget: int) -> None:
        try:
            await self.engine.resize(budget)
            self._counts["resizes"] += 1
        except MemoryBudgetError:  # KV that is in use is not given back
            self._counts["resizes_refused"] += 1
            if budget == self._budget:
                self.failures.append("the first budget was refused")
        except ReadError as error:
            self._count_fault(error, "resize")

    def _count_fault(self, error: ReadError, what: str) -> None:
        """An error that a call ended with: it must be one that was made."""
        self._counts["ended_by_faults"] += 1
        if MADE_TO_FAIL not in str(error):
            self.failures.append(f"{what}: {error!r}")

    # --- users ---

    async def _user(self, idx: int) -> None:
        """Makes one request after another, so that a constant number is in flight."""
        chosen = random.Random(f"{self._seed} user {idx}")
        while not self._stopping:
            prompt = self._prompt(chosen)
            await self._ask(self.engine, prompt, prompt, self._params(chosen), chosen)

    async def _passer(self, idx: int) -> None:
        """Runs forward passes, some of which are cancelled."""
        chosen = random.Random(f"{self._seed} passes {idx}")
        while not self._stopping:
            inputs, alone = chosen.choice(self._passes)
            patience = chosen.expovariate(1 / self._typical) if chosen.random() < 0.2 else None
            with anyio.move_on_after(patience) as limit:
                try:
                    output = await self.engine.forward(input_ids=inputs)
                    self._counts["forwards"] += 1
                    if not torch.equal(output.logits, alone):
                        self.failures.append(f"a forward pass of {inputs} has other logits than alone")
                except ReadError as error:
                    self._count_fault(error, "forward")
            self._counts["forwards_cancelled"] += limit.cancelled_caught
            await self._pause(chosen)

    async def _chatter(self, idx: int) -> None:
        chosen = random.Random(f"{self._seed} chat {idx}")
        while not self._stopping:
            async with self.engine.session() as chat:
                in_messages = self._has_messages and chosen.random() < 0.5
                await self._talk(chat, chosen, chosen.randint(2, 6), in_messages=in_messages)

    async def _talk(self, chat: Session, chosen: random.Random, num_turns: int, *, in_messages: bool) -> None:
        async with anyio.create_task_group() as branches:
            for _ in range(num_turns):
                params = self._params(chosen)
                assert params.max_tokens is not None
                if self._stopping or len(chat.token_ids) + _TURN_TOKENS + params.max_tokens > _KV_TOKENS // 4:
                    return
                self._counts["turns"] += 1
                if in_messages:
                    text = " ".join(chosen.choices(_TEXT.split(), k=chosen.randint(1, 12)))
                    whole: tuple[Any, ...] = (*chat.messages, {"role": "user", "content": text})
                    await self._ask(chat, text, whole, params, chosen)
                else:
                    tokens = self._tokens(chosen, chosen.randint(1, _TURN_TOKENS))
                    await self._ask(chat, tokens, (*chat.token_ids, *tokens), params, chosen)
                if num_turns > 1 and chosen.random() < 0.3:
                    self._counts["forks"] += 1
                    branch = random.Random(chosen.random())
                    branches.start_soon(self._branch, chat.fork(), branch, in_messages)
                await self._pause(chosen)

    async def _branch(self, chat: Session, chosen: random.Random, in_messages: bool) -> None:
        try:
            await self._talk(chat, chosen, 1, in_messages=in_messages)
        finally:
            await chat.aclose()

    async def _ask(
        self,
        source: Engine | Session,
        prompt: str | tuple[int, ...],
        whole: tuple[Any, ...],
        params: SamplingParams,
        chosen: random.Random,
    ) -> None:
        """Makes one request, reads it in one of the manners, and records it with the `whole` prompt and its history."""
        (manner,) = chosen.choices(list(_MANNERS), list(_MANNERS.values()))
        if manner == "drop" and isinstance(source, Session):
            manner = "break"
        token_ids: list[int] = []
        reason: str | None = None
        ended_by_fault = False
        started = time.monotonic()
        self._asking += 1
        self._tried[manner] += 1
        try:
            reason = await self._take(source, prompt, params, manner, chosen, token_ids)
        except DeadlineExceededError as error:
            if manner != "deadline":
                self.failures.append(f"{manner}: {error!r}")
        except ReadError as error:
            ended_by_fault = True
            self._count_fault(error, manner)
        except Exception as error:
            self.failures.append(f"{manner}, prompt of length {len(prompt)} ({len(whole)}), {params}: {error!r}")
        finally:
            self._asking -= 1
            ended, self._ended = self._ended, anyio.Event()
            ended.set()
        if reason in ("stop", "length"):
            self._typical += 0.02 * (time.monotonic() - started - self._typical)
        else:
            self._cut[manner] += 1
            if manner in ("complete", "iterate", "slow") and not ended_by_fault:
                self.failures.append(f"{manner}: ended with {reason!r} after {len(token_ids)} tokens")
            reason = None
        kind = "chat" if isinstance(source, Session) else "request"
        pickle.dump(Record(f"{kind}, {manner}", whole, params, tuple(token_ids), reason), self._records)

    async def _take(
        self,
        source: Engine | Session,
        prompt: str | tuple[int, ...],
        params: SamplingParams,
        manner: str,
        chosen: random.Random,
        token_ids: list[int],
    ) -> str | None:
        """Adds new tokens to `token_ids`; returns the finish reason, or None if there was none."""
        patience = chosen.expovariate(1 / self._typical)
        if manner == "complete":
            completion = await source.complete(prompt, params)
            token_ids += completion.token_ids
            return completion.finish_reason
        if manner == "cancel":
            return await self._cancelled(self._iterate(source.generate(prompt, params), token_ids), patience)
        if manner == "abort":
            request_id = f"abort {chosen.random()}"
            aborting = asyncio.ensure_future(self._abort(request_id, patience))
            try:
                return await self._iterate(source.generate(prompt, params, request_id=request_id), token_ids)
            finally:
                aborting.cancel()
                await asyncio.wait([aborting])
        if manner == "deadline":
            deadline = anyio.current_time() + patience
            return await self._iterate(source.generate(prompt, params, deadline=deadline), token_ids)
        if manner == "drop":
            most = chosen.randint(0, 40)
            async for chunk in source.generate(prompt, params):
                token_ids += chunk.token_ids
                if chunk.finish_reason is not None or len(token_ids) > most:
                    return chunk.finish_reason
            return None
        chunks = source.generate(prompt, params)
        if manner == "break":
            return await self._iterate(chunks, token_ids, most=chosen.randint(0, 40))
        return await self._iterate(chunks, token_ids, pauses=chosen if manner == "slow" else None)

    async def _iterate(
        self,
        chunks: AsyncGenerator[Chunk, None],
        token_ids: list[int],
        *,
        most: int = sys.maxsize,
        pauses: random.Random | None = None,
    ) -> str | None:
        reason: str | None = None
        async with aclosing(chunks):
            async for chunk in chunks:
                token_ids += chunk.token_ids
                reason = chunk.finish_reason
                if len(token_ids) > most:
                    break
                if pauses is not None and pauses.random() < 0.2:
                    await self._pause(pauses)
        return reason

    async def _cancelled(self, taking: Coroutine[Any, Any, str | None], patience: float) -> str | None:
        """Runs it in a task that is cancelled after so many seconds."""
        task = asyncio.ensure_future(taking)
        try:
            await asyncio.wait([task], timeout=patience)
        finally:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    async def _abort(self, request_id: str, patience: float) -> None:
        await anyio.sleep(patience)
        await self.engine.abort(request_id)

    async def _pause(self, chosen: random.Random) -> None:
        """Waits for a short time, or until some requests of others have ended."""
        if chosen.random() < 0.5:
            await anyio.sleep(chosen.uniform(0, 1))
            return
        with anyio.move_on_after(2):
            for _ in range(chosen.randint(1, 10)):
                await self._ended.wait()

    # --- what they ask ---

    def _tokens(self, chosen: random.Random, length: int) -> tuple[int, ...]:
        return tuple(chosen.randrange(self._vocab_size) for _ in range(length))

    def _prompt(self, chosen: random.Random) -> tuple[int, ...]:
        """Of 1 to 250 tokens: a third of them with a prefix that others have too, a third with repetitions."""
        tokens = self._tokens(chosen, int(2 ** chosen.uniform(0, 6)))
        kind = chosen.randrange(3)
        if kind == 0:
            return chosen.choice(self._prefixes) + tokens
        return tokens * chosen.randint(2, 4) if kind == 1 and len(tokens) < 32 else tokens

    def _params(self, chosen: random.Random) -> SamplingParams:
        options: dict[str, Any] = {"max_tokens": int(2 ** chosen.uniform(0, 6.6)), "ignore_eos": chosen.random() < 0.5}
        if chosen.random() < 0.5:
            options["temperature"] = 0
        else:
            options |= {"temperature": chosen.uniform(0.3, 1.2), "seed": chosen.randrange(2**32)}
            options |= chosen.choice([{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"top_p": 0.8, "top_k": 100}])
        if chosen.random() < 0.2:
            options |= chosen.choice([
                {"repetition_penalty": chosen.uniform(1, 1.5)},
                {"presence_penalty": chosen.uniform(-0.5, 1.5)},
                {"frequency_penalty": chosen.uniform(0, 1)},
            ])  # fmt: skip
        if chosen.random() < 0.2:
            options["stop_token_ids"] = self._tokens(chosen, 20)
            options["min_tokens"] = chosen.randint(0, options["max_tokens"])
        if self._has_text and chosen.random() < 0.1:
            options["stop"] = chosen.choice(["\n\n", "the", ("I ", ":")])
        if chosen.random() < 0.1:
            options["logit_bias"] = dict.fromkeys(self._tokens(chosen, 5), chosen.uniform(-5, 5))
        if chosen.random() < 0.1:
            options["logprobs"] = chosen.randint(0, 5)
        return SamplingParams(**options)


def _sample() -> dict[str, int]:
    """What the process has now."""
    return {
        "rss_bytes": process_rss_bytes(),
        "files": _open_files().total(),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


def _medians(samples: Iterable[dict[str, int]]) -> dict[str, int]:
    columns: dict[str, list[int]] = defaultdict(list)
    for sample in samples:
        for name, figure in sample.items():
            columns[name].append(figure)
    return {name: int(statistics.median(figures)) for name, figures in columns.items()}


def _shown(sample: dict[str, int]) -> str:
    return f"{format_bytes(sample['rss_bytes'])} resident, " + ", ".join(
        f"{figure} {name}" for name, figure in sample.items() if name != "rss_bytes"
    )


if __name__ == "__main__":
    main()
