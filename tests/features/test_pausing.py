"""A user who does not take its chunks pauses its own request, and nobody else's."""

from __future__ import annotations

import dataclasses
import random
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from hermes_async import DeadlineExceededError, Engine, EngineClosedError, RequestEvent, SamplingParams
from tests.engines import check_nothing_is_left, drafts_cost_nothing, open_engine, until
from tests.inside import inside, num_untaken_chunks

pytestmark = pytest.mark.anyio

open_engine = partial(open_engine, max_buffered_chunks=2, prompt_lookup=False)


async def many_turns() -> None:
    """As long as several sweeps would take."""
    for _ in range(300):
        await anyio.lowlevel.checkpoint()


async def rest_of(chunks: Any) -> list[int]:
    with anyio.fail_after(30):
        return [token_id async for chunk in chunks for token_id in chunk.token_ids]


async def pause(engine: Engine, chunks: Any) -> list[int]:
    """Takes one chunk and then none until the request has paused."""
    paused = engine.statistics().num_paused
    chunk = await anext(chunks)
    await until(lambda: engine.statistics().num_paused == paused + 1)
    return list(chunk.token_ids)


@pytest.mark.parametrize("max_buffered_chunks", [1, 2, 5])
async def test_a_request_pauses_and_goes_on_where_it_stopped(tiny_model: Any, max_buffered_chunks: int) -> None:
    async with open_engine(tiny_model, max_buffered_chunks=max_buffered_chunks) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            token_ids = await pause(engine, chunks)
            sweeps = engine.statistics().sweeps
            assert sweeps == 1 + max_buffered_chunks
            await many_turns()
            assert engine.statistics().sweeps == sweeps  # nothing is left to do
            assert (engine.statistics().num_running, engine.statistics().num_paused) == (1, 1)
            token_ids += (await anext(chunks)).token_ids
            await until(lambda: engine.statistics().sweeps == sweeps + 1)  # one was taken, one more is made
            token_ids += await rest_of(chunks)
        assert tuple(token_ids) == tiny_model.references[1]
        assert engine.statistics().sweeps == 12
        await check_nothing_is_left(engine)


