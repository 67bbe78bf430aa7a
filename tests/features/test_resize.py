"""Another budget for an engine that runs: more or fewer stages stay, and not one token changes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from hermes_async import ConfigError, Engine, EngineClosedError, EngineConfig, MemoryBudgetError, ReadError
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import StageState
from hermes_async.storage.buffers import Buffer
from tests.engines import BLOCK_BYTES, check_nothing_is_left, greedy_params, tokens, until
from tests.inside import inside

pytestmark = pytest.mark.anyio

CONFIG = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4)


def engine_of(model: Any, memory_budget: int | str, **config: Any) -> Engine:
    return Engine(model.path, memory_budget=memory_budget, config=replace(CONFIG, **config))


async def smallest(model: Any) -> int:
    async with engine_of(model, "8MiB") as engine:
        return engine.plan.minimum_budget


def check(engine: Engine) -> None:
    """What is leased, planned and in memory is the same."""
    statistics, plan = engine.statistics(), engine.plan
    assert statistics.bytes_in_use <= statistics.memory_budget == plan.memory_budget
    assert statistics.holders["resident weights"] == plan.resident_bytes == statistics.bytes_resident
    assert statistics.holders["ring buffers"] == plan.ring_bytes
    resident = [stage for stage in inside(engine).stages if stage.resident]
    assert sum(stage.layout.slot_bytes for stage in resident) == plan.resident_bytes
    assert all(stage.error is None for stage in resident)
    assert not set(inside(engine).streamed_stages) & set(resident)


async def test_it_grows_and_shrinks_between_requests(tiny_model: Any, no_blocking: Any) -> None:
    least = await smallest(tiny_model)
    async with engine_of(tiny_model, least) as engine:
        first = engine.plan
        for budget in (least + 30_000, least + 90_000, "8MiB", least + 60_000, least):
            plan = await engine.resize(budget)
            assert plan == engine.plan
            check(engine)
            completion = await engine.complete(tiny_model.prompts[3], tiny_model.params)
            assert completion.token_ids == tiny_model.references[3]
            read = engine.statistics().bytes_read
            await engine.complete(tiny_model.prompts[0], greedy_params(3))
            read = engine.statistics().bytes_read - read
            assert (read == 0) == (plan.bytes_per_sweep == 0 and "embed" not in str(plan.partition))
        assert plan.resident <= first.resident
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_tied_weights_stay_where_both_of_their_modules_find_them(
    name: str, random_model: Any, save_model: Any
) -> None:
    """Opened with all of it in memory, a tied head is loaded with the input embedding."""
    sizes = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    config: Any = GPT2Config(**sizes, n_embd=64, n_layer=8, n_head=4, n_positions=128)
    if name == "llama":
        config = LlamaConfig(
            **sizes, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        )  # fmt: skip
    path = save_model(random_model(config))
    params = greedy_params(12)
    async with Engine(path, memory_budget="8MiB", config=replace(CONFIG, share_prefixes=False)) as engine:
        assert engine.plan.num_buffers == 0
        expected = await engine.complete([5, 6, 7], params)
        with pytest.raises(MemoryBudgetError) as caught:
            await engine.resize(1)
        for budget in (caught.value.minimum_bytes, "8MiB", caught.value.minimum_bytes):
            await engine.resize(budget)
            check(engine)
            assert bool(engine.plan.bytes_per_sweep) == (budget != "8MiB")
            assert (await engine.complete([5, 6, 7], params)).token_ids == expected.token_ids


async def test_bytes_read_follow_the_plan(tiny_model: Any) -> None:
    least = await smallest(tiny_model)
    async with engine_of(tiny_model, least, prompt_lookup=False) as engine:
        for budget in (least + 60_000, least):
            plan = await engine.resize(budget)
            await engine.complete(tiny_model.prompts[1], greedy_params(2))  # the ring is full again after it
            await until(lambda: all(s.state is StageState.READY for s in inside(engine).streamed_stages[:3]))
            before = engine.statistics()
            await engine.complete(tiny_model.prompts[1], greedy_params(20))
            after = engine.statistics()
            sweeps, read = after.sweeps - before.sweeps, after.bytes_read - before.bytes_read
            rows = 25 * 4096
            assert abs(read - sweeps * plan.bytes_per_sweep) <= rows + 2 * plan.ring_bytes


@pytest.mark.parametrize("seed", range(6))
async def test_requests_and_passes_go_on(tiny_model: Any, seed: int) -> None:
    chosen = random.Random(seed)
    least = await smallest(tiny_model)
    answers: dict[int, Any] = {}
    async with engine_of(tiny_model, chosen.choice([least + 50_000, 8 << 20])) as engine:

        async def ask(idx: int) -> None:
            prompt = tiny_model.prompts[idx % 5]
            if idx % 3 == 2:
                output = await engine.forward(input_ids=[prompt[:16]])
                with torch.inference_mode():
                    expected = tiny_model.model(input_ids=torch.tensor([prompt[:16]]))
                torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
            else:
                answers[idx] = (await engine.complete(prompt, tiny_model.params)).token_ids

        async def resize() -> None:
            for _ in range(25):
                budget = chosen.randrange(least // 2, 3 * least)
                before = engine.plan
                try:
                    assert (await engine.resize(budget)).memory_budget == budget
                except MemoryBudgetError as error:
                    assert error.minimum_bytes is not None and error.minimum_bytes > budget
                    assert engine.plan == before
                check(engine)
                for _ in range(chosen.randrange(40)):
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(resize)
            for idx in range(15):
                group.start_soon(ask, idx)
        assert answers == {idx: tiny_model.references[idx % 5] for idx in answers}
        assert len(answers) == 10
        await check_nothing_is_left(engine)
        await engine.resize("8MiB")
        check(engine)
        assert engine.plan.bytes_per_sweep == 0


async def test_where_the_system_gives_no_memory_all_is_as_before(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = await smallest(tiny_model)
    async with engine_of(tiny_model, least) as engine:
        before = engine.plan
        make_buffers = Buffer.side_by_side

        def refuse(sizes: Sequence[int]) -> list[Buffer]:
            if sizes:
                raise MemoryBudgetError("the system does not give it", requested_bytes=sum(sizes), budget_bytes=0)
            return make_buffers(sizes)

        with monkeypatch.context() as patch:
            patch.setattr(Buffer, "side_by_side", refuse)
            with pytest.raises(MemoryBudgetError, match="the system does not give"):
                await engine.resize("8MiB")
            assert engine.plan == before
            check(engine)
            completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        assert (await engine.resize("8MiB")).bytes_per_sweep == 0
        completion = await engine.complete(tiny_model.prompts[2], tiny_model.params)
        assert completion.token_ids == tiny_model.references[2]
        await check_nothing_is_left(engine)
        check(engine)


async def test_several_at_once_are_done_in_turn(tiny_model: Any) -> None:
    least = await smallest(tiny_model)
    async with engine_of(tiny_model, least) as engine:
        async with anyio.create_task_group() as group:
            for more in (90_000, 30_000, 60_000):
                group.start_soon(engine.resize, least + more)
        assert engine.plan.memory_budget == least + 60_000
        check(engine)


# What cannot be


async def test_below_the_smallest_nothing_changes(tiny_model: Any) -> None:
    async with engine_of(tiny_model, "8MiB") as engine:
        before = engine.plan
        with pytest.raises(
            MemoryBudgetError, match=r"that this engine cannot give back: .* of weights that always"
        ) as caught:
            await engine.resize("64KiB")
        assert engine.plan == before
        check(engine)
        assert caught.value.minimum_bytes is not None
        plan = await engine.resize(caught.value.minimum_bytes)
        assert plan.resident == frozenset()
        check(engine)
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]


@pytest.mark.parametrize("size", ["much", 0, -5, None])
async def test_what_is_no_size(tiny_model: Any, size: Any) -> None:
    async with engine_of(tiny_model, "8MiB") as engine:
        with pytest.raises(ConfigError, match="byte size"):
            await engine.resize(size)


async def test_keys_and_values_in_use_are_not_given_back(long_model: Any) -> None:
    async with engine_of(long_model, "8MiB", share_prefixes=False) as engine, engine.session() as chat:
        await chat.complete(tokens(1, 300), greedy_params(4))
        held = engine.statistics().kv_bytes
        assert held == 19 * BLOCK_BYTES
        with pytest.raises(MemoryBudgetError, match="152 KiB of KV") as caught:
            await engine.resize("64KiB")
        plan = await engine.resize(caught.value.minimum_bytes or 0)
        assert plan.kv_bytes == held
        check(engine)
        with pytest.raises(MemoryBudgetError, match="of KV memory"):
            await engine.complete(tokens(2, 300), greedy_params(40))
        plan = await engine.resize("8MiB")
        assert plan.kv_bytes > held
        assert (await chat.complete(tokens(3, 5), greedy_params(4))).usage.cached_tokens > 290


@pytest.mark.parametrize("in_session", [False, True])
async def test_what_can_never_fit_any_more_is_refused_and_the_others_go_on(long_model: Any, in_session: bool) -> None:
    results: dict[str, Any] = {}
    opened = engine_of(long_model, "8MiB", share_prefixes=False, kv_budget=20 * BLOCK_BYTES)
    async with opened as engine, engine.session() as chat, anyio.create_task_group() as group:

        async def ask(name: str, num_tokens: int) -> None:
            source = chat if in_session and name == "large 1" else engine
            try:
                results[name] = await source.complete(tokens(2, 5), greedy_params(num_tokens), request_id=name)
            except MemoryBudgetError as error:
                results[name] = error

        # It holds ten blocks for as long as nobody takes its chunks.
        held = engine.generate(tokens(1, 100), greedy_params(60))
        async with aclosing(held):
            await anext(held)
            for count, (name, num_tokens) in enumerate((("large 1", 300), ("large 2", 280), ("small", 20)), start=1):
                group.start_soon(ask, name, num_tokens)
                await until(lambda count=count: engine.statistics().num_waiting == count)  # type: ignore[misc]
            with pytest.raises(MemoryBudgetError) as caught:
                await engine.resize("64KiB")
            await engine.resize(caught.value.minimum_bytes or 0)
            await until(lambda: len(results) == 3)
        for name, num_blocks in (("large 1", 20), ("large 2", 18)):
            assert isinstance(results[name], MemoryBudgetError)
            assert results[name].requested_bytes == num_blocks * BLOCK_BYTES
            assert results[name].budget_bytes == 16 * BLOCK_BYTES  # the room for one sequence, that always is
            assert "the budget has shrunk" in str(results[name])
        assert results["small"].token_ids == long_model.greedy(tokens(2, 5), 20)
        check(engine)
        await chat.aclose()
        await check_nothing_is_left(engine)


async def test_prefixes_that_nobody_uses_are_dropped_first(long_model: Any) -> None:
    async with engine_of(long_model, "8MiB") as engine:
        await engine.complete(tokens(1, 400), greedy_params(2))
        assert engine.statistics().prefix_bytes == 25 * BLOCK_BYTES
        with pytest.raises(MemoryBudgetError) as caught:
            await engine.resize("64KiB")
        await engine.resize(caught.value.minimum_bytes or 0)
        assert engine.statistics().prefix_bytes == 16 * BLOCK_BYTES  # the room for one sequence, that always is
        check(engine)


async def test_a_stage_that_cannot_be_read_when_it_is_to_stay(tiny_model: Any, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model.path, tmp_path / "model")
    shard = path / "model.safetensors"
    data, before = shard.read_bytes(), shard.stat()
    least = await smallest(tiny_model)
    async with Engine(path, memory_budget=least, config=CONFIG) as engine:
        with shard.open("r+b") as file:
            file.truncate(len(data) // 2)
        assert (await engine.resize("8MiB")).bytes_per_sweep == 0
        for _ in range(2):
            with pytest.raises(ReadError):
                await engine.complete(tiny_model.prompts[1], tiny_model.params)
        with shard.open("r+b") as file:
            file.write(data)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as it was: a changed shard is refused
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]
        check(engine)
        await check_nothing_is_left(engine)


async def test_leaving_the_engine_while_it_is_resized(tiny_model: Any) -> None:
    least = await smallest(tiny_model)
    for moment in range(12):
        errors: list[Exception] = []

        async def resize(engine: Engine, budget: int, errors: list[Exception] = errors) -> None:
            try:
                await engine.resize(budget)
            except EngineClosedError as error:
                errors.append(error)

        async with anyio.create_task_group() as group, engine_of(tiny_model, least) as engine:
            group.start_soon(resize, engine, 8 << 20)
            group.start_soon(resize, engine, least + 50_000)
            for _ in range(2 * moment):
                await anyio.lowlevel.checkpoint()
        statistics = engine.statistics()
        assert (statistics.num_leases, statistics.bytes_in_use) == (0, 0)
        with pytest.raises(EngineClosedError):
            await engine.resize("8MiB")


async def test_a_resize_that_is_cancelled(tiny_model: Any) -> None:
    least = await smallest(tiny_model)
    async with engine_of(tiny_model, least) as engine:
        for moment in range(10):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(engine.resize, least + 90_000 * (moment % 2))
                    for _ in range(moment):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        await engine.resize(least + 60_000)
        check(engine)
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]


async def test_requests_take_nothing_of_what_is_given_back(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came while stages were given back took what was free by the old budget, and the engine ended."""
    least = await smallest(tiny_model)
    set_resident = Pipeline.set_resident
    granted = []

    async def asking(self: Pipeline, *args: Any) -> None:
        try:
            inside(engine).governor.acquire_nowait("a request", 1).release()
            granted.append(True)
        except anyio.WouldBlock:
            granted.append(False)
        await set_resident(self, *args)

    monkeypatch.setattr(Pipeline, "set_resident", asking)
    async with engine_of(tiny_model, "8MiB") as engine:
        await engine.resize(least + 30_000)
        assert granted[0] is False
        check(engine)
        assert (await engine.complete(tiny_model.prompts[2], tiny_model.params)).token_ids == tiny_model.references[2]
        await check_nothing_is_left(engine)
