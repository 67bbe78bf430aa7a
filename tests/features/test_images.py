"""Answers to messages with images are those of transformers, whatever runs beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from hermes_async import Completion, Engine, EngineConfig, SamplingParams
from hermes_async.engine.opening import open_model
from hermes_async.errors import CheckpointError, HermesError, MemoryBudgetError, RequestError
from hermes_async.serving.processor import SharedProcessor
from tests.disks import Disk, Read
from tests.engines import check_nothing_is_left, settle
from tests.image_models import NAMES, ImageModel, message, picture
from tests.inside import inside

pytestmark = pytest.mark.anyio

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [message("Hello", picture(1))],
    [message(picture(2), "and", picture(3, 64, 32), "?")],
    [message("only a text")],
    [message(picture(4), "a longer text")],
]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return ImageModel(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=["auto", "turns"])
async def engine(model: ImageModel, request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncIterator[Engine]:
    if request.param == "turns" and model.name != "qwen":
        pytest.skip("one model in turns is enough")
    config = EngineConfig(batching=request.param, max_tokens_per_sweep=256)
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
        if model.name != "gemma":  # its layers with a window have dropped what would be needed
            assert second.usage.cached_tokens > 16
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
    words = r"one with images is computed in one sweep|the images and the \d+ tokens of the prompt may take"
    with pytest.raises((RequestError, MemoryBudgetError), match=words):
        await engine.complete([message("x" * 300, picture(0))], PARAMS)


async def test_a_session_takes_its_first_image_late(model: ImageModel, engine: Engine) -> None:
    async with engine.session() as chat:
        for asked in ([message("a text")], [message(picture(6), "?")], [message("and this?")]):
            answer = await chat.complete(asked, PARAMS)
            assert answer.token_ids == answer_of_transformers(model, chat.messages[:-1])


async def test_sessions_with_images_in_turn_keep_their_own_positions(model: ImageModel, engine: Engine) -> None:
    """Some models note on a module how far the positions of the last prompt's images are from its tokens."""
    async with engine.session() as one, engine.session() as other:
        await one.complete([message(picture(1, 64, 32), "a")], PARAMS)
        await other.complete([message(picture(2, 32, 32), "b", picture(3, 40, 56))], PARAMS)
        for chat in (one, other, one):
            answer = await chat.complete("more", PARAMS)
            assert answer.token_ids == answer_of_transformers(model, chat.messages[:-1])