async def test_others_go_on_beside_it(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            token_ids = await pause(engine, chunks)
            for idx in (2, 3, 4):
                sweeps = engine.statistics().sweeps
                completion = await engine.complete(tiny_model.prompts[idx], tiny_model.params)
                assert completion.token_ids == tiny_model.references[idx]
                assert completion.timings.sweeps == engine.statistics().sweeps - sweeps
            token_ids += await rest_of(chunks)
        assert tuple(token_ids) == tiny_model.references[1]
        await check_nothing_is_left(engine)


async def test_a_paused_request_takes_part_in_no_sweep(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            await pause(engine, chunks)
            await engine.complete(tiny_model.prompts[2], tiny_model.params)
            last = [chunk async for chunk in chunks][-1]
        assert last.timings.sweeps == 12


async def test_paused_requests_do_not_use_up_the_places(tiny_model: Any) -> None:
    async with open_engine(tiny_model, max_sequences=2) as engine:
        streams = [engine.generate(tiny_model.prompts[idx], tiny_model.params) for idx in range(4)]
        taken = [await pause(engine, chunks) for chunks in streams]
        assert engine.statistics().num_paused == 4
        completion = await engine.complete(tiny_model.prompts[4], tiny_model.params)
        assert completion.token_ids == tiny_model.references[4]
        # All of them go on at once, two a sweep.
        async with anyio.create_task_group() as group:
            for token_ids, chunks in zip(taken, streams, strict=True):

                async def go_on(token_ids: list[int] = token_ids, chunks: Any = chunks) -> None:
                    token_ids += await rest_of(chunks)

                group.start_soon(go_on)
        assert [tuple(token_ids) for token_ids in taken] == tiny_model.references[:4]
        await check_nothing_is_left(engine)


async def test_a_place_that_a_pause_frees_goes_to_who_waits(tiny_model: Any) -> None:
    completions = []

    async def user() -> None:
        completions.append(await engine.complete(tiny_model.prompts[2], tiny_model.params))

    async with open_engine(tiny_model, max_sequences=1) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            await anext(chunks)
            async with anyio.create_task_group() as group:
                group.start_soon(user)
        assert completions[0].token_ids == tiny_model.references[2]
        await check_nothing_is_left(engine)


async def test_a_prompt_is_computed_whoever_takes_it(long_model: Any) -> None:
    """Chunks of a prompt give nothing to take; a long one does not pause."""
    prompt = [*long_model.prompts[4], *long_model.prompts[3]]
    async with open_engine(long_model, max_tokens_per_sweep=4, max_buffered_chunks=1) as engine:
        async with aclosing(engine.generate(prompt, long_model.params)) as chunks:
            token_ids = await pause(engine, chunks)
            assert engine.statistics().sweeps == -(-53 // 4) + 1
            token_ids += await rest_of(chunks)
        assert tuple(token_ids) == long_model.greedy(prompt)


@pytest.mark.parametrize("max_buffered_chunks", [1, 2, 3])
async def test_a_chunk_taken_while_the_last_one_that_fits_is_made(tiny_model: Any, max_buffered_chunks: int) -> None:
    """The user begins to take one just before a sweep pauses the request, and has it just after."""
    async with open_engine(tiny_model, max_buffered_chunks=max_buffered_chunks) as engine:
        begun = anyio.Event()

        async def take(sweep: Any) -> None:
            request = sweep[0].request
            untaken = num_untaken_chunks(request)
            if untaken == max_buffered_chunks - 1 and request.num_output_tokens > 0 and not begun.is_set():
                begun.set()
                await anyio.lowlevel.checkpoint()  # so that the user's task is in the middle of `receive`

        inside(engine).on_swept(take)
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            token_ids = list((await anext(chunks)).token_ids)
            await begun.wait()
            token_ids += await rest_of(chunks)
        assert tuple(token_ids) == tiny_model.references[1]
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("seed", range(4))
async def test_users_of_any_pace(tiny_model: Any, seed: int) -> None:
    chosen = random.Random(seed)
    answers: dict[int, tuple[int, ...]] = {}

    async def user(number: int, idx: int) -> None:
        token_ids: list[int] = []
        async for chunk in engine.generate(tiny_model.prompts[idx], tiny_model.params):
            token_ids += chunk.token_ids
            for _ in range(chosen.choice([0, 0, 1, 2, 5, 20, 100])):
                await anyio.lowlevel.checkpoint()
        answers[number] = tuple(token_ids)

    config = {"max_buffered_chunks": chosen.choice([1, 2, 3]), "max_sequences": chosen.choice([1, 2, 4])}
    async with open_engine(tiny_model, **config, prompt_lookup=bool(seed % 2)) as engine:
        if seed % 2:
            drafts_cost_nothing(engine)
        with anyio.fail_after(50):
            async with anyio.create_task_group() as group:
                for number in range(20):
                    group.start_soon(user, number, number % 5)
        assert answers == {number: tiny_model.references[number % 5] for number in range(20)}
        await check_nothing_is_left(engine)


async def test_drafts_make_larger_chunks_and_the_same_tokens(long_model: Any) -> None:
    prompt = [*range(2, 12)] * 5
    params = dataclasses.replace(long_model.params, max_tokens=60)
    async with open_engine(long_model, prompt_lookup=True) as engine:
        drafts_cost_nothing(engine)
        async with aclosing(engine.generate(prompt, params)) as chunks:
            token_ids = await pause(engine, chunks)
            while True:
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    break
                token_ids += chunk.token_ids
                if chunk.finish_reason is None:
                    await until(lambda: engine.statistics().num_paused == 1 or not inside(engine).request_ids)
        assert tuple(token_ids) == long_model.greedy(prompt, 60)
        assert engine.statistics().drafted_tokens > 0
        await check_nothing_is_left(engine)


# A paused request's end


async def test_abort_while_paused(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params, request_id="r")) as chunks:
            token_ids = await pause(engine, chunks)
            assert await engine.abort("r")
            engine.drop_prefixes()
            assert engine.statistics().kv_bytes == 0  # although nothing was taken
            rest = [chunk async for chunk in chunks]
        token_ids += [token_id for chunk in rest for token_id in chunk.token_ids]
        assert tuple(token_ids) == tiny_model.references[1][:3]
        assert [chunk.finish_reason for chunk in rest] == [None, None, "abort"]
        await check_nothing_is_left(engine)


async def test_leaving_while_paused(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            await pause(engine, chunks)
        await check_nothing_is_left(engine)


async def test_cancelled_while_paused(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:

        async def user() -> None:
            async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
                async for _ in chunks:
                    await anyio.sleep_forever()

        async with anyio.create_task_group() as group:
            group.start_soon(user)
            await until(lambda: engine.statistics().num_paused == 1)
            group.cancel_scope.cancel()
        await check_nothing_is_left(engine)


async def test_a_deadline_passes_while_paused(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        deadline = anyio.current_time() + 1
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params, deadline=deadline)) as chunks:
            token_ids = await pause(engine, chunks)
            await until(lambda: not inside(engine).request_ids)
            with pytest.raises(DeadlineExceededError, match="3 tokens"):
                async for chunk in chunks:
                    token_ids += chunk.token_ids
        assert tuple(token_ids) == tiny_model.references[1][:3]
        await check_nothing_is_left(engine)


async def test_the_engine_is_left_while_paused(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        chunks = engine.generate(tiny_model.prompts[1], tiny_model.params)
        token_ids = await pause(engine, chunks)
    with pytest.raises(EngineClosedError):
        async for chunk in chunks:
            token_ids += chunk.token_ids
    assert tuple(token_ids) == tiny_model.references[1][:3]
    assert engine.statistics().num_leases == 0


async def test_a_request_that_ends_with_the_chunk_that_would_pause_it(tiny_model: Any) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], params)) as chunks:
            token_ids = list((await anext(chunks)).token_ids)
            await until(lambda: not inside(engine).request_ids)  # ended, with two chunks untaken
            token_ids += await rest_of(chunks)
        assert tuple(token_ids) == tiny_model.references[1][:3]
        await check_nothing_is_left(engine)


async def test_a_session_s_turn_pauses(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with engine.session() as chat:
            async with aclosing(chat.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
                taken = await pause(engine, chunks)
            assert chat.token_ids == (*tiny_model.prompts[1], *taken)  # what was made and not taken is not part of it
            history = [*chat.token_ids, 5]
            async with aclosing(chat.generate([5], tiny_model.params)) as chunks:
                taken = await pause(engine, chunks)
                taken += await rest_of(chunks)
            assert tuple(taken) == tiny_model.greedy(history)
        await check_nothing_is_left(engine)


async def test_pauses_are_told(tiny_model: Any) -> None:
    events: list[tuple[str, int]] = []

    def on_event(event: RequestEvent) -> None:
        events.append((event.kind, event.usage.completion_tokens))

    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    async with open_engine(tiny_model, on_event) as engine:
        chunks = engine.generate(tiny_model.prompts[1], params)
        await pause(engine, chunks)
        await anext(chunks)
        await until(lambda: engine.statistics().num_paused == 1)
        await rest_of(chunks)
    assert events == [
        ("queued", 0), ("admitted", 0), ("first_token", 1), ("paused", 3), ("resumed", 3), ("paused", 4),
        ("resumed", 4), ("finished", 5),
    ]  # fmt: skip
