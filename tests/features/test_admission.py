"""Who is let in and when: memory, places, the queue's end, deadlines, names, and what is told of it all."""

from __future__ import annotations

import dataclasses
import math
import random
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import pytest

from hermes_async import (
    ConfigError,
    DeadlineExceededError,
    Engine,
    EngineClosedError,
    EngineConfig,
    EngineFailedError,
    MemoryBudgetError,
    QueueFullError,
    RequestError,
    RequestEvent,
    SamplingParams,
)
from tests.engines import BLOCK_BYTES, check_nothing_is_left, greedy_params, open_engine, tokens, until
from tests.inside import inside

pytestmark = pytest.mark.anyio

open_engine = partial(open_engine, share_prefixes=False, prompt_lookup=False)


class Users:
    """Each asks for one answer; who was let in, in what order, and what each got."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.admitted: list[str] = []
        self.finished: list[str] = []
        self.results: dict[str, Any] = {}

    def on_event(self, event: RequestEvent) -> None:
        if event.kind == "admitted":
            self.admitted.append(event.request_id)
        elif event.kind == "finished":
            self.finished.append(event.request_id)

    async def ask(self, engine: Engine, name: str, prompt: list[int], params: SamplingParams, **kwargs: Any) -> None:
        async def ask() -> None:
            try:
                self.results[name] = await engine.complete(prompt, params, request_id=name, **kwargs)
            except RequestError as error:
                self.results[name] = error

        self._group.start_soon(ask)
        await until(lambda: name in inside(engine).request_ids or name in self.results)


# First come, first served


async def test_a_large_request_at_the_head_is_not_overtaken(long_model: Any) -> None:
    async with anyio.create_task_group() as group:
        users = Users(group)
        async with open_engine(long_model, users.on_event, kv_budget=16 * BLOCK_BYTES) as engine:
            await users.ask(engine, "first", tokens(1, 100), greedy_params(60))  # ten blocks of sixteen
            await users.ask(engine, "large", tokens(2, 100), greedy_params(60))
            await users.ask(engine, "small", tokens(3, 5), greedy_params(5))  # one would be free
            assert engine.statistics().num_waiting == 2
            await until(lambda: len(users.results) == 3)
            await check_nothing_is_left(engine)
            assert users.admitted == ["first", "large", "small"]
            assert users.finished[0] == "first"
            for seed, name in enumerate(("first", "large"), start=1):
                assert users.results[name].token_ids == long_model.greedy(tokens(seed, 100), 60)


async def test_places_go_to_who_came_first(long_model: Any) -> None:
    names = [str(number) for number in range(8)]
    async with anyio.create_task_group() as group:
        users = Users(group)
        async with open_engine(long_model, users.on_event, max_sequences=2) as engine:
            for seed, name in enumerate(names):
                await users.ask(engine, name, tokens(seed, 10), greedy_params(1 + 13 * seed % 8))
                assert engine.statistics().num_running <= 2
            await until(lambda: len(users.results) == 8)
        assert users.admitted == names


async def test_the_queue_goes_on_when_its_head_is_aborted(long_model: Any) -> None:
    async with anyio.create_task_group() as group:
        users = Users(group)
        async with open_engine(long_model, users.on_event, kv_budget=16 * BLOCK_BYTES) as engine:
            await users.ask(engine, "first", tokens(1, 100), greedy_params(100))
            await users.ask(engine, "large", tokens(2, 100), greedy_params(100))
            await users.ask(engine, "small", tokens(3, 5), greedy_params(5))
            assert await engine.abort("large")
            await until(lambda: "small" in users.results)
            assert "first" not in users.results  # so it did not have to wait for that one
            assert users.results["large"].finish_reason == "abort"
            assert await engine.abort("first")
            await check_nothing_is_left(engine)
    assert users.admitted == ["first", "small"]


@pytest.mark.parametrize("seed", range(3))
async def test_memory_is_never_more_than_the_budget(long_model: Any, seed: int) -> None:
    chosen = random.Random(seed)
    requests = [(tokens(idx, chosen.randrange(1, 150)), chosen.randrange(1, 60)) for idx in range(10)]
    most = 0

    def on_event(event: RequestEvent) -> None:
        nonlocal most
        most = max(most, engine.statistics().kv_bytes)

    wrong = []

    async def ask(prompt: list[int], num_tokens: int) -> None:
        completion = await engine.complete(prompt, greedy_params(num_tokens))
        if completion.token_ids != long_model.greedy(prompt, num_tokens):
            wrong.append(prompt)

    async with open_engine(
        long_model, on_event, kv_budget=16 * BLOCK_BYTES, share_prefixes=bool(seed % 2), max_sequences=16
    ) as engine:
        # No slack elsewhere in the budget: what KV takes over its share would be noticed at once.
        governor = inside(engine).governor
        spare = governor.acquire_nowait("spare", governor.free_bytes - 16 * BLOCK_BYTES)
        async with anyio.create_task_group() as group:
            for prompt, num_tokens in requests:
                group.start_soon(ask, prompt, num_tokens)
        assert wrong == []
        assert 8 * BLOCK_BYTES < most <= 16 * BLOCK_BYTES
        assert engine.statistics().peak_bytes_in_use <= engine.statistics().memory_budget
        spare.release()
        engine.drop_prefixes()
        await check_nothing_is_left(engine)


async def test_a_request_that_can_never_fit_fails_at_once(long_model: Any) -> None:
    async with open_engine(long_model, kv_budget=16 * BLOCK_BYTES) as engine:
        async with aclosing(engine.generate(tokens(1, 100), greedy_params(100))) as chunks:
            await anext(chunks)
            with pytest.raises(MemoryBudgetError) as caught:  # although others wait for memory
                await engine.complete(tokens(2, 100), greedy_params(157))
            assert caught.value.requested_bytes == 17 * BLOCK_BYTES
            assert caught.value.budget_bytes == 16 * BLOCK_BYTES
            assert caught.value.minimum_bytes == 8 * 2**20  # in which weights can leave it
            assert "257 tokens" in str(caught.value)
            assert f"kv_budget={17 * BLOCK_BYTES}" in str(caught.value)
        completion = await engine.complete(tokens(2, 100), greedy_params(156))  # 256 tokens: all there is
        assert completion.token_ids == long_model.greedy(tokens(2, 100), 156)
        await check_nothing_is_left(engine)


async def test_as_many_tokens_as_memory_has_room_for(long_model: Any) -> None:
    async with open_engine(long_model, kv_budget=16 * BLOCK_BYTES) as engine:
        completion = await engine.complete(tokens(1, 200), dataclasses.replace(greedy_params(1), max_tokens=None))
        assert len(completion.token_ids) == 56
        assert completion.finish_reason == "length"
        with pytest.raises(MemoryBudgetError):
            await engine.complete(tokens(1, 256), dataclasses.replace(greedy_params(1), max_tokens=None))


async def test_the_kv_budget_is_part_of_the_memory_budget(long_model: Any) -> None:
    for kv_budget in ("8MiB", "1GiB"):
        with pytest.raises(ConfigError, match="kv_budget"):
            async with Engine(long_model.path, memory_budget="8MiB", config=EngineConfig(kv_budget=kv_budget)):
                pytest.fail("entered")


# The queue's end


async def test_a_full_queue_refuses_and_takes_again_later(long_model: Any) -> None:
    async with anyio.create_task_group() as group:
        users = Users(group)
        async with open_engine(long_model, users.on_event, max_sequences=1, max_waiting=2) as engine:
            for seed, name in enumerate(("runs", "waits", "waits too")):
                await users.ask(engine, name, tokens(seed, 10), greedy_params(40))
            for _ in range(3):
                with pytest.raises(QueueFullError, match="max_waiting=2"):
                    await engine.complete([5], greedy_params(1))
            assert engine.statistics().num_waiting == 2
            assert await engine.abort("waits")
            await users.ask(engine, "later", tokens(3, 10), greedy_params(4))
            await until(lambda: len(users.results) == 4)
            assert users.results["later"].token_ids == long_model.greedy(tokens(3, 10), 4)
            await check_nothing_is_left(engine)
    assert users.admitted == ["runs", "waits too", "later"]


async def test_no_queue_at_all(long_model: Any) -> None:
    async with open_engine(long_model, max_sequences=2, max_waiting=0) as engine:
        async with aclosing(engine.generate([5], greedy_params(200))) as first:
            await anext(first)
            assert (await engine.complete([6], greedy_params(4))).token_ids == long_model.greedy([6], 4)
            async with aclosing(engine.generate([7], greedy_params(200))) as second:
                await anext(second)
                with pytest.raises(QueueFullError):
                    await engine.complete([8], greedy_params(4))
        await check_nothing_is_left(engine)
        assert (await engine.complete([8], greedy_params(4))).token_ids == long_model.greedy([8], 4)


async def test_a_full_queue_leaves_a_session_as_it_was(long_model: Any) -> None:
    async with open_engine(long_model, max_sequences=1, max_waiting=0) as engine, engine.session() as chat:
        await chat.complete(tokens(1, 40), greedy_params(4))
        before = chat.token_ids
        async with aclosing(engine.generate([5], greedy_params(200))) as chunks:
            await anext(chunks)
            with pytest.raises(QueueFullError):
                await chat.complete([5], greedy_params(4))
        assert chat.token_ids == before
        await until(lambda: not engine.statistics().num_running)
        completion = await chat.complete([5], greedy_params(4))
        assert completion.token_ids == long_model.greedy([*before, 5], 4)
        assert completion.usage.cached_tokens == 43


async def test_any_number_may_wait(long_model: Any) -> None:
    answers = []

    async def ask() -> None:
        answers.append((await engine.complete([5, 6], greedy_params(2))).token_ids)

    async with open_engine(long_model, max_sequences=2, max_waiting=None) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(ask)
        assert answers == [long_model.greedy([5, 6], 2)] * 60


# Deadlines


async def test_a_deadline_that_is_kept(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        deadline = anyio.current_time() + 1000
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params, deadline=deadline)
        assert completion.token_ids == tiny_model.references[1]
        await check_nothing_is_left(engine)


async def test_a_deadline_passes_while_it_runs(long_model: Any) -> None:
    token_ids: list[int] = []
    async with open_engine(long_model) as engine:
        wait = 0.3
        while not token_ids:  # on a slow machine none may come in time
            with pytest.raises(DeadlineExceededError, match=r"\d+ tokens came"):
                async for chunk in engine.generate(
                    tokens(1, 5), greedy_params(500), deadline=anyio.current_time() + wait
                ):
                    token_ids += chunk.token_ids
                    await anyio.sleep(0.01)  # so that it is not done before
            wait *= 2
        assert 0 < len(token_ids) < 500
        assert tuple(token_ids) == long_model.greedy(tokens(1, 5), len(token_ids))
        await check_nothing_is_left(engine)


async def test_a_deadline_passes_while_it_waits(long_model: Any) -> None:
    async with open_engine(long_model, max_sequences=1) as engine:
        async with aclosing(engine.generate([5], greedy_params(400))) as chunks:
            await anext(chunks)
            await until(lambda: engine.statistics().num_paused == 0)
            with pytest.raises(DeadlineExceededError, match="0 tokens came"):
                await engine.complete([6], greedy_params(4), deadline=anyio.current_time() + 0.05)
            assert engine.statistics().num_waiting == 0
        await check_nothing_is_left(engine)


async def test_a_deadline_in_the_past(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        with pytest.raises(DeadlineExceededError, match="event loop's clock"):
            await engine.complete([5], tiny_model.params, deadline=anyio.current_time() - 1)
        with pytest.raises(DeadlineExceededError, match="event loop's clock"):
            await engine.complete([5], tiny_model.params, deadline=10)  # seconds, not a time
        assert engine.statistics().sweeps == 0
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("deadline", ["soon", True, math.nan, math.inf, [5]])
async def test_a_deadline_that_is_no_time(tiny_model: Any, deadline: Any) -> None:
    async with open_engine(tiny_model) as engine:
        with pytest.raises(RequestError, match="deadline must be a time"):
            await engine.complete([5], tiny_model.params, deadline=deadline)
        await check_nothing_is_left(engine)


async def test_a_turn_s_deadline_keeps_what_came(long_model: Any) -> None:
    async with open_engine(long_model) as engine, engine.session() as chat:
        token_ids: list[int] = []
        with pytest.raises(DeadlineExceededError):
            async for chunk in chat.generate([5], greedy_params(500), deadline=anyio.current_time() + 0.5):
                token_ids += chunk.token_ids
                await anyio.sleep(0.01)
        assert chat.token_ids == ((5, *token_ids) if token_ids else ())
        history = [*chat.token_ids, 6]
        assert (await chat.complete([6], greedy_params(4))).token_ids == long_model.greedy(history, 4)


# Names


async def test_a_name_may_be_used_again_as_soon_as_its_request_ended(tiny_model: Any) -> None:
    """Also while the first one's iterator, which has given its last chunk, is not yet closed."""
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params, request_id="r")) as first:
            async for chunk in first:
                if chunk.finish_reason is not None:
                    break
            second = engine.generate(tiny_model.prompts[2], tiny_model.params, request_id="r")
            token_ids = list((await anext(second)).token_ids)
        with anyio.fail_after(30):
            async for chunk in second:
                token_ids += chunk.token_ids
        assert tuple(token_ids) == tiny_model.references[2]
        assert chunk.finish_reason == "length"
        await check_nothing_is_left(engine)


