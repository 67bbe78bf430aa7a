"""Requests in turns: all that a user can do with a packed model holds, whether a cache can be cropped or not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import transformers as t

from hermes_async import (
    Engine,
    EngineConfig,
    MemoryBudgetError,
    ReadError,
    SamplingParams,
    UnsupportedModelError,
    predict,
)
from tests.architectures import tiny_config
from tests.disks import Disk, Read
from tests.engines import check_nothing_is_left, drafts_cost_nothing, greedy_params, tokens, until
from tests.inside import inside, is_parked

pytestmark = pytest.mark.anyio

KINDS = ("bloom", "qwen3_5_text", "jamba")
"""A cache that can be cropped; recurrent states; and recurrent states of which a prompt cannot be divided."""


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, random_model: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    return save_model(random_model(tiny_config(request.param)))


@pytest.fixture(scope="module")
def kind(path: Path) -> str:
    model_type: str = t.AutoConfig.from_pretrained(path).model_type
    return model_type


def engine_of(path: Path, **config: Any) -> Engine:
    return Engine(path, memory_budget="64MiB", config=EngineConfig(**config))


async def answers(engine: Engine, *prompts: list[int], num_tokens: int = 8) -> list[tuple[int, ...]]:
    return [(await engine.complete(prompt, greedy_params(num_tokens))).token_ids for prompt in prompts]


async def test_the_plan_says_which_and_why(path: Path, kind: str) -> None:
    async with engine_of(path) as engine:
        assert engine.plan.in_turns
        assert engine.plan.as_dict()["batching"] == "turns"
        reason = engine.plan.explanation[0]
        assert "a packed row does not work" in reason
        assert ("prompt lookup is off" in reason) == (kind != "bloom")
        assert ("a prompt is not divided" in reason) == (kind == "jamba")
    with pytest.raises(UnsupportedModelError):
        async with engine_of(path, batching="packed"):
            pass


async def test_the_prediction_counts_a_pass_for_each_session(path: Path) -> None:
    async with engine_of(path) as engine:
        one, four = (predict(engine.plan, num_sessions=count).compute_seconds for count in (1, 4))
        rest = engine.plan.machine.outside_seconds(1)
        assert four - rest == pytest.approx(4 * (one - rest))


async def test_samples_of_one_prompt_at_once(path: Path) -> None:
    prompt = tokens(1, 12)
    params = [SamplingParams(max_tokens=6, seed=seed, ignore_eos=True, logprobs=2) for seed in range(4)]
    async with engine_of(path) as engine:
        alone = [await engine.complete(prompt, one) for one in params]
        together: dict[int, Any] = {}

        async def ask(idx: int) -> None:
            together[idx] = await engine.complete(prompt, params[idx])

        async with anyio.create_task_group() as group:
            for idx in range(len(params)):
                group.start_soon(ask, idx)
        assert [together[idx].token_ids for idx in range(4)] == [one.token_ids for one in alone]
        assert len({one.token_ids for one in alone}) > 1
        assert [len(one.logprobs) for one in alone] == [6] * 4
        await check_nothing_is_left(engine)


async def test_a_session_goes_on_where_it_was(path: Path, kind: str) -> None:
    first, second = tokens(2, 20), tokens(3, 7)
    async with engine_of(path) as engine:
        async with engine.session() as chat:
            begun = await chat.complete(first, greedy_params(6))
            turn = await chat.complete(second, greedy_params(6))
            history = [*first, *begun.token_ids, *second]
            [expected] = await answers(engine, history, num_tokens=6)
            assert turn.token_ids == expected
            # The last token of an answer is never computed; where a prompt cannot be divided, all is computed again.
            assert turn.usage.cached_tokens == (0 if kind == "jamba" else len(history) - len(second) - 1)
        await check_nothing_is_left(engine)


async def test_forks_go_on_apart(path: Path) -> None:
    trunk, left, right = tokens(4, 18), tokens(5, 4), tokens(6, 5)
    async with engine_of(path) as engine:
        async with engine.session() as chat:
            begun = await chat.complete(trunk, greedy_params(5))
            history = [*trunk, *begun.token_ids]
            async with chat.fork() as other:
                one = await chat.complete(left, greedy_params(5))
                two = await other.complete(right, greedy_params(5))
        expected = await answers(engine, [*history, *left], [*history, *right], num_tokens=5)
        assert [one.token_ids, two.token_ids] == expected
        await check_nothing_is_left(engine)


async def test_an_edited_history(path: Path, kind: str) -> None:
    first, edited = tokens(7, 20), [*tokens(7, 12), *tokens(8, 5)]
    async with engine_of(path) as engine:
        async with engine.session() as chat:
            await chat.complete(first, greedy_params(6))
            chat.edit(token_ids=edited)
            turn = await chat.complete([3], greedy_params(6))
            [expected] = await answers(engine, [*edited, 3], num_tokens=6)
            assert turn.token_ids == expected
            assert turn.usage.cached_tokens == (12 if kind == "bloom" else 0)
        await check_nothing_is_left(engine)


async def test_an_idle_session_is_parked_and_comes_back(path: Path, kind: str) -> None:
    if kind == "jamba":
        pytest.skip("a session keeps nothing where a prompt cannot be divided")
    history, more = tokens(9, 30), tokens(10, 3)
    async with engine_of(path) as engine:
        [begun] = await answers(engine, history)
        [expected] = await answers(engine, [*history, *begun, *more])
        kv_bytes = engine.plan.kv_bytes
    async with engine_of(path, kv_budget=1, context_length=64) as engine:
        assert engine.plan.kv_bytes < kv_bytes
        async with engine.session() as chat:
            await chat.complete(history, greedy_params(8))
            await engine.complete(tokens(11, 40), greedy_params(24))
            assert is_parked(chat)
            turn = await chat.complete(more, greedy_params(8))
            assert turn.token_ids == expected
            assert turn.usage.cached_tokens == len(history) + 7
        await check_nothing_is_left(engine)


async def test_a_prompt_that_must_be_one_call_and_is_too_long(path: Path, kind: str) -> None:
    async with engine_of(path, max_tokens_per_sweep=32) as engine:
        if kind == "jamba":
            with pytest.raises(MemoryBudgetError, match=r"33 tokens .* in one call.* max_tokens_per_sweep=33"):
                await engine.complete(tokens(18, 33), greedy_params(2))
        else:
            await engine.complete(tokens(18, 33), greedy_params(2))
        await engine.complete(tokens(18, 32), greedy_params(2))
        await check_nothing_is_left(engine)


async def test_drafts_where_a_cache_can_be_cropped(path: Path, kind: str) -> None:
    prompt = tokens(12, 6) * 4
    async with engine_of(path, prompt_lookup=False) as engine:
        [expected] = await answers(engine, prompt, num_tokens=40)
    async with engine_of(path) as engine:
        drafts_cost_nothing(engine)
        completion = await engine.complete(prompt, greedy_params(40))
        assert completion.token_ids == expected
        assert (completion.timings.drafted_tokens > 0) == (kind == "bloom")
        await check_nothing_is_left(engine)


async def test_who_leaves_ends_within_the_sweep_and_others_go_on(path: Path) -> None:
    stays, leaves = tokens(13, 9), tokens(14, 11)
    async with engine_of(path) as engine:
        [expected] = await answers(engine, stays, num_tokens=16)
        got: list[Any] = []

        async def stay() -> None:
            got.append((await engine.complete(stays, greedy_params(16))).token_ids)

        async with anyio.create_task_group() as group:
            group.start_soon(stay)
            async with aclosing(engine.generate(leaves, greedy_params(100), request_id="leaves")) as chunks:
                async for _ in chunks:
                    break
            with anyio.move_on_after(0):  # a cancelled turn of a session ends it, too
                async with engine.session() as chat:
                    await chat.complete(leaves, greedy_params(50))
        assert got == [expected]
        await check_nothing_is_left(engine)


async def test_what_an_aborted_answer_leaves_to_its_session(path: Path, kind: str) -> None:
    """It is aborted between two layers of its call."""
    prompt, num_stages = tokens(19, 24), 0

    def abort_at_the_third_stage() -> None:
        nonlocal num_stages
        num_stages += 1
        if num_stages == 3:
            inside(engine).abort_from_thread("talk")

    async with engine_of(path, max_resident_layers=2, num_loading_agents=1) as engine:
        async with engine.session() as chat:
            got: list[int] = []
            async with aclosing(chat.generate(prompt, greedy_params(200), request_id="talk")) as chunks:
                async for chunk in chunks:
                    got += chunk.token_ids
                    if len(got) == 3:
                        inside(engine).on_stage(abort_at_the_third_stage)
            assert chunk.finish_reason == "abort"
            turn = await chat.complete([7], greedy_params(4))
            assert (turn.usage.cached_tokens > len(prompt)) == (kind == "bloom")
        [expected] = await answers(engine, [*prompt, *got, 7], num_tokens=4)
        assert turn.token_ids == expected
        await check_nothing_is_left(engine)


async def test_a_failed_read_ends_the_sweep_s_requests_and_the_next_ones_work(path: Path, disk: Disk) -> None:
    prompt = tokens(15, 10)
    async with engine_of(path, max_resident_layers=2, num_loading_agents=1) as engine:
        [expected] = await answers(engine, prompt)
        async with engine.session() as chat:
            begun = await chat.complete(prompt, greedy_params(4))

            def fail(path: Path, offset: int, read: Read) -> int:
                raise OSError(errno.EIO, "Input/output error")

            works, disk.on_read = disk.on_read, fail
            with pytest.raises(ReadError):
                await engine.complete(tokens(16, 10), greedy_params(30))
            disk.on_read = works
            turn = await chat.complete([5], greedy_params(4))
        [after] = await answers(engine, [*prompt, *begun.token_ids, 5], num_tokens=4)
        assert turn.token_ids == after
        assert await answers(engine, prompt) == [expected]
        await check_nothing_is_left(engine)


async def test_the_budget_changes_while_sequences_run(path: Path) -> None:
    prompt = tokens(17, 10)
    async with engine_of(path) as engine:
        [expected] = await answers(engine, prompt, num_tokens=24)
        got: list[tuple[int, ...]] = []

        async def ask() -> None:
            got.append((await engine.complete(prompt, greedy_params(24))).token_ids)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: engine.statistics().num_running == 1)
            await engine.resize("80MiB")
            await engine.resize("64MiB")
        assert got == [expected]
        await check_nothing_is_left(engine)


async def test_a_packed_model_in_turns_gives_the_same_tokens(tiny_model: Any) -> None:
    prompts = [tokens(seed, 5 + 7 * seed) for seed in range(4)]
    found = []
    for batching in ("packed", "turns"):
        config = replace(tiny_model.config, batching=batching, self_check="require")
        async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as engine:
            assert engine.plan.in_turns == (batching == "turns")
            found.append(await answers(engine, *prompts, num_tokens=12))
    assert found[0] == found[1]
