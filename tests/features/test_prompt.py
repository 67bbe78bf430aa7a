"""What can be a prompt, and how the others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hermes_async import ContextLengthError, Engine, EngineConfig, MemoryBudgetError, RequestError, SamplingParams

pytestmark = pytest.mark.anyio

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


@pytest.fixture
async def engine(tiny_model: Any) -> AsyncIterator[Engine]:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        yield engine


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, lambda ids: [np.int64(token_id) for token_id in ids]]
)
async def test_token_ids_of_any_kind(tiny_model: Any, engine: Engine, kind: Any) -> None:
    completion = await engine.complete(kind(tiny_model.prompts[1]), GREEDY)
    assert completion.token_ids == tiny_model.references[1][:3]


async def test_a_text(tiny_model: Any, engine: Engine) -> None:
    completion = await engine.complete(tiny_model.text(tiny_model.prompts[1]), GREEDY)
    assert completion.token_ids == tiny_model.references[1][:3]
    assert completion.usage.prompt_tokens == 5


async def test_chat_messages_go_through_the_template(tiny_model: Any, engine: Engine) -> None:
    messages = [{"role": "user", "content": "w11 w12"}, {"role": "assistant", "content": "w13"}]
    completion = await engine.complete(messages, GREEDY)
    assert completion.token_ids == tiny_model.greedy([11, 12, 13, 7])[:3]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        (" ", "no tokens"),
        (np.array([], dtype=np.int64), "empty"),
        (None, "NoneType"),
        (5, "int"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        ({"role": "user", "content": "w5"}, "dict"),
        ([1.5], "sequence of int"),
        ([True, False], "sequence of int"),
        (["w5"], "sequence of int"),
        ([[5, 6]], "sequence of int"),
        ([5, None], "sequence of int"),
        ([5, 96], "96"),
        ([-1], "-1"),
        ([2**70], str(2**70)),
        ([{"content": "w5"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": 5, "content": "w5"}], "role"),
        ([{"role": "nobody", "content": "w5"}], "nobody may not speak"),
        ([{"role": "user", "content": "w5"}, {"role": "user"}], "message 1"),
        ("w5 \ud800", "the prompt has a lone surrogate, U+D800"),
        ([{"role": "user", "content": "\udfff"}], "message 0"),
    ],
)
async def test_what_is_no_prompt(engine: Engine, prompt: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        await engine.complete(prompt, GREEDY)
    assert type(caught.value) is RequestError
    assert says in str(caught.value)
    assert engine.statistics().num_waiting == 0


async def test_an_empty_text_is_the_beginning_that_the_tokenizer_puts_before_texts(
    tiny_model: Any, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "begins"))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    async with Engine(path, memory_budget="8MiB", config=tiny_model.config) as engine:
        completion = await engine.complete("", GREEDY)
        assert completion.token_ids == tiny_model.greedy([0])[:3]
        assert completion.usage.prompt_tokens == 1
        async with engine.session() as chat:
            with pytest.raises(RequestError, match="the prompt is empty; a turn"):
                await chat.complete("", GREEDY)
            await chat.complete("w5", GREEDY)
            with pytest.raises(RequestError, match="the prompt is empty; a turn"):
                await chat.complete("", GREEDY)


async def test_a_session_names_what_is_wrong_by_what_it_was_given(engine: Engine) -> None:
    async with engine.session() as chat:
        await chat.complete("w5", GREEDY)
        with pytest.raises(RequestError, match="message 0, of role 'user', has no content"):
            await chat.complete([{"role": "user"}], GREEDY)
        with pytest.raises(RequestError, match="the prompt has a lone surrogate"):
            await chat.complete("\ud800", GREEDY)
        with pytest.raises(RequestError, match="message 1 has a lone surrogate"):
            chat.edit([{"role": "user", "content": "w5"}, {"role": "user", "content": "\ud800"}])


async def test_params_of_another_kind(engine: Engine) -> None:
    with pytest.raises(RequestError, match="SamplingParams"):
        await engine.complete([5], {"max_tokens": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [64, 65, 200])
async def test_a_prompt_longer_than_the_context(engine: Engine, num_tokens: int) -> None:
    with pytest.raises(ContextLengthError, match=str(num_tokens)) as caught:
        await engine.complete([5] * num_tokens, GREEDY)
    assert (caught.value.context_length, caught.value.num_tokens) == (64, num_tokens)


async def test_the_longest_prompt_leaves_room_for_one_token(tiny_model: Any, engine: Engine) -> None:
    completion = await engine.complete([5] * 63, GREEDY)
    assert len(completion.token_ids) == 1
    assert completion.finish_reason == "length"


async def test_a_request_that_can_never_fit_tells_the_numbers(tiny_model: Any, tmp_path: Path) -> None:
    # A model with a long context and the smallest budget: 256 tokens of KV memory.
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "long"))
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(
        config.replace('"max_position_embeddings": 64', '"max_position_embeddings": 4096')
    )
    with pytest.raises(MemoryBudgetError) as small:
        async with Engine(path, memory_budget=1):
            pytest.fail("entered")
    params = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    async with Engine(path, memory_budget=small.value.minimum_bytes) as engine:
        with pytest.raises(MemoryBudgetError, match="KV") as caught:
            await engine.complete([5], params)
        error = caught.value
        assert error.requested_bytes > error.budget_bytes == engine.plan.kv_bytes
        assert error.minimum_bytes is not None
        assert f"kv_budget={error.requested_bytes} in a memory_budget of {error.minimum_bytes}" in str(error)
        # As many tokens as there is memory for, if the number is left open.
        async for chunk in engine.generate([5], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)):
            assert chunk.finish_reason is None
            break
    advised = EngineConfig(kv_budget=error.requested_bytes)
    async with Engine(path, memory_budget=error.minimum_bytes, config=advised) as engine:
        assert len((await engine.complete([5], params)).token_ids) == 300


@pytest.fixture
def without_tokenizer(tiny_model: Any, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "without"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink(missing_ok=True)
    return path


async def test_without_a_tokenizer_token_ids_still_work(tiny_model: Any, without_tokenizer: Path) -> None:
    async with Engine(without_tokenizer, memory_budget="8MiB", config=tiny_model.config) as engine:
        completion = await engine.complete(tiny_model.prompts[1], GREEDY)
        assert (completion.token_ids, completion.text) == (tiny_model.references[1][:3], "")
        for prompt in ("w5", [{"role": "user", "content": "w5"}]):
            with pytest.raises(RequestError, match="no tokenizer"):
                await engine.complete(prompt, GREEDY)
        with pytest.raises(RequestError, match="no tokenizer"):
            await engine.complete([5], SamplingParams(stop="w5"))


async def test_a_tokenizer_that_cannot_be_loaded_is_no_reason_not_to_open(
    tiny_model: Any, without_tokenizer: Path
) -> None:
    (without_tokenizer / "tokenizer.json").write_text("{")
    async with Engine(without_tokenizer, memory_budget="8MiB", config=tiny_model.config) as engine:
        assert (await engine.complete([5], GREEDY)).token_ids
        with pytest.raises(RequestError, match="cannot be loaded"):
            await engine.complete("w5", GREEDY)