async def test_of_two_requests_with_one_name_the_second_is_refused(tiny_model: Any) -> None:
    results: list[Any] = []

    async def ask() -> None:
        try:
            results.append((await engine.complete(tiny_model.prompts[1], tiny_model.params, request_id="r")).token_ids)
        except RequestError as error:
            results.append(str(error))

    async with open_engine(tiny_model) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(ask)
        assert sorted(results, key=str) == [
            tiny_model.references[1], "request_id 'r' is in use by a request that has not ended"
        ]  # fmt: skip
        await check_nothing_is_left(engine)


# Events


async def test_a_request_s_way_is_told(tiny_model: Any) -> None:
    events: list[RequestEvent] = []
    async with open_engine(tiny_model, events.append, max_tokens_per_sweep=4) as engine:
        await engine.complete(tiny_model.prompts[3], tiny_model.params, request_id="r")
    assert [event.kind for event in events] == ["queued", "admitted", "first_token", "finished"]
    assert [event.usage.completion_tokens for event in events] == [0, 0, 1, 12]
    assert [event.timings.sweeps for event in events] == [0, 0, 5, 16]
    assert {event.usage.prompt_tokens for event in events} == {20}
    assert {event.request_id for event in events} == {"r"}
    assert [event.finish_reason for event in events] == [None, None, None, "length"]
    assert [event.error for event in events] == [None] * 4
    assert [event.at for event in events] == sorted(event.at for event in events)


