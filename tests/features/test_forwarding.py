"""Plain forward passes beside each other and beside generation: what shares sweeps, ends early, fails or is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaForCausalLM, ViTConfig, ViTModel

from hermes_async import (
    ConfigError,
    ContextLengthError,
    Engine,
    EngineClosedError,
    EngineConfig,
    MemoryBudgetError,
    ReadError,
    RequestError,
)
from tests.engines import check_nothing_is_left, greedy_params, open_engine, tokens, until
from tests.inside import inside

pytestmark = pytest.mark.anyio

CONFIG = EngineConfig(num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=64)


class Encoder:
    """A small BERT on disk, and what transformers computes with it."""

    config = CONFIG

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.manual_seed(4)
        config = BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=96,
            max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        self.model = BertModel(config).eval()
        self.model.save_pretrained(path)

    def expected(self, input_ids: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor(input_ids)).last_hidden_state


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(tmp_path_factory.mktemp("encoder"))


async def check_pass(engine: Engine, encoder: Encoder, input_ids: list[list[int]]) -> None:
    output = await engine.forward(input_ids=input_ids)
    torch.testing.assert_close(output.last_hidden_state, encoder.expected(input_ids), atol=1e-5, rtol=1e-4)


# Sharing


async def test_passes_that_come_together_share_a_sweep(encoder: Encoder, no_blocking: Any) -> None:
    async with open_engine(encoder) as engine:
        async with anyio.create_task_group() as group:
            for length in (3, 5, 8, 13):
                group.start_soon(check_pass, engine, encoder, [tokens(length, length)])
        assert engine.statistics().sweeps == 1
        await check_nothing_is_left(engine)


async def test_more_than_there_is_room_for_goes_in_several_sweeps(encoder: Encoder) -> None:
    async with open_engine(encoder) as engine:
        async with anyio.create_task_group() as group:
            for seed in range(6):
                group.start_soon(check_pass, engine, encoder, [tokens(seed, 30)])
        assert engine.statistics().sweeps == 3  # of 64 tokens
        assert engine.statistics().num_forwards == 0


async def test_a_pass_and_a_request_share_a_sweep(tiny_model: Any) -> None:
    """Where there is room for both, the pass needs no sweep of its own."""
    num_tokens = tiny_model.num_tokens
    model = LlamaForCausalLM.from_pretrained(tiny_model.path).eval()
    input_ids = torch.tensor([tokens(1, 4)])
    with torch.inference_mode():
        expected = model(input_ids=input_ids).logits
    async with open_engine(tiny_model, max_tokens_per_sweep=64) as engine:
        chunks = engine.generate(tiny_model.prompts[1], tiny_model.params)
        answer = list((await anext(chunks)).token_ids)
        for _ in range(3):
            torch.testing.assert_close((await engine.forward(input_ids=input_ids)).logits, expected)
        answer += [token_id async for chunk in chunks for token_id in chunk.token_ids]
        assert tuple(answer) == tiny_model.references[1]
        assert engine.statistics().sweeps == num_tokens  # the first one computes the prompt
        await check_nothing_is_left(engine)


async def test_passes_beside_requests_that_generate(tiny_model: Any) -> None:
    """They share sweeps or take turns, and neither changes what the other gets."""
    model = LlamaForCausalLM.from_pretrained(tiny_model.path).eval()
    answers: list[Any] = []
    async with open_engine(tiny_model, max_tokens_per_sweep=32) as engine:

        async def ask(idx: int) -> None:
            answers.append((await engine.complete(tiny_model.prompts[idx], tiny_model.params)).token_ids)

        async def run(idx: int) -> None:
            for length in (2, 9, 14):
                input_ids = torch.tensor([tokens(idx, length)])
                output = await engine.forward(input_ids=input_ids)
                with torch.inference_mode():
                    expected = model(input_ids=input_ids)
                torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-4)
                assert output.past_key_values is None

        async with anyio.create_task_group() as group:
            for idx in range(4):
                group.start_soon(ask, idx)
                group.start_soon(run, idx)
        assert sorted(answers) == sorted(tiny_model.references[:4])
        await check_nothing_is_left(engine)


async def test_what_an_output_may_be_asked_for(encoder: Encoder) -> None:
    input_ids = [tokens(1, 6)]
    async with open_engine(encoder) as engine:
        output = await engine.forward(input_ids=input_ids, output_hidden_states=True)
        as_tuple = await engine.forward(input_ids=torch.tensor(input_ids), return_dict=False)
    with torch.inference_mode():
        expected = encoder.model(input_ids=torch.tensor(input_ids), output_hidden_states=True)
    assert len(output.hidden_states) == 5
    for actual, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(as_tuple[0], output.last_hidden_state)


# Ending early


async def test_a_pass_that_is_cancelled_beside_others(encoder: Encoder) -> None:
    async with open_engine(encoder) as engine:
        async with anyio.create_task_group() as group:
            for length in (3, 5):
                group.start_soon(check_pass, engine, encoder, [tokens(length, length)])
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as cancelled:
                    cancelled.start_soon(check_pass, engine, encoder, [tokens(9, 9)])
                    await until(lambda: engine.statistics().num_forwards == 3)
                    scope.cancel()
        await check_pass(engine, encoder, [tokens(4, 4)])
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("num_passes", [1, 3])
async def test_when_all_passes_are_cancelled_the_sweep_ends(encoder: Encoder, num_passes: int) -> None:
    async with open_engine(encoder) as engine:
        for moment in range(30):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    for length in range(num_passes):
                        group.start_soon(check_pass, engine, encoder, [tokens(length, 5 + length)])
                    for _ in range(3 * moment):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        await until(lambda: engine.statistics().num_forwards == 0)
        sweeps = engine.statistics().sweeps
        await check_pass(engine, encoder, [tokens(4, 4)])
        assert engine.statistics().sweeps == sweeps + 1


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("num_passes", [1, 3])
async def test_leaving_the_engine_ends_passes(encoder: Encoder, num_passes: int, running: bool) -> None:
    errors: list[BaseException] = []

    async def run(engine: Engine, length: int) -> None:
        try:
            await engine.forward(input_ids=[tokens(length, length)])
        except EngineClosedError as error:
            errors.append(error)

    async with anyio.create_task_group() as group, open_engine(encoder) as engine:
        token = anyio.lowlevel.current_token()
        inside(engine).on_stage(lambda: anyio.from_thread.run(anyio.sleep, 0.02, token=token))
        for length in range(num_passes):
            group.start_soon(run, engine, 3 + length)
        await until(lambda: engine.statistics().num_forwards == num_passes)
        if running:
            await until(lambda: inside(engine).num_forwards_in_sweep == num_passes)
    assert len(errors) == num_passes
    with pytest.raises(EngineClosedError):
        await engine.forward(input_ids=[[1]])


# Errors


@pytest.mark.parametrize("num_passes", [1, 3])
async def test_weights_that_cannot_be_read_fail_the_passes_of_that_sweep(
    encoder: Encoder, tmp_path: Path, num_passes: int
) -> None:
    path = shutil.copytree(encoder.path, tmp_path / "model")
    shard = path / "model.safetensors"
    data, before = shard.read_bytes(), shard.stat()
    errors: list[ReadError] = []

    async def run(engine: Engine, length: int) -> None:
        try:
            await engine.forward(input_ids=[tokens(length, length)])
        except ReadError as error:
            errors.append(error)

    async with Engine(path, memory_budget="8MiB", config=CONFIG) as engine:
        with shard.open("r+b") as file:
            file.truncate(len(data) // 3)
        async with anyio.create_task_group() as group:
            for length in range(num_passes):
                group.start_soon(run, engine, 3 + length)
        assert len(errors) == num_passes
        with shard.open("r+b") as file:
            file.write(data)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as it was: a changed shard is refused
        await check_pass(engine, encoder, [tokens(4, 4)])


async def test_a_pass_that_the_model_refuses_fails_alone(encoder: Encoder) -> None:
    async with open_engine(encoder) as engine:
        await check_pass(engine, encoder, [tokens(4, 4)])
        async with anyio.create_task_group() as group:
            for length in (3, 5):
                group.start_soon(check_pass, engine, encoder, [tokens(length, length)])
            with pytest.raises(RequestError, match=r"BertModel\.forward does not run on these inputs: IndexError"):
                await engine.forward(input_ids=[[1, 2]], token_type_ids=[[0, 9]])
        with pytest.raises(RequestError, match="does not run"):
            await engine.forward(input_ids=[[1, 2]], position_ids=[[0, 9, 1]])
        await check_pass(engine, encoder, [tokens(4, 4)])
        await check_nothing_is_left(engine)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs inputs; it takes input_ids, attention_mask"),
        ({"pixel_values": [[1.0]]}, "takes no 'pixel_values'; it takes input_ids, attention_mask"),
        ({"input_ids": "text"}, "input_ids must be a tensor, an array or numbers in lists, not str"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids cannot be made into a tensor"),
        ({"input_ids": [1, 2]}, r"input_ids must be integers \[batch, tokens\]"),
        ({"input_ids": [[]]}, r"input_ids must be integers \[batch, tokens\]"),
        ({"input_ids": [[1.5]]}, r"input_ids must be integers \[batch, tokens\]"),
        ({"input_ids": [[96]]}, "token id 96 is out of the vocabulary, which has 96"),
        ({"input_ids": [[-1]]}, "token id -1 is out of the vocabulary"),
        ({"input_ids": [[1]], "use_cache": True}, "keeps no KV cache"),
        ({"input_ids": [[1]], "past_key_values": ()}, "keeps no KV cache"),
    ],
)
async def test_inputs_that_cannot_be_used(encoder: Encoder, inputs: dict[str, Any], message: str) -> None:
    async with open_engine(encoder) as engine:
        with pytest.raises(RequestError, match=message):
            await engine.forward(**inputs)
        await check_pass(engine, encoder, [tokens(4, 4)])


async def test_too_many_tokens(encoder: Encoder) -> None:
    async with open_engine(encoder) as engine:
        with pytest.raises(ContextLengthError, match="65 tokens are more than the model's context of 64"):
            await engine.forward(input_ids=[tokens(1, 65)])
        with pytest.raises(MemoryBudgetError, match=r"120 tokens \(2 sequences or images of 60\)") as caught:
            await engine.forward(input_ids=[tokens(1, 60), tokens(2, 60)])
        assert caught.value.minimum_bytes >= engine.plan.memory_budget


async def test_a_model_that_does_not_generate(encoder: Encoder) -> None:
    async with open_engine(encoder) as engine:
        assert engine.plan.kv_bytes == 0
        with pytest.raises(RequestError, match="BertModel is no causal language model and does not generate"):
            await engine.complete([1, 2, 3], greedy_params(3))
        async with engine.session() as chat:
            with pytest.raises(RequestError, match="does not generate"):
                await chat.complete([1, 2, 3], greedy_params(3))
        await check_nothing_is_left(engine)


async def test_options_that_only_generating_models_have(encoder: Encoder, tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match="keeps no KV caches"):
        await open_engine(encoder, kv_budget="1MiB").__aenter__()
    with pytest.raises(ConfigError, match="the draft model is a BertModel"):
        await Engine(tiny_model.path, memory_budget="8MiB", draft_model=encoder.path).__aenter__()


# Images


async def test_an_image_of_a_wrong_size(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path)
    async with Engine(tmp_path, memory_budget="8MiB") as engine:
        with pytest.raises(RequestError, match=r"ViTModel\.forward does not run on these inputs"):
            await engine.forward(pixel_values=torch.zeros(1, 3, 20, 16))
        output = await engine.forward(pixel_values=torch.zeros(1, 3, 16, 16, dtype=torch.float64))
        assert output.last_hidden_state.shape == (1, 17, 32)


async def test_the_bytes_of_a_masked_language_model_s_logits_count(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=5000
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        assert engine.plan.workspace_bytes >= engine.plan.max_tokens_per_sweep * 5000 * 4
