"""Requests that are cancelled, aborted and left at random moments cost the others nothing, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio.abc import TaskGroup

from hermes_async import Engine, EngineConfig, RequestError
from hermes_async.pipeload.stage import StageState
from tests.engines import both_loops, settle, until
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()

NUM_REQUESTS = 125  # cancelled ones of each engine; four seeds, two event loops: 1,000


async def check_nothing_is_left(engine: Engine) -> None:
    await settle(engine)
    statistics = engine.statistics()
    assert (statistics.num_running, statistics.num_waiting) == (0, 0)
    assert statistics.holders.keys() == {"resident weights", "ring buffers", "workspace", "shared prefixes"}
    assert statistics.num_leases == 4
    assert statistics.bytes_in_use == sum(statistics.holders.values())
    assert inside(engine).request_ids == set()
    assert statistics.kv_bytes == statistics.prefix_bytes == statistics.holders["shared prefixes"]
    engine.drop_prefixes()
    assert engine.statistics().kv_bytes == engine.statistics().holders["shared prefixes"] == 0
    streamed = [stage for stage in inside(engine).stages if not stage.resident]
    held = [stage for stage in streamed if stage.buffer is not None]
    assert len(held) == min(engine.plan.num_buffers, len(streamed))  # warm for the next request
    assert all(stage.state is StageState.READY and stage.error is None for stage in held)
    assert len({id(stage.buffer) for stage in held}) == len(held)


class Tokens(list[int]):
    """A request's tokens as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.more = anyio.Event()

    def extend(self, token_ids: Iterable[int]) -> None:
        super().extend(token_ids)
        self.more.set()
        self.more = anyio.Event()


class Crowd:
    """Users of one engine; each ends its request in a way and at a moment that `random` chooses."""

    def __init__(self, engine: Engine, model: Any, random: random.Random) -> None:
        self.engine, self.model, self.random = engine, model, random
        self.num_ended = 0
        self.wrong: list[Any] = []

    def _check(self, idx: int, token_ids: list[int], *, whole: bool) -> None:
        reference = self.model.references[idx]
        if tuple(token_ids) != reference[: len(token_ids)] or (whole and len(token_ids) != len(reference)):
            self.wrong.append((idx, token_ids))

    async def survivor(self, idx: int) -> None:
        completion = await self.engine.complete(self.model.prompts[idx], self.model.params)
        self._check(idx, list(completion.token_ids), whole=True)

    async def breaks_out(self, idx: int, number: int) -> None:
        token_ids: list[int] = []
        num_chunks = self.random.randrange(1, 8)
        async with aclosing(self.engine.generate(self.model.prompts[idx], self.model.params)) as chunks:
            async for chunk in chunks:
                token_ids += chunk.token_ids
                if len(token_ids) >= num_chunks:
                    break
        self._check(idx, token_ids, whole=False)

    async def cancels_a_scope(self, idx: int, number: int) -> None:
        token_ids = Tokens()

        async def consume() -> None:
            with scope:
                async for chunk in self.engine.generate(self.model.prompts[idx], self.model.params):
                    token_ids.extend(chunk.token_ids)

        scope = anyio.CancelScope()
        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            await self._a_while(token_ids)
            scope.cancel()
        self._check(idx, token_ids, whole=False)

    async def aborts(self, idx: int, number: int) -> None:
        token_ids = Tokens()
        reasons = []
        name = f"r{number}"

        async def consume() -> None:
            async for chunk in self.engine.generate(self.model.prompts[idx], self.model.params, request_id=name):
                token_ids.extend(chunk.token_ids)
                reasons.append(chunk.finish_reason)

        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            await self._a_while(token_ids)
            while not await self.engine.abort(name) and not reasons:
                await anyio.lowlevel.checkpoint()
            assert name not in inside(self.engine).request_ids
        assert reasons[-1] in ("abort", "length")
        self._check(idx, token_ids, whole=False)

    async def cancels_and_aborts_at_once(self, idx: int, number: int) -> None:
        name = f"r{number}"
        token_ids = Tokens()
        scope = anyio.CancelScope()

        async def consume() -> None:
            with scope:
                async for chunk in self.engine.generate(self.model.prompts[idx], self.model.params, request_id=name):
                    token_ids.extend(chunk.token_ids)

        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            await self._a_while(token_ids)
            group.start_soon(self.engine.abort, name)
            await anyio.lowlevel.checkpoint()
            scope.cancel()

    async def _a_while(self, token_ids: Tokens) -> None:
        """A random number of turns of the event loop, or until a random number of tokens came."""
        if self.random.random() < 0.5:
            for _ in range(self.random.randrange(40)):
                await anyio.lowlevel.checkpoint()
        else:
            wanted = self.random.randrange(1, 6)
            while len(token_ids) < wanted:
                await token_ids.more.wait()

    async def leaver(self, number: int) -> None:
        ways = (self.breaks_out, self.cancels_a_scope, self.aborts, self.cancels_and_aborts_at_once)
        await self.random.choice(ways)(self.random.randrange(len(self.model.prompts)), number)
        self.num_ended += 1


