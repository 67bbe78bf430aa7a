"""Structured answers of an engine: what ends with "stop" matches, beside whatever else goes on."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import pytest

import hermes_async
from hermes_async import Completion, Engine, EngineConfig, RequestError, SamplingParams, StructuredOutputs
from tests.engines import check_nothing_is_left, drafts_cost_nothing, open_engine

pytestmark = pytest.mark.anyio

DEMO = Path(hermes_async.__file__).parent / "demo" / "model"
PROMPT = "First Citizen:\nYou are all resolved rather to die than to famish?\n\nAll:\nResolved. resolved.\n\n"
SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["Citizen", "MENENIUS"]}, "n": {"type": "integer", "minimum": 1, "maximum": 12}},
    "required": ["who", "n"],
    "additionalProperties": False,
}
LINE = r"[A-Z][a-z]{1,8}( [a-z]{1,8}){0,4}[.!?]"
CHOICE = ["Resolved.", "Speak, speak.", "No more talking on't"]


@pytest.fixture
async def engine() -> AsyncGenerator[Engine, None]:
    config = EngineConfig(max_sequences=16)
    async with Engine(DEMO, memory_budget="48MiB", config=config) as engine:
        yield engine


def check(asked: dict[str, Any], text: str) -> None:
    if "regex" in asked:
        assert re.fullmatch(asked["regex"], text)
    elif "choice" in asked:
        assert text in asked["choice"]
    elif "json" in asked:
        value = json.loads(text)
        assert list(value) == ["who", "n"] and value["who"] in ("Citizen", "MENENIUS") and 1 <= value["n"] <= 12
    else:
        assert isinstance(json.loads(text), dict)


async def complete_all(engine: Engine, params: list[SamplingParams]) -> list[Completion]:
    """All at once, so that they share sweeps."""
    completions: dict[int, Completion] = {}

    async def complete(idx: int) -> None:
        completions[idx] = await engine.complete(PROMPT, params[idx])

    async with anyio.create_task_group() as tasks:
        for idx in range(len(params)):
            tasks.start_soon(complete, idx)
    return [completions[idx] for idx in range(len(params))]


async def test_answers_match_and_neighbours_are_not_changed(engine: Engine) -> None:
    plain = [SamplingParams(max_tokens=24, seed=seed, temperature=seed % 2) for seed in range(4)]
    before = [completion.token_ids for completion in await complete_all(engine, plain)]
    asked: list[dict[str, Any]] = [{"json": SCHEMA}, {"json_object": True}, {"regex": LINE}, {"choice": CHOICE}]
    variants: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"stop": [" ", "}", "d.", "\n"], "min_p": 0.01},
        {"min_tokens": 20, "top_k": 40},
        {"logit_bias": {0: 20.0, 5: -1e9, 40: 1e9}, "presence_penalty": 2},
        {"temperature": 0, "skip_special_tokens": False, "logprobs": 1},
    ]
    structured = [
        (one, SamplingParams(max_tokens=90, seed=seed, structured_outputs=one, **variant))
        for seed, variant in enumerate(variants)
        for one in asked
    ]
    drafts_cost_nothing(engine)  # prompt lookup drafts as much as it can
    completions = await complete_all(engine, [*plain, *(params for _, params in structured)])
    assert [completion.token_ids for completion in completions[: len(plain)]] == before
    assert engine.statistics().drafted_tokens > 0
    ended = 0
    for (one, params), completion in zip(structured, completions[len(plain) :], strict=True):
        assert completion.finish_reason in ("stop", "length")
        if completion.finish_reason == "stop":
            check(one, completion.text)
            ended += 1
        if params.min_tokens and "choice" in one:
            assert completion.finish_reason == "stop"  # nothing else can follow
    assert ended > len(structured) / 2
    await check_nothing_is_left(engine)


async def test_drafts_do_not_change_structured_answers() -> None:
    asked = StructuredOutputs(regex=r"(re)?solved( (re)?solved)*\.")
    params = [SamplingParams(max_tokens=40, seed=seed, structured_outputs=asked) for seed in range(4)]
    answers = []
    for lookup, draft_model in ((False, None), (True, DEMO)):
        config = EngineConfig(prompt_lookup=lookup, max_sequences=4)
        async with Engine(DEMO, memory_budget="64MiB", config=config, draft_model=draft_model) as engine:
            if lookup:
                drafts_cost_nothing(engine)
            answers.append([completion.token_ids for completion in await complete_all(engine, params)])
            drafted = engine.statistics().drafted_tokens
            assert (drafted > 0) is lookup
    assert answers[0] == answers[1]


async def test_a_session_goes_on_after_a_structured_answer(engine: Engine) -> None:
    async with engine.session() as session:
        for seed in range(3):
            params = SamplingParams(max_tokens=200, seed=seed, structured_outputs={"json": SCHEMA})
            completion = await session.complete("Who speaks?", params)
            assert completion.finish_reason == "stop"
            check({"json": SCHEMA}, completion.text)
            free = await session.complete("And then?", SamplingParams(max_tokens=4, seed=seed))
            assert free.usage.cached_tokens > 0


async def test_a_stop_text_ends_an_answer_only_after_a_whole_one(engine: Engine) -> None:
    asked = StructuredOutputs(regex="[a-z]+(, [a-z]+)*")
    params = SamplingParams(max_tokens=60, temperature=0, structured_outputs=asked)
    whole = (await engine.complete(PROMPT, params)).text
    assert whole.count(", ") > 1
    ended = await engine.complete(PROMPT, dataclasses.replace(params, stop=[" "]))
    assert ended.text == whole[: len(ended.text)] and ended.finish_reason != "stop"  # "word," is not whole
    ended = await engine.complete(PROMPT, dataclasses.replace(params, stop=[","]))
    assert (ended.text, ended.finish_reason) == (whole.partition(",")[0], "stop")


async def test_a_grammar_that_exceeds_its_limits_ends_its_own_request(engine: Engine) -> None:
    hostile = SamplingParams(max_tokens=60, min_tokens=60, structured_outputs={"regex": "(a{1,1000}){1000}"})
    good = SamplingParams(max_tokens=60, seed=1, structured_outputs={"choice": CHOICE})
    errors: list[str] = []

    async def complete_hostile() -> None:
        with pytest.raises(RequestError, match="the grammar cannot go on") as caught:
            await engine.complete(PROMPT, hostile)
        errors.append(str(caught.value))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(complete_hostile)
        completion = await engine.complete(PROMPT, good)
    assert completion.text in CHOICE and len(errors) == 1 and len(errors[0]) < 500
    with pytest.raises(RequestError, match="cannot be compiled"):
        await engine.complete(PROMPT, SamplingParams(structured_outputs={"regex": "("}))
    await check_nothing_is_left(engine)


async def test_a_checkpoint_without_a_tokenizer(tiny_model: Any, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_model.path / name)
    async with Engine(tmp_path, memory_budget="8MiB", config=tiny_model.config) as engine:
        with pytest.raises(RequestError, match=r"structured_outputs needs a tokenizer: .* has no tokenizer"):
            await engine.complete([5, 6], SamplingParams(structured_outputs={"json_object": True}))


async def test_a_tokenizer_whose_tokens_are_not_bytes(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        with pytest.raises(RequestError, match="this model's tokenizer"):
            await engine.complete([5, 6], SamplingParams(structured_outputs={"json_object": True}))