async def test_reused_tokens_are_told_at_the_admission(tiny_model: Any) -> None:
    events: list[RequestEvent] = []
    async with open_engine(tiny_model, events.append, share_prefixes=True) as engine:
        for _ in range(2):
            await engine.complete(tiny_model.prompts[4], tiny_model.params)
    assert [event.usage.cached_tokens for event in events] == [0] * 4 + [0, 32, 32, 32]


async def test_ends_are_told(tiny_model: Any) -> None:
    finished: list[RequestEvent] = []

    def on_event(event: RequestEvent) -> None:
        if event.kind == "finished":
            finished.append(event)

    async with open_engine(tiny_model, on_event, max_sequences=1, max_waiting=0) as engine:
        stop = dataclasses.replace(tiny_model.params, stop_token_ids=tiny_model.references[1][:1])
        await engine.complete(tiny_model.prompts[1], stop)
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            await anext(chunks)
            with pytest.raises(QueueFullError):
                await engine.complete([5])
        await check_nothing_is_left(engine)
        with pytest.raises(RequestError):
            await engine.complete([1000])  # it was refused before there was a request
        kept = engine.generate(tiny_model.prompts[1], tiny_model.params)
        await anext(kept)
    assert [(event.finish_reason, type(event.error)) for event in finished] == [
        ("stop", type(None)), (None, QueueFullError), ("abort", type(None)), (None, EngineClosedError)
    ]  # fmt: skip
    with pytest.raises(EngineClosedError):
        await anext(kept)