async def test_texts_and_images_share_sweeps_at_the_smallest_budget(model: ImageModel, disk: Disk) -> None:
    """Texts are packed, requests with images are turns, and only sweeps with an image read the vision stages."""
    config = EngineConfig(kv_budget=1 << 20)
    async with Engine(model.path, memory_budget="16MiB", config=config) as large:
        budget = large.plan.minimum_budget
        assert "packed; requests with images in turns" in large.plan.explanation
    read: list[tuple[int, int]] = []

    def reading(path: Path, offset: int, one: Read) -> int:
        count = one()
        read.append((offset, offset + count))
        return count

    disk.on_read = reading
    conversations = [CONVERSATIONS[2], CONVERSATIONS[0], [message("another text")], CONVERSATIONS[3]]
    expected = [answer_of_transformers(model, messages) for messages in conversations]
    async with Engine(model.path, memory_budget=budget, config=config) as engine:
        vision = [stage for stage in engine.plan.stages if stage.group == "vision"]
        assert vision and not engine.plan.resident
        middles = [each.offset + each.nbytes // 2 for stage in vision for each in stage.ranges if each.nbytes > 8192]

        def num_vision_reads() -> int:
            return sum(start <= middle < end for middle in middles for start, end in read)

        before = engine.statistics()
        assert (await engine.complete(conversations[0], PARAMS)).token_ids == expected[0]
        assert num_vision_reads() == 0
        kinds: list[set[bool]] = []
        inside(engine).on_scheduled(lambda jobs: kinds.append({job.request.prepared.in_turns for job in jobs}))
        answers: dict[int, list[int]] = {}
        begun = anyio.Event()

        async def answer(idx: int) -> None:
            has_images, answers[idx] = idx in (1, 3), []
            if not has_images:
                await begun.wait()  # so that the images' answers, which are longer, still come
            params = dataclasses.replace(PARAMS, max_tokens=32 if has_images else 8)
            async for chunk in engine.generate(conversations[idx], params):
                answers[idx] += chunk.token_ids
                begun.set()

        async with anyio.create_task_group() as tasks:
            for idx in range(len(conversations)):
                tasks.start_soon(answer, idx)
        assert [tuple(answers[idx][:8]) for idx in range(len(conversations))] == expected
        assert {True, False} in kinds
        num_reads = num_vision_reads()
        assert len(middles) <= num_reads <= 3 * len(middles)
        await engine.complete(conversations[0], PARAMS)
        assert num_vision_reads() == num_reads
        with pytest.raises(MemoryBudgetError, match=r"may take .* of activations; the plan has") as refused:
            await engine.complete([message(*(picture(idx, 64, 64) for idx in range(24)))], PARAMS)
        assert refused.value.requested_bytes > refused.value.budget_bytes == engine.plan.workspace_bytes
        await check_nothing_is_left(engine)
        after = engine.statistics()
        assert (after.bytes_in_use, after.num_leases) == (before.bytes_in_use, before.num_leases)


async def test_images_for_a_mixture_whose_experts_are_read_one_by_one(tmp_path: Path) -> None:
    model = ImageModel(tmp_path, "mixture")
    expected = [answer_of_transformers(model, messages) for messages in CONVERSATIONS]
    config = EngineConfig(kv_budget=1 << 20, max_tokens_per_sweep=64)
    opened = open_model(tmp_path, 1 << 26, config)
    opened.close()
    async with Engine(tmp_path, memory_budget=opened.plan.minimum_budget, config=config) as engine:
        assert engine.plan.expert_bytes < sum(expert.slot_bytes for expert in engine.plan.experts)
        answers: dict[int, Completion] = {}

        async def answer(idx: int) -> None:
            answers[idx] = await engine.complete(CONVERSATIONS[idx], PARAMS)

        async with anyio.create_task_group() as tasks:
            for idx in range(len(CONVERSATIONS)):
                tasks.start_soon(answer, idx)
        assert [answers[idx].token_ids for idx in range(len(CONVERSATIONS))] == expected
        await settle(engine)
        inside(engine).check_experts()


async def test_idle_sessions_with_images_and_with_texts_are_parked(model: ImageModel) -> None:
    firsts = [message("a", picture(1)), message("a text"), message("b", picture(2)), message("another text")] * 2
    async with (
        Engine(model.path, memory_budget="16MiB", config=EngineConfig(kv_budget=4096)) as engine,
        contextlib.AsyncExitStack() as exits,
    ):
        chats = [await exits.enter_async_context(engine.session()) for _ in firsts]
        for chat, first in zip(chats, firsts, strict=True):
            await chat.complete([first], PARAMS)
        assert engine.statistics().num_parkings > 0
        for chat in chats[:4]:
            answer = await chat.complete("go on", PARAMS)
            assert answer.token_ids == answer_of_transformers(model, chat.messages[:-1])
        await exits.aclose()
        await check_nothing_is_left(engine)


async def test_less_memory_than_images_need_is_enough_for_texts(model: ImageModel) -> None:
    with pytest.raises(MemoryBudgetError) as too_little:
        async with Engine(model.path, memory_budget=4096):
            pass
    assert too_little.value.minimum_bytes is not None
    async with Engine(model.path, memory_budget=too_little.value.minimum_bytes) as engine:
        assert any(line.startswith("no room for images") for line in engine.plan.explanation)
        expected = answer_of_transformers(model, CONVERSATIONS[2])
        assert (await engine.complete(CONVERSATIONS[2], PARAMS)).token_ids == expected
        with pytest.raises(MemoryBudgetError, match="of activations"):
            await engine.complete(CONVERSATIONS[0], PARAMS)


async def test_an_engine_that_takes_texts_alone(model: ImageModel, tmp_path: Path) -> None:
    """It keeps nothing of the vision tower: because it is asked to pack all requests, or there is no processor."""
    path = tmp_path / "model"
    shutil.copytree(model.path, path, ignore=shutil.ignore_patterns("*processor_config.json"))
    packed = EngineConfig(batching="packed")
    expected = answer_of_transformers(model, CONVERSATIONS[2])
    refusals: list[tuple[Path, EngineConfig, type[HermesError], str]] = [
        (model.path, packed, RequestError, "this engine takes no images: .* batching='packed' allows none"),
        (path, EngineConfig(), CheckpointError, "does not say how images are prepared"),
    ]
    for place, config, error, words in refusals:
        async with Engine(place, memory_budget="16MiB", config=config) as engine:
            assert not [stage for stage in engine.plan.stages if "vision" in stage.name or "visual" in stage.name]
            assert (await engine.complete(CONVERSATIONS[2], PARAMS)).token_ids == expected
            with pytest.raises(error, match=words):
                await engine.complete(CONVERSATIONS[0], PARAMS)
