"""Answers to messages with images are those of transformers, whatever runs beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from hermes_async import Completion, Engine, EngineConfig, SamplingParams
from hermes_async.errors import RequestError
from hermes_async.serving.processor import SharedProcessor
from tests.engines import check_nothing_is_left
from tests.image_models import NAMES, ImageModel, message, picture

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [message("Hello", picture(1))],
    [message(picture(2), "and", picture(3, 64, 32), "?")],
    [message("only a text")],
    [message(picture(4), "a longer text")],
]


@pytest.fixture(scope="module", autouse=True)
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One event loop, which makes no difference here, for the engine of all tests."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return ImageModel(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
async def engine(model: ImageModel, anyio_backend: Any) -> AsyncIterator[Engine]:
    config = EngineConfig(batching="turns", max_tokens_per_sweep=256)
    async with Engine(model.path, memory_budget="16MiB", config=config) as opened:
        yield opened
        await check_nothing_is_left(opened)


def answer_of_transformers(model: ImageModel, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    parts = [[{"type": "text", "text": c}] if isinstance(c := m["content"], str) else c for m in messages]
    asked = [{**m, "content": content} for m, content in zip(messages, parts, strict=True)]
    with SharedProcessor(model.path).taken() as processor:
        inputs = processor.apply_chat_template(
            asked, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
    with torch.inference_mode():
        output = model.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


async def test_tokens_are_those_of_transformers(model: ImageModel, engine: Engine) -> None:
    expected = [answer_of_transformers(model, messages) for messages in CONVERSATIONS]
    assert len(set(expected)) > 1
    for messages, tokens in zip(CONVERSATIONS, expected, strict=True):
        assert (await engine.complete(messages, PARAMS)).token_ids == tokens
    answers: dict[int, Completion] = {}

    async def answer(idx: int) -> None:
        answers[idx] = await engine.complete(CONVERSATIONS[idx], PARAMS)

    async with anyio.create_task_group() as tasks:
        for idx in range(len(CONVERSATIONS)):
            tasks.start_soon(answer, idx)
    assert [answers[idx].token_ids for idx in range(len(CONVERSATIONS))] == expected


async def test_sessions_keep_images(model: ImageModel, engine: Engine) -> None:
    async with engine.session() as chat:
        await chat.complete(CONVERSATIONS[1], PARAMS)
        second = await chat.complete("and then?", PARAMS)
        asked = [*chat.messages[:-1]]
        assert asked[0]["content"] == CONVERSATIONS[1][0]["content"]
        assert second.token_ids == answer_of_transformers(model, asked)
        async with chat.fork() as other:
            third = await other.complete([message("now", picture(5))], PARAMS)
            assert third.token_ids == answer_of_transformers(model, other.messages[:-1])
        # Another image is as many tokens: what was computed for the first one may not be used.
        chat.edit([message(picture(7), "and", picture(3, 64, 32), "?"), *chat.messages[1:]])
        edited = await chat.complete("and?", PARAMS)
        assert edited.token_ids == answer_of_transformers(model, chat.messages[:-1])
        assert edited.usage.cached_tokens == 0


async def test_bad_images_end_only_their_own_request(model: ImageModel, engine: Engine) -> None:
    expected = answer_of_transformers(model, CONVERSATIONS[0])
    bad: list[Any] = [
        [message("a", "b", np.zeros((2, 2), np.float32))],
        [message(np.zeros((1, 1), np.uint8), model.placeholder)],
        [{"role": "user", "content": [{"type": "image", "image": "http://localhost/a.png"}]}],
    ]
    answers: list[Completion] = []

    async def good() -> None:
        answers.append(await engine.complete(CONVERSATIONS[0], PARAMS))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(good)
        for messages in bad:
            with pytest.raises(RequestError):
                await engine.complete(messages, PARAMS)
    assert [answer.token_ids for answer in answers] == [expected]


async def test_a_prompt_that_one_sweep_cannot_take(engine: Engine) -> None:
    with pytest.raises(RequestError, match="one with images is computed in one sweep, which has at most"):
        await engine.complete([message("x" * 300, picture(0))], PARAMS)


async def test_an_engine_that_packs_takes_texts_alone(model: ImageModel) -> None:
    async with Engine(model.path, memory_budget="16MiB") as packing:
        assert (await packing.complete(CONVERSATIONS[2], PARAMS)).token_ids == answer_of_transformers(
            model, CONVERSATIONS[2]
        )
        with pytest.raises(RequestError, match="images need an engine that runs in turns"):
            await packing.complete(CONVERSATIONS[0], PARAMS)