@pytest.mark.parametrize("kind", ["queued", "admitted", "first_token", "paused", "resumed", "finished"])
async def test_what_a_listener_raises_ends_the_engine(tiny_model: Any, kind: str) -> None:
    def on_event(event: RequestEvent) -> None:
        if event.kind == kind:
            raise ZeroDivisionError("in the listener")

    async with open_engine(tiny_model, on_event, max_buffered_chunks=1) as engine:
        with pytest.raises(EngineFailedError, match="in the listener"), anyio.fail_after(30):
            while True:
                async for _ in engine.generate(tiny_model.prompts[1], tiny_model.params):
                    await until(lambda: engine.statistics().num_paused == 1 or not inside(engine).request_ids)
    assert engine.statistics().num_leases == 0


# Leaving the engine


async def test_everyone_is_told_when_the_engine_is_left(long_model: Any) -> None:
    """The head of the queue does not fit, whatever the running turn gives back to its session."""
    errors, kinds = [], []

    async def ask(prompt: list[int], params: SamplingParams) -> None:
        with pytest.raises(EngineClosedError):
            await engine.complete(prompt, params)
        errors.append(EngineClosedError)

    def on_event(event: RequestEvent) -> None:
        kinds.append(event.kind)

    async with anyio.create_task_group() as group:
        async with open_engine(long_model, on_event, kv_budget=16 * BLOCK_BYTES) as engine:
            chat = engine.session()
            turn = chat.generate(tokens(1, 100), greedy_params(100))
            await anext(turn)
            group.start_soon(ask, tokens(2, 100), greedy_params(150))
            await until(lambda: kinds.count("queued") == 2)
            group.start_soon(ask, [5], greedy_params(1))
            await until(lambda: kinds.count("queued") == 3)
            assert engine.statistics().num_waiting == 2
        with pytest.raises(EngineClosedError):
            async for _ in turn:
                pass
        await until(lambda: len(errors) == 2)
    statistics = engine.statistics()
    assert (statistics.num_leases, statistics.num_waiting, statistics.num_sessions) == (0, 0, 0)
