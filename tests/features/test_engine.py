"""What users of an engine see: chunks, completions, their ends, and the figures."""

from __future__ import annotations

import dataclasses
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hermes_async import (
    Chunk,
    ConfigError,
    Engine,
    EngineClosedError,
    EngineConfig,
    EngineFailedError,
    RequestError,
    SamplingParams,
)
from tests.engines import both_loops, greedy_params, until
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


def open_engine(model: Any, **config: Any) -> Engine:
    return Engine(model.path, memory_budget="8MiB", config=dataclasses.replace(model.config, **config))


async def check_idle(engine: Engine) -> None:
    await until(lambda: not engine.statistics().num_running)  # a request that was left ends at the next stage
    statistics = engine.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.num_leases) == (0, 0, 4)


# Chunks and completions


async def test_every_token_is_a_chunk_and_the_last_one_has_the_reason(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        chunks = [chunk async for chunk in engine.generate(tiny_model.prompts[1], tiny_model.params)]
        assert tuple(chunk.token_ids[0] for chunk in chunks) == tiny_model.references[1]
        assert all(len(chunk.token_ids) == 1 for chunk in chunks)
        assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
        assert "".join(chunk.text for chunk in chunks).split() == tiny_model.text(tiny_model.references[1]).split()
        await check_idle(engine)


async def test_complete_is_all_chunks_together(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[2], tiny_model.params, request_id="mine")
        assert completion.request_id == "mine"
        assert completion.token_ids == tiny_model.references[2]
        assert completion.text.split() == tiny_model.text(tiny_model.references[2]).split()
        assert completion.finish_reason == "length"
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (12, 12)
        timings = completion.timings
        assert 0 <= timings.queued_s <= timings.first_token_s <= timings.total_s
        assert timings.tokens_per_s > 0
        assert completion.logprobs == ()


async def test_the_same_answer_with_everything_resident(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="64MiB") as engine:
        assert engine.plan.bytes_per_sweep == 0
        for prompt, reference in zip(tiny_model.prompts, tiny_model.references, strict=True):
            assert (await engine.complete(prompt, tiny_model.params)).token_ids == reference


async def test_logprobs_where_they_are_asked_for(tiny_model: Any) -> None:
    params = dataclasses.replace(tiny_model.params, logprobs=3)
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
        assert len(completion.logprobs) == 12
        assert tuple(sampled.token_id for sampled in completion.logprobs) == completion.token_ids


async def test_default_params(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1])
        assert 1 <= len(completion.token_ids) <= SamplingParams().max_tokens


async def test_a_chunk_compares_by_value() -> None:
    assert Chunk("a", (1,)) == Chunk("a", (1,), None, ())


# How a request ends


async def test_a_stop_token_ends_it(tiny_model: Any) -> None:
    stop = tiny_model.references[1][3]
    first = tiny_model.references[1].index(stop) + 1
    params = dataclasses.replace(tiny_model.params, stop_token_ids=[stop])
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
        assert completion.finish_reason == "stop"
        assert completion.token_ids == tiny_model.references[1][:first]


async def test_a_stop_text_ends_it_and_is_not_part_of_the_text(tiny_model: Any) -> None:
    reference = tiny_model.references[1]
    stop = f"w{reference[4]}"
    params = dataclasses.replace(tiny_model.params, stop=stop)
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
        assert completion.finish_reason == "stop"
        assert stop not in completion.text.split()
        assert tiny_model.text(reference).startswith(completion.text.strip())


async def test_the_end_of_sequence_token_ends_it_unless_it_is_ignored(tiny_model: Any) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, logit_bias={1: 1000.0})
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
        assert (completion.token_ids, completion.finish_reason) == ((1,), "stop")
        completion = await engine.complete(tiny_model.prompts[1], dataclasses.replace(params, ignore_eos=True))
        assert (completion.token_ids, completion.finish_reason) == ((1,) * 5, "length")


@pytest.mark.parametrize("max_tokens", [None, 1000])
async def test_the_context_s_end_is_a_length(tiny_model: Any, max_tokens: int | None) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[4], params)
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == tiny_model.context - 33


async def test_one_token(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], SamplingParams(max_tokens=1, temperature=0))
        assert completion.token_ids == tiny_model.references[1][:1]
        assert completion.timings.tokens_per_s == 0


async def test_leaving_the_iteration_frees_its_memory(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params)) as chunks:
            async for _ in chunks:
                break
        await check_idle(engine)


