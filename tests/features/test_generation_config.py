"""generation_config.json in an engine: greedy tokens are those of transformers' `generate` with the same file."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hermes_async import ContextLengthError, Engine, EngineConfig, RequestError, SamplingParams
from tests.engines import drafts_cost_nothing
from tests.models import CopyingModel

pytestmark = pytest.mark.anyio

FILE = "generation_config.json"
NUM_TOKENS = 24
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CopyingModel:
    """Its texts repeat themselves, so that rules change tokens and prompt lookup drafts them."""
    return CopyingModel(tmp_path_factory.mktemp("copying"))


@pytest.fixture
def saying(model: CopyingModel, tmp_path: Path) -> Callable[..., Path]:
    """The model with another generation_config.json, or without one and with more in its config.json."""

    def make(file: str = FILE, **entries: Any) -> Path:
        path = Path(shutil.copytree(model.path, tmp_path / "checkpoint"))
        if file != FILE:
            (path / FILE).unlink()
            entries = json.loads((path / file).read_text()) | entries
        (path / file).write_text(json.dumps(entries))
        return path

    return make


def generated(model: CopyingModel, entries: dict[str, Any], prompt: Sequence[int], **given: Any) -> tuple[int, ...]:
    """What transformers generates greedily with these entries in the file."""
    own = model.model.generation_config
    model.model.generation_config = GenerationConfig(**entries)
    try:
        with torch.inference_mode():
            output = model.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, **given
            )
    finally:
        model.model.generation_config = own
    return tuple(output[0, len(prompt) :].tolist())


async def answers(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    completions = await asyncio.gather(*(engine.complete(prompt, params) for prompt in prompts))
    return [completion.token_ids for completion in completions]


def opened(path: Path) -> Engine:
    config = EngineConfig(num_loading_agents=2, max_resident_layers=3, self_check="skip")
    return Engine(path, memory_budget="8MiB", config=config)


@pytest.fixture(scope="module")
def without_rules(model: CopyingModel) -> Callable[[Any], list[tuple[int, ...]]]:
    """What transformers generates from each prompt when nothing but the end is named."""
    made: dict[str, list[tuple[int, ...]]] = {}

    def answers(eos_token_id: Any) -> list[tuple[int, ...]]:
        entries = {"eos_token_id": eos_token_id, "pad_token_id": 0}
        if str(entries) not in made:
            made[str(entries)] = [generated(model, entries, each, max_new_tokens=NUM_TOKENS) for each in model.prompts]
        return made[str(entries)]

    return answers


EARLY_ENDS = {"eos_token_id": [1, *range(12, 30)]}
RULES: dict[str, dict[str, Any]] = {
    "forced first": {"forced_bos_token_id": 9},
    "forced last": {"forced_eos_token_id": 7},
    "several forced last": {"forced_eos_token_id": [30, 7]},
    "suppressed": {"suppress_tokens": [-1, 5, 6, 11, 12, 10**6]},
    "suppressed at the beginning": {"begin_suppress_tokens": [5, 6, 7, 8, 9, *range(12, 38)]},
    "suppressed after a forced first": {"forced_bos_token_id": 9, "begin_suppress_tokens": [9, *range(12, 38)]},
    "bad words": {"bad_words_ids": [[5], [6, 7], [9, 10, 11], [8, 8], [1]]},
    "biases": {"sequence_bias": [[[5], -3.5], [[7, 8], 6.0], [[11], 2.5], [[10, 11, 12], -7.25]]},
    "no n-gram twice": {"no_repeat_ngram_size": 3},
    "no token twice": {"no_repeat_ngram_size": 1},
    "no n-gram of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "tokens of the prompt": {"encoder_repetition_penalty": 1.7},
    "least length": EARLY_ENDS | {"min_length": 14},
    "least new tokens": EARLY_ENDS | {"min_new_tokens": 9, "min_length": 3},
    "growing end": {"exponential_decay_length_penalty": [3, 1.4]},
    "invalid values": {"remove_invalid_values": True, "suppress_tokens": [5, 6]},
    "several together": EARLY_ENDS | {
        "forced_bos_token_id": 9, "forced_eos_token_id": 7, "suppress_tokens": [11], "begin_suppress_tokens": [5, 8],
        "no_repeat_ngram_size": 2, "bad_words_ids": [[12, 7], [6]], "sequence_bias": [[[8], 1.5]], "min_new_tokens": 10,
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
async def test_greedy_tokens_are_those_of_transformers(
    model: CopyingModel, saying: Any, without_rules: Callable[[Any], Any], rule: str
) -> None:
    entries = {"eos_token_id": 1, "pad_token_id": 0} | RULES[rule]
    expected = [generated(model, entries, prompt, max_new_tokens=NUM_TOKENS) for prompt in model.prompts]
    assert expected != without_rules(entries["eos_token_id"])
    async with opened(saying(**entries)) as engine:
        drafts_cost_nothing(engine)
        assert await answers(engine, model.prompts, PARAMS) == expected
        if rule in ("forced last", "suppressed", "bad words", "no n-gram twice"):
            assert engine.statistics().drafted_tokens > 0


async def test_config_json_says_it_where_there_is_no_other_file(model: CopyingModel, saying: Any) -> None:
    entries = {"eos_token_id": 1, "pad_token_id": 0, "suppress_tokens": [5, 6], "no_repeat_ngram_size": 2}
    expected = generated(model, entries, model.prompts[2], max_new_tokens=NUM_TOKENS)
    path = saying("config.json", suppress_tokens=[5, 6], no_repeat_ngram_size=2)
    async with opened(path) as engine:
        assert (await engine.complete(model.prompts[2], PARAMS)).token_ids == expected


# Lengths


@pytest.mark.parametrize("lengths", [{"max_length": 30}, {"max_new_tokens": 6}, {"max_length": 9, "max_new_tokens": 6}])
async def test_the_checkpoint_limits_a_request_without_a_limit(
    model: CopyingModel, saying: Any, lengths: dict[str, int]
) -> None:
    entries = {"eos_token_id": 1, "pad_token_id": 0, "forced_eos_token_id": 7} | lengths
    prompt = model.prompts[2]
    expected = generated(model, entries, prompt)
    assert expected[-1] == 7
    assert len(expected) == 6
    async with opened(saying(**entries)) as engine:
        for unlimited in (SamplingParams(max_tokens=None, temperature=0), SamplingParams.from_model()):
            completion = await engine.complete(prompt, unlimited)
            assert (completion.token_ids, completion.finish_reason) == (expected, "length")
        # A limit of the user's has precedence.
        longer = generated(model, entries, prompt, max_new_tokens=NUM_TOKENS)
        assert (await engine.complete(prompt, PARAMS)).token_ids == longer
        assert len(longer) == NUM_TOKENS


async def test_a_prompt_of_the_greatest_length_is_refused_by_name(model: CopyingModel, saying: Any) -> None:
    async with opened(saying(max_length=24)) as engine:
        with pytest.raises(ContextLengthError, match="max_length of 24") as caught:
            await engine.complete(model.prompts[2], SamplingParams.from_model())
        assert (caught.value.context_length, caught.value.num_tokens) == (24, 24)
        assert len((await engine.complete(model.prompts[2][:-1], SamplingParams.from_model())).token_ids) == 1


async def test_the_least_length_of_the_user_has_precedence(model: CopyingModel, saying: Any) -> None:
    prompt = model.prompts[4]
    end = generated(model, {"eos_token_id": -1, "pad_token_id": 0}, prompt, max_new_tokens=NUM_TOKENS)[3]
    entries = {"eos_token_id": end, "min_new_tokens": 9, "pad_token_id": 0}
    async with opened(saying(**entries)) as engine:
        for min_tokens in (0, 1, 3):
            params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, min_tokens=min_tokens)
            given = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": min_tokens}
            expected = generated(model, entries, prompt, **given)
            assert len(expected) < 9
            assert (await engine.complete(prompt, params)).token_ids == expected


# Sampling


async def test_sampling_values_are_taken_only_when_asked_for(model: CopyingModel, saying: Any) -> None:
    says = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 7, "min_p": 0.02, "repetition_penalty": 1.3}
    own = {name: says[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    prompt, common = model.prompts[4], {"max_tokens": 30, "seed": 5, "ignore_eos": True}
    async with opened(saying(**says)) as engine:
        assert engine.resolve_sampling_params() == SamplingParams(max_tokens=None, **own)
        some = SamplingParams.from_model(top_p=1.0, max_tokens=5)
        assert engine.resolve_sampling_params(some) == SamplingParams(**own | {"top_p": 1.0, "max_tokens": 5})
        plain = SamplingParams(**common)
        assert engine.resolve_sampling_params(plain) is plain

        async def tokens(params: SamplingParams) -> tuple[int, ...]:
            return (await engine.complete(prompt, params)).token_ids

        assert await tokens(SamplingParams.from_model(**common)) == await tokens(SamplingParams(**common, **own))
        assert await tokens(plain) != await tokens(SamplingParams(**common, **own))
        # Greedy, with the penalty that transformers applies then too.
        greedy = SamplingParams.from_model(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        expected = generated(model, says | {"eos_token_id": -1, "pad_token_id": 0}, prompt, max_new_tokens=NUM_TOKENS)
        assert await tokens(greedy) == expected
        async with engine.session() as session:
            assert (await session.complete(prompt, greedy)).token_ids == expected
        with pytest.raises(RequestError, match="SamplingParams"):
            engine.resolve_sampling_params({"temperature": 1.0})  # type: ignore[arg-type]


async def test_a_checkpoint_that_does_not_sample_is_greedy(model: CopyingModel, saying: Any) -> None:
    entries = {"temperature": 0.6, "eos_token_id": 1, "pad_token_id": 0}
    expected = [generated(model, entries, prompt, max_new_tokens=NUM_TOKENS) for prompt in model.prompts]
    params = SamplingParams.from_model(max_tokens=NUM_TOKENS)
    async with opened(saying(**entries)) as engine:
        assert await answers(engine, model.prompts, params) == expected
        resolved = engine.resolve_sampling_params(params)
        assert (resolved.temperature, resolved.top_k) == (0.0, 50)


# What is not honoured


async def test_what_is_not_honoured_is_named_in_one_warning(
    model: CopyingModel, saying: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = saying(
        num_beams=4, penalty_alpha=0.6, prompt_lookup_num_tokens=3, typical_p=1.0, top_h=None, length_penalty=2
    )
    async with opened(path) as engine:
        await engine.complete(model.prompts[2], PARAMS)
    (record,) = [record for record in caplog.records if FILE in record.getMessage()]
    assert record.levelname == "WARNING"
    named = record.getMessage().partition("transformers': ")[2]
    assert named == "num_beams (4), penalty_alpha (0.6), prompt_lookup_num_tokens (3)"
