"""Requests that begin with the same tokens compute them once and hold them once; answers do not change."""

from __future__ import annotations

import dataclasses
import random
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from hermes_async import Engine, SamplingParams
from tests.engines import BLOCK_BYTES, greedy_params, open_engine, tokens, until
from tests.inside import inside

pytestmark = pytest.mark.anyio

open_engine = partial(open_engine, prompt_lookup=False)


BLOCK = 16


async def check_only_prefixes_are_left(engine: Engine) -> None:
    await until(lambda: not engine.statistics().num_running)
    statistics = engine.statistics()
    assert (statistics.num_waiting, statistics.num_leases) == (0, 4)
    assert statistics.kv_bytes == statistics.prefix_bytes == statistics.holders["shared prefixes"]
    engine.drop_prefixes()
    assert engine.statistics().kv_bytes == engine.statistics().holders["shared prefixes"] == 0


class Users:
    """Ask at the same time, and keep their answers by name."""

    def __init__(self, engine: Engine, params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self.completions: dict[Any, Any] = {}

    async def ask(self, name: Any, prompt: list[int]) -> None:
        self.completions[name] = await self._engine.complete(prompt, self._params, request_id=str(name))

    async def ask_all(self, prompts: list[list[int]]) -> list[Any]:
        async with anyio.create_task_group() as group:
            for idx, prompt in enumerate(prompts):
                group.start_soon(self.ask, idx, prompt)
        return [self.completions[idx] for idx in range(len(prompts))]


# At once


async def test_requests_at_once_compute_a_common_beginning_once(long_model: Any) -> None:
    prefix = tokens(1, 40)
    prompts = [[*prefix, *tokens(seed, 5)] for seed in range(2, 6)]
    async with open_engine(long_model) as engine:
        completions = await Users(engine, long_model.params).ask_all(prompts)
        assert [done.token_ids for done in completions] == [long_model.greedy(prompt) for prompt in prompts]
        assert sorted(done.usage.cached_tokens for done in completions) == [0, 32, 32, 32]
        statistics = engine.statistics()
        assert (statistics.prefix_hits, statistics.prefix_tokens) == (3, 3 * 32)
        # 45 + 3 * 13 tokens, 16 a sweep, at least.
        assert statistics.sweeps <= -(-(45 + 3 * 13) // 16) + 12 + 3
        await check_only_prefixes_are_left(engine)


async def test_a_common_beginning_is_held_once(long_model: Any) -> None:
    prefix = tokens(1, 64)
    prompts = [[*prefix, *tokens(seed, 5)] for seed in range(2, 6)]
    for share_prefixes, num_blocks in ((True, 4 + 4 * 2), (False, 4 * 6)):
        most = 0

        def on_event(event: Any) -> None:
            nonlocal most
            most = max(most, engine.statistics().kv_bytes)

        config = dataclasses.replace(long_model.config, share_prefixes=share_prefixes)
        async with Engine(long_model.path, memory_budget="8MiB", config=config, on_event=on_event) as engine:
            await Users(engine, greedy_params(25)).ask_all(prompts)
        assert most == num_blocks * BLOCK_BYTES


async def test_a_prompt_that_goes_on_from_another_s_at_once(long_model: Any) -> None:
    """The shorter one ends within what the longer ones share, at and beside the ends of blocks."""
    longest = tokens(1, 100)
    prompts = [longest[:length] for length in (100, 15, 16, 17, 31, 32, 33, 64, 65, 1)]
    async with open_engine(long_model, max_sequences=10) as engine:
        for order in (prompts, prompts[::-1], prompts):
            completions = await Users(engine, long_model.params).ask_all(order)
            assert [done.token_ids for done in completions] == [long_model.greedy(prompt) for prompt in order]
        await check_only_prefixes_are_left(engine)


@pytest.mark.parametrize("max_tokens_per_sweep", [1, 5, 16, 24, 200])
async def test_chunks_of_any_size(long_model: Any, max_tokens_per_sweep: int) -> None:
    """Prompts are computed in chunks that end anywhere in the blocks that others wait for."""
    prefix = tokens(1, 40)
    prompts = [[*prefix, *tokens(2, 20)], [*prefix, *tokens(2, 20), 7], [*prefix, *tokens(3, 3)], prefix, tokens(4, 9)]
    async with open_engine(long_model, max_tokens_per_sweep=max_tokens_per_sweep, max_sequences=5) as engine:
        completions = await Users(engine, long_model.params).ask_all(prompts)
        assert [done.token_ids for done in completions] == [long_model.greedy(prompt) for prompt in prompts]
        await check_only_prefixes_are_left(engine)


async def test_the_same_prompt_many_times_at_once(long_model: Any) -> None:
    prompt = long_model.prompts[4]
    async with open_engine(long_model, max_sequences=3) as engine:
        completions = await Users(engine, long_model.params).ask_all([prompt] * 7)
        assert {done.token_ids for done in completions} == {long_model.references[4]}
        assert engine.statistics().prefix_hits == 6
        await check_only_prefixes_are_left(engine)


async def test_seeded_sampling_with_shared_beginnings(long_model: Any) -> None:
    params = SamplingParams(max_tokens=12, seed=5, repetition_penalty=1.3, frequency_penalty=0.5, ignore_eos=True)
    prompts = [[*tokens(1, 40), *tokens(seed, 5)] for seed in range(2, 6)]
    async with open_engine(long_model, share_prefixes=False) as engine:
        alone = [(await engine.complete(prompt, params)).token_ids for prompt in prompts]
    async with open_engine(long_model) as engine:
        for _ in range(2):
            assert [done.token_ids for done in await Users(engine, params).ask_all(prompts)] == alone


# One after another


async def test_a_later_request_finds_the_beginning_of_an_earlier_one(long_model: Any) -> None:
    prompt = tokens(1, 70)
    async with open_engine(long_model, max_tokens_per_sweep=8) as engine:
        await engine.complete(prompt, greedy_params(1))
        sweeps = engine.statistics().sweeps
        assert sweeps == -(-70 // 8)
        completion = await engine.complete([*prompt[:50], 9, 9], long_model.params)
        assert completion.token_ids == long_model.greedy([*prompt[:50], 9, 9])
        assert completion.usage.cached_tokens == 48
        assert engine.statistics().sweeps == sweeps + 12  # four tokens of the prompt are left: one sweep
        assert (engine.statistics().prefix_hits, engine.statistics().prefix_tokens) == (1, 48)
        await check_only_prefixes_are_left(engine)


async def test_all_of_a_prompt_but_its_last_token_may_be_there(long_model: Any) -> None:
    async with open_engine(long_model, max_tokens_per_sweep=8) as engine:
        for length, cached in ((48, 32), (49, 48), (50, 48)):
            prompt = tokens(1, length)
            await engine.complete(prompt, greedy_params(1))
            sweeps = engine.statistics().sweeps
            completion = await engine.complete(prompt, long_model.params)
            assert completion.token_ids == long_model.greedy(prompt)
            assert completion.usage.cached_tokens == cached
            assert engine.statistics().sweeps == sweeps + -(-(length - cached) // 8) + 11


async def test_answers_are_found_again_too(long_model: Any) -> None:
    prompt = tokens(1, 20)
    async with open_engine(long_model) as engine:
        first = await engine.complete(prompt, greedy_params(40))
        longer = [*prompt, *first.token_ids, 5]
        completion = await engine.complete(longer, long_model.params)
        assert completion.usage.cached_tokens == 48  # of 59 that were computed
        assert completion.token_ids == long_model.greedy(longer)
        await check_only_prefixes_are_left(engine)


async def test_a_request_and_a_session_share(long_model: Any) -> None:
    prompt = tokens(1, 40)
    async with open_engine(long_model) as engine:
        async with engine.session() as chat:
            await engine.complete(prompt, long_model.params)
            assert (await chat.complete(prompt, long_model.params)).usage.cached_tokens == 32
            completion = await engine.complete([*chat.token_ids, 5], long_model.params)
            assert completion.usage.cached_tokens == 48
            assert completion.token_ids == long_model.greedy([*chat.token_ids, 5])
        await check_only_prefixes_are_left(engine)


async def test_nothing_is_shared_where_that_is_switched_off(long_model: Any) -> None:
    prompts = [[*tokens(1, 40), seed] for seed in range(2, 6)]
    async with open_engine(long_model, share_prefixes=False) as engine:
        for _ in range(2):
            for done in await Users(engine, long_model.params).ask_all(prompts):
                assert done.usage.cached_tokens == 0
        statistics = engine.statistics()
        assert (statistics.prefix_hits, statistics.prefix_tokens, statistics.prefix_bytes) == (0, 0, 0)
        assert statistics.kv_bytes == 0


# What is kept


async def test_dropping_prefixes_frees_what_nobody_uses(long_model: Any) -> None:
    async with open_engine(long_model) as engine:
        await engine.complete(tokens(1, 40), greedy_params(1))
        assert engine.statistics().prefix_bytes == 2 * BLOCK_BYTES
        async with aclosing(engine.generate([*tokens(2, 40), 5], greedy_params(50))) as chunks:
            token_ids = list((await anext(chunks)).token_ids)
            engine.drop_prefixes()
            assert engine.statistics().prefix_bytes == 0
            assert engine.statistics().holders["shared prefixes"] > 0
            token_ids += [token_id async for chunk in chunks for token_id in chunk.token_ids]
        assert tuple(token_ids) == long_model.greedy([*tokens(2, 40), 5], 50)
        completion = await engine.complete(tokens(1, 40), long_model.params)
        assert completion.usage.cached_tokens == 0
        assert completion.token_ids == long_model.greedy(tokens(1, 40))
        await check_only_prefixes_are_left(engine)


async def test_the_least_recently_used_prefix_is_dropped_first(long_model: Any) -> None:
    async with open_engine(long_model, kv_budget=16 * BLOCK_BYTES) as engine:
        one = greedy_params(1)
        for seed in (1, 2, 3):
            await engine.complete(tokens(seed, 65), one)  # four blocks each
        await engine.complete(tokens(1, 65), one)
        assert engine.statistics().prefix_bytes == 12 * BLOCK_BYTES
        await engine.complete(tokens(4, 100), one)  # takes seven, so three must go
        assert (await engine.complete(tokens(1, 65), one)).usage.cached_tokens == 64
        assert (await engine.complete(tokens(3, 65), one)).usage.cached_tokens == 64
        assert (await engine.complete(tokens(2, 65), one)).usage.cached_tokens == 16
        assert engine.statistics().peak_bytes_in_use <= engine.statistics().memory_budget


async def test_prefixes_never_keep_a_request_out(long_model: Any) -> None:
    async with open_engine(long_model, kv_budget=16 * BLOCK_BYTES) as engine:
        for seed in range(12):
            prompt = tokens(seed, 20 * seed + 1)
            completion = await engine.complete(prompt, long_model.params)
            assert completion.token_ids == long_model.greedy(prompt)
            assert engine.statistics().kv_bytes <= 16 * BLOCK_BYTES
        await check_only_prefixes_are_left(engine)


# A leader that goes


async def test_followers_compute_what_an_aborted_leader_left(long_model: Any) -> None:
    """All wait for the blocks of the first one, which is aborted after each number of sweeps."""
    prefix = tokens(1, 64)
    prompts = [[*prefix, *tokens(seed, 5)] for seed in range(2, 6)]
    references = [long_model.greedy(prompt) for prompt in prompts]
    for num_sweeps in range(12):
        async with open_engine(long_model, max_tokens_per_sweep=8) as engine:
            users = Users(engine, long_model.params)
            async with anyio.create_task_group() as group:
                for idx, prompt in enumerate(prompts):
                    group.start_soon(users.ask, idx, prompt)
                await until(lambda: engine.statistics().num_running == 4)
                leader = inside(engine).admitted_ids[0]
                await until(lambda: engine.statistics().sweeps >= num_sweeps)  # noqa: B023
                assert await engine.abort(leader)
            assert users.completions.pop(int(leader)).finish_reason == "abort"
            assert len(users.completions) == 3
            for idx, completion in users.completions.items():
                assert completion.token_ids == references[idx]
            await check_only_prefixes_are_left(engine)


async def test_all_leave_but_the_last_one(long_model: Any) -> None:
    prompt = tokens(1, 90)
    async with open_engine(long_model, max_tokens_per_sweep=8, max_sequences=6) as engine:
        users = Users(engine, long_model.params)
        async with anyio.create_task_group() as group:
            for idx in range(6):
                group.start_soon(users.ask, idx, prompt)
            await until(lambda: engine.statistics().num_running == 6)
            order = inside(engine).admitted_ids
            for num_sweeps, name in enumerate(order[:5], start=1):
                await until(lambda num_sweeps=num_sweeps: engine.statistics().sweeps >= num_sweeps)
                assert await engine.abort(name)
        assert users.completions[int(order[5])].token_ids == long_model.greedy(prompt)
        await check_only_prefixes_are_left(engine)


@pytest.mark.parametrize("num_stages", range(1, 5))
async def test_a_leader_is_aborted_in_the_sweep_in_which_others_need_it(long_model: Any, num_stages: int) -> None:
    """What it computes is still computed, for those whose chunks of the same sweep begin behind it."""
    prefix = tokens(1, 40)
    prompts = [[*prefix, *tokens(seed, 5)] for seed in range(2, 5)]
    async with open_engine(long_model, max_tokens_per_sweep=128) as engine:
        users = Users(engine, long_model.params)
        leaders: list[str] = []
        num_calls = 0

        def abort_the_leader() -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls == num_stages:
                sweep = inside(engine).sweep
                assert [item.past for item in sweep] == [0, 32, 32]
                leaders.append(sweep[0].request.request_id)
                inside(engine).abort_from_thread(leaders[0])

        inside(engine).on_stage(abort_the_leader)
        await users.ask_all(prompts)
        assert users.completions.pop(int(leaders[0])).token_ids == ()
        assert len(users.completions) == 2
        for idx, completion in users.completions.items():
            assert completion.token_ids == long_model.greedy(prompts[idx])
        await check_only_prefixes_are_left(engine)


async def test_what_an_aborted_leader_computed_is_kept(long_model: Any) -> None:
    prompt = tokens(1, 90)
    async with open_engine(long_model, max_tokens_per_sweep=8) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(Users(engine, long_model.params).ask, "leader", prompt)
            await until(lambda: engine.statistics().sweeps >= 5)
            await engine.abort("leader")
        assert engine.statistics().prefix_bytes >= 2 * BLOCK_BYTES
        completion = await engine.complete(prompt, long_model.params)
        assert completion.usage.cached_tokens >= 32
        assert completion.timings.sweeps == -(-(90 - completion.usage.cached_tokens) // 8) + 11  # and no more than that
        assert completion.token_ids == long_model.greedy(prompt)


@pytest.mark.parametrize("seed", range(6))
async def test_sharers_that_leave_at_random_moments(long_model: Any, seed: int) -> None:
    """A tree of prompts with common beginnings, little memory, and users who go whenever they like."""
    chosen = random.Random(seed)
    trunk = tokens(seed, 120)
    prompts = [[*trunk[: chosen.randrange(1, 120)], *tokens(100 + idx, chosen.randrange(1, 40))] for idx in range(8)]
    references = [long_model.greedy(prompt) for prompt in prompts]
    config = {
        "max_tokens_per_sweep": chosen.choice([4, 8, 16, 64]),
        "max_sequences": chosen.choice([3, 4]),
        "kv_budget": chosen.choice([16, 24, 64]) * BLOCK_BYTES,
        "prompt_lookup": bool(seed % 2),
        "max_waiting": None,
    }
    wrong: list[Any] = []

    async def stays(idx: int) -> None:
        completion = await engine.complete(prompts[idx], long_model.params)
        if completion.token_ids != references[idx]:
            wrong.append((idx, completion))

    async def goes(idx: int, number: int) -> None:
        taken: list[int] = []
        num_checkpoints, num_tokens = chosen.randrange(60), chosen.randrange(13)
        way = chosen.choice(["cancel", "break", "abort"])

        async def consume() -> None:
            with scope:
                chunks = engine.generate(prompts[idx], long_model.params, request_id=f"{number}")
                async with aclosing(chunks):
                    async for chunk in chunks:
                        taken.extend(chunk.token_ids)
                        if way == "break" and len(taken) > num_tokens:
                            break

        scope = anyio.CancelScope()
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(consume)
            for _ in range(num_checkpoints):
                await anyio.lowlevel.checkpoint()
            if way == "cancel":
                scope.cancel()
            elif way == "abort":
                await engine.abort(f"{number}")
        if tuple(taken) != references[idx][: len(taken)]:
            wrong.append((idx, taken))

    async def user(first: int) -> None:
        for number in range(first, first + 15):
            if chosen.random() < 0.2:
                await stays(chosen.randrange(8))
            else:
                await goes(chosen.randrange(8), number)

    async with open_engine(long_model, **config) as engine:
        async with anyio.create_task_group() as group:
            for first in range(0, 150, 15):
                group.start_soon(user, first)
        assert wrong == []
        assert engine.statistics().peak_bytes_in_use <= engine.statistics().memory_budget
        await until(lambda: not engine.statistics().num_running)
        for idx in range(8):
            await stays(idx)
        assert wrong == []
        await check_only_prefixes_are_left(engine)