async def test_abort_a_running_request(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        reasons = []
        async for chunk in engine.generate(tiny_model.prompts[1], tiny_model.params, request_id="r"):
            reasons.append(chunk.finish_reason)
            if len(reasons) == 2:
                assert await engine.abort("r")
                assert engine.statistics().num_running == 0
                assert engine.statistics().num_leases == 4
        assert reasons[-1] == "abort"
        assert len(reasons) <= 5  # a sweep may have ended meanwhile
        assert not await engine.abort("r")
        await check_idle(engine)


async def test_abort_a_waiting_request(tiny_model: Any) -> None:
    async with open_engine(tiny_model, max_sequences=1) as engine:
        completions = []

        async def user() -> None:
            completions.append(await engine.complete(tiny_model.prompts[2], tiny_model.params, request_id="waiting"))

        async with anyio.create_task_group() as group:
            async for _ in engine.generate(tiny_model.prompts[1], tiny_model.params):
                if "waiting" not in inside(engine).request_ids and not completions:
                    group.start_soon(user)
                    await until(lambda: engine.statistics().num_waiting > 0)
                    assert await engine.abort("waiting")
                    await until(lambda: bool(completions))
        assert (completions[0].finish_reason, completions[0].token_ids) == ("abort", ())
        assert completions[0].usage.completion_tokens == 0
        await check_idle(engine)


async def test_abort_of_nobody(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        assert not await engine.abort("nobody")


async def test_a_request_id_is_in_use_until_its_request_ends(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with aclosing(engine.generate(tiny_model.prompts[1], tiny_model.params, request_id="r")) as chunks:
            await anext(chunks)
            with pytest.raises(RequestError, match="'r' is in use"):
                await engine.complete(tiny_model.prompts[2], tiny_model.params, request_id="r")
            async for _ in chunks:
                pass
        completion = await engine.complete(tiny_model.prompts[2], tiny_model.params, request_id="r")
        assert completion.token_ids == tiny_model.references[2]


# Many at once


async def test_many_requests_share_sweeps_and_each_gets_its_own_answer(tiny_model: Any) -> None:
    answers: dict[int, tuple[int, ...]] = {}

    async def user(idx: int) -> None:
        completion = await engine.complete(tiny_model.prompts[idx], tiny_model.params)
        answers[idx] = completion.token_ids

    async with open_engine(tiny_model) as engine:
        async with anyio.create_task_group() as group:
            for idx in range(5):
                group.start_soon(user, idx)
        assert answers == dict(enumerate(tiny_model.references))
        statistics = engine.statistics()
        assert statistics.tokens_generated == 5 * 12
        assert statistics.sweeps < 5 * 12
        await check_idle(engine)


async def test_a_request_joins_at_the_next_sweep(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        answers = []

        async def user() -> None:
            completion = await engine.complete(
                tiny_model.prompts[1], dataclasses.replace(tiny_model.params, max_tokens=2)
            )
            answers.append(completion.token_ids)

        num_chunks = 0
        async with anyio.create_task_group() as group:
            async for _ in engine.generate(
                tiny_model.prompts[2], dataclasses.replace(tiny_model.params, max_tokens=40)
            ):
                num_chunks += 1
                if num_chunks == 2:
                    group.start_soon(user)
                if num_chunks == 38:
                    assert answers == [tiny_model.references[1][:2]]  # long before the first one's end


async def test_long_prompts_go_in_chunks(tiny_model: Any) -> None:
    async with open_engine(tiny_model, max_tokens_per_sweep=4) as engine:
        completion = await engine.complete(tiny_model.prompts[4], tiny_model.params)
        assert completion.token_ids == tiny_model.references[4]
        assert engine.statistics().sweeps == -(-33 // 4) + 11


async def test_a_prompt_alone_has_the_memory_that_logits_of_others_would_take(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20000, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    prompt = torch.randint(20000, (1, 200), generator=torch.Generator().manual_seed(3))
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 200:]
    async with Engine(tmp_path, memory_budget="6MiB") as engine:
        plan = engine.plan
        assert plan.num_buffers > 0
        assert 4 * plan.max_tokens_per_sweep <= plan.max_prompt_tokens < 200
        completion = await engine.complete(prompt[0].tolist(), greedy_params(3))
        assert completion.token_ids == tuple(expected.tolist())
        assert engine.statistics().sweeps == -(-200 // plan.max_prompt_tokens) + 2


async def test_seeded_sampling_does_not_depend_on_neighbours(tiny_model: Any) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=1234, ignore_eos=True)
    answers: dict[Any, tuple[int, ...]] = {}

    async def user(key: Any, idx: int, params: SamplingParams) -> None:
        answers[key] = (await engine.complete(tiny_model.prompts[idx], params)).token_ids

    async with open_engine(tiny_model) as engine:
        await user("alone", 1, params)
        async with anyio.create_task_group() as group:
            for seed in range(3):
                group.start_soon(user, seed, 2, dataclasses.replace(params, seed=seed))
            group.start_soon(user, "crowded", 1, params)
    assert answers["alone"] == answers["crowded"]
    assert len({answers[seed] for seed in range(3)}) > 1


# The engine's own life


async def test_an_engine_that_was_never_entered(tiny_model: Any) -> None:
    engine = Engine(tiny_model.path)
    with pytest.raises(EngineClosedError, match="not entered"):
        await engine.complete([5])
    with pytest.raises(EngineClosedError, match="not entered"):
        await anext(engine.generate([5]))
    with pytest.raises(EngineClosedError):
        _ = engine.plan
    with pytest.raises(EngineClosedError):
        engine.statistics()


async def test_an_engine_that_was_left(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        await engine.complete(tiny_model.prompts[0], tiny_model.params)
    with pytest.raises(EngineClosedError, match="left"):
        await engine.complete([5])
    with pytest.raises(EngineClosedError, match="left"):
        await anext(engine.generate([5]))
    statistics = engine.statistics()
    assert statistics.tokens_generated == 12
    assert (statistics.num_leases, statistics.bytes_in_use, statistics.holders) == (0, 0, {})


async def test_an_engine_can_be_entered_once(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        with pytest.raises(EngineClosedError, match="once"):
            await engine.__aenter__()
        assert (await engine.complete(tiny_model.prompts[0], tiny_model.params)).token_ids == tiny_model.references[0]
    with pytest.raises(EngineClosedError, match="once"):
        async with engine:
            pytest.fail("entered")


async def test_two_engines_at_once(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as first, open_engine(tiny_model) as second:
        for engine in (first, second, first):
            completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
            assert completion.token_ids == tiny_model.references[1]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, RequestError])
async def test_an_error_in_the_body_comes_out_as_itself(tiny_model: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        async with open_engine(tiny_model):
            raise error("mine")


async def test_an_error_in_the_loop_over_chunks_comes_out_as_itself(tiny_model: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_engine(tiny_model) as engine:
            async for _ in engine.generate(tiny_model.prompts[1], tiny_model.params):
                raise ZeroDivisionError


async def test_a_failed_engine_says_why(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        failure = ZeroDivisionError("in the model")

        def fail() -> None:
            raise failure

        inside(engine).on_stage(fail)
        for _ in range(2):
            with pytest.raises(EngineFailedError, match="in the model") as caught:
                await engine.complete(tiny_model.prompts[1], tiny_model.params)
            assert caught.value.__cause__ is failure


async def test_statistics_have_the_documented_names(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        await engine.complete(tiny_model.prompts[1], tiny_model.params)
        statistics = engine.statistics()
        figures = statistics.as_dict()
        bytes_per_sweep = engine.plan.bytes_per_sweep
    assert figures.keys() >= {
        "bytes_read", "bytes_resident", "bytes_in_use", "peak_bytes_in_use", "memory_budget", "baseline_bytes",
        "process_peak_rss_bytes", "sweeps", "tokens_generated", "read_seconds", "compute_seconds", "stall_seconds",
    }  # fmt: skip
    assert (statistics.sweeps, statistics.tokens_generated) == (12, 12)
    assert statistics.memory_budget == 8 * 2**20
    assert 0 < statistics.bytes_in_use < statistics.peak_bytes_in_use <= statistics.memory_budget
    assert statistics.bytes_read >= 12 * bytes_per_sweep
    assert statistics.baseline_bytes > 0
    assert statistics.process_peak_rss_bytes > 0
    assert statistics.compute_seconds > 0
    assert statistics.read_seconds > 0
    assert statistics.loop_lag_ms.keys() == {"p50", "p99", "max"}


async def test_options_that_contradict_each_other(tiny_model: Any) -> None:
    with pytest.raises(ConfigError):
        Engine(tiny_model.path, config=EngineConfig(max_sequences=0))


# Never block the loop


async def test_nothing_blocks_the_event_loop(tiny_model: Any, no_blocking: Any) -> None:
    answers = []

    async def user(idx: int) -> None:
        prompt = tiny_model.text(tiny_model.prompts[idx])
        answers.append((idx, (await engine.complete(prompt, tiny_model.params)).token_ids))

    async with open_engine(tiny_model) as engine:
        async with anyio.create_task_group() as group:
            for idx in range(4):
                group.start_soon(user, idx)
        async for _ in engine.generate(tiny_model.prompts[1], tiny_model.params, request_id="r"):
            await engine.abort("r")
        engine.statistics()
    assert sorted(answers) == list(enumerate(tiny_model.references[:4]))


async def test_nothing_blocks_while_resident_weights_are_loaded(tiny_model: Any, no_blocking: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="64MiB") as engine:
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]