@pytest.mark.parametrize("seed", range(4))
async def test_a_thousand_random_cancellations(tiny_model: Any, seed: int) -> None:
    chosen = random.Random(seed)
    config = EngineConfig(
        num_loading_agents=1 + seed % 2,
        max_resident_layers=2 + seed % 2,
        max_tokens_per_sweep=chosen.choice([8, 16, 64]),
        max_sequences=chosen.choice([3, 8]),
        kv_budget=16 * 1024 * chosen.choice([4, 12]),  # with the least some requests wait for memory
    )
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as engine:
        crowd = Crowd(engine, tiny_model, chosen)
        numbers = iter(range(NUM_REQUESTS))

        async def user() -> None:
            for number in numbers:
                await crowd.leaver(number)

        async def survivors(idx: int) -> None:
            while crowd.num_ended < NUM_REQUESTS:
                await crowd.survivor(idx)

        async with anyio.create_task_group() as group:
            for idx in (2, 4):
                group.start_soon(survivors, idx)
            for _ in range(10):
                group.start_soon(user)
        assert crowd.num_ended == NUM_REQUESTS
        assert crowd.wrong == []
        await check_nothing_is_left(engine)
        for idx in range(len(tiny_model.prompts)):
            await crowd.survivor(idx)
        assert crowd.wrong == []


def hold_reads(disk: Any) -> tuple[Callable[[], Any], Callable[[], None]]:
    """From now on reads wait; returns how to wait for the first one, and how to let them all go on."""
    entered, may_pass = threading.Event(), threading.Event()

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        entered.set()
        assert may_pass.wait(30)
        return read()

    disk.on_read = on_read

    async def wait() -> None:
        assert await anyio.to_thread.run_sync(entered.wait, 30)

    return wait, may_pass.set


class Users:
    """Of one engine, which tells here what becomes of their requests, named by letters."""

    def __init__(self, model: Any, **config: Any) -> None:
        self.model = model
        self.events: list[tuple[str, str]] = []
        self.reasons: dict[str, str | None] = {}
        options = {"num_loading_agents": 1, "max_resident_layers": 2, "max_tokens_per_sweep": 16, **config}
        self.engine = Engine(
            model.path,
            memory_budget="8MiB",
            config=EngineConfig(**options),
            on_event=lambda event: self.events.append((event.kind, event.request_id)),
        )

    async def consume(self, name: str, num_tokens: int = 12) -> None:
        params = dataclasses.replace(self.model.params, max_tokens=num_tokens)
        async for chunk in self.engine.generate(self.model.prompts[1], params, request_id=name):
            self.reasons[name] = chunk.finish_reason

    async def queued(self, group: TaskGroup, name: str, num_tokens: int = 12) -> None:
        """Returns when the request is in the queue, or past it."""
        group.start_soon(self.consume, name, num_tokens)
        await until(lambda: ("queued", name) in self.events)

    async def abort_at_once(self, *names: str) -> None:
        """In one turn of the event loop."""
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(self.engine.abort, name)

    def admitted(self) -> str:
        return "".join(name for kind, name in self.events if kind == "admitted")


@pytest.mark.parametrize("num_places", [2, 8])
async def test_aborted_in_the_moment_it_is_admitted(tiny_model: Any, disk: Any, num_places: int) -> None:
    """A place, or memory, becomes free and is granted to a request that is aborted in the same turn of the loop."""
    # Eight blocks of KV, of which b's 112 tokens take seven.
    users = Users(tiny_model, max_sequences=num_places, kv_budget="64KiB", share_prefixes=False)
    async with users.engine as engine:
        await settle(engine)
        reading, go_on = hold_reads(disk)
        async with anyio.create_task_group() as group:
            await users.queued(group, "a", 11)
            await reading()  # a is in a sweep that does not end
            await users.queued(group, "b", 107)  # has what it needs, and waits for the next sweep
            await users.queued(group, "c")
            assert (engine.statistics().num_running, engine.statistics().num_waiting) == (2, 1)
            await users.abort_at_once("b", "c")
            assert users.events[-2:] == [("finished", "b"), ("finished", "c")]
            assert engine.statistics().num_running == 1
            go_on()
        assert users.reasons == {"a": "length", "b": "abort", "c": "abort"}
        await check_nothing_is_left(engine)


async def test_whoever_is_aborted_while_waiting_the_others_keep_their_order(tiny_model: Any, disk: Any) -> None:
    users = Users(tiny_model, max_sequences=1)
    async with users.engine as engine:
        await settle(engine)
        reading, go_on = hold_reads(disk)
        async with anyio.create_task_group() as group:
            for name in "abcdefg":
                await users.queued(group, name)
            await reading()
            await users.abort_at_once("d", "b", "g")
            assert engine.statistics().num_waiting == 3
            go_on()
        assert users.admitted() == "acef"
        assert users.reasons == {**dict.fromkeys("acef", "length"), **dict.fromkeys("bdg", "abort")}
        await check_nothing_is_left(engine)


async def test_behind_an_aborted_one_that_was_too_large_the_next_ones_come_in(tiny_model: Any, disk: Any) -> None:
    users = Users(tiny_model, max_sequences=8, kv_budget="64KiB", share_prefixes=False)
    async with users.engine as engine:
        await settle(engine)
        reading, go_on = hold_reads(disk)
        async with anyio.create_task_group() as group:
            await users.queued(group, "a")
            await reading()
            for name, num_tokens in (("b", 123), ("c", 11), ("d", 11)):
                await users.queued(group, name, num_tokens)
            assert users.admitted() == "a"  # c and d would fit, but b came first
            await users.abort_at_once("b")
            assert users.admitted() == "acd"
            go_on()
        assert users.reasons == {"a": "length", "b": "abort", "c": "length", "d": "length"}
        await check_nothing_is_left(engine)


async def test_every_request_of_a_sweep_aborted_while_rows_are_read(tiny_model: Any, disk: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        await settle(engine)
        sweeps = engine.statistics().sweeps
        reading, go_on = hold_reads(disk)  # the ring is full, so the first read is of embedding rows
        reasons = []

        async def consume() -> None:
            async for chunk in engine.generate(tiny_model.prompts[1], tiny_model.params, request_id="a"):
                reasons.append(chunk.finish_reason)

        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            await reading()
            group.start_soon(engine.abort, "a")
            await anyio.wait_all_tasks_blocked()
            go_on()
        assert reasons == ["abort"]
        await check_nothing_is_left(engine)
        assert engine.statistics().sweeps == sweeps  # nobody wanted it


async def test_cancelled_while_the_prompt_is_prepared(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        for turns in range(12):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(engine.complete, tiny_model.prompts[0], tiny_model.params)
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        await check_nothing_is_left(engine)


async def test_a_refused_request_leaves_nothing(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        for _ in range(3):
            with pytest.raises(RequestError):
                await engine.complete([], tiny_model.params)
        await check_nothing_is_left(engine)
