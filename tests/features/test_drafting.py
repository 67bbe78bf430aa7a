"""Drafted tokens save sweeps and change nothing else: the same tokens, texts and ends, and the same distribution."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

from hermes_async import Engine, EngineConfig, RequestError, SamplingParams
from hermes_async.modeling.sampling import Sampler
from hermes_async.serving.speculation import PromptLookup
from tests.engines import check_nothing_is_left, drafts_cost_nothing
from tests.inside import inside
from tests.models import CopyingModel, SmallVocabulary

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> CopyingModel:
    return CopyingModel(tmp_path_factory.mktemp("copying"))


@asynccontextmanager
async def drafting_engine(model: Any, **config: Any) -> AsyncIterator[Engine]:
    """Drafts as much as it may: its sweeps count as limited by the disk, although nothing is read."""
    config = {"max_tokens_per_sweep": 32, "max_sequences": 8, "self_check": "skip", **config}
    async with Engine(model.path, memory_budget="16MiB", config=EngineConfig(**config)) as engine:
        drafts_cost_nothing(engine)
        yield engine


async def answers(model: Any, prompts: Sequence[Any], params: SamplingParams, **config: Any) -> list[Any]:
    """Of each prompt alone, and the engine's statistics last."""
    async with drafting_engine(model, **config) as engine:
        completions = [await engine.complete(prompt, params) for prompt in prompts]
        await check_nothing_is_left(engine)
        return [*completions, engine.statistics()]


async def check_same(model: Any, prompts: Sequence[Any], params: SamplingParams) -> list[Any]:
    """Drafts change only the number of sweeps; returns the completions."""
    *plain, without = await answers(model, prompts, params, prompt_lookup=False)
    *drafted, with_drafts = await answers(model, prompts, params)
    assert [done.token_ids for done in drafted] == [done.token_ids for done in plain]
    assert [done.text for done in drafted] == [done.text for done in plain]
    assert [done.finish_reason for done in drafted] == [done.finish_reason for done in plain]
    assert with_drafts.tokens_generated == without.tokens_generated == sum(len(done.token_ids) for done in plain)
    assert (without.drafted_tokens, without.accepted_tokens) == (0, 0)
    assert 0 < with_drafts.accepted_tokens < with_drafts.drafted_tokens
    assert with_drafts.sweeps < without.sweeps
    return drafted


# The same tokens


async def test_greedy_tokens_are_those_of_transformers(model: Any) -> None:
    completions = await check_same(model, model.prompts, model.params)
    assert [done.token_ids for done in completions] == model.references


async def test_all_at_once(model: Any) -> None:
    tokens: dict[int, Any] = {}

    async def user(idx: int) -> None:
        tokens[idx] = (await engine.complete(model.prompts[idx], model.params)).token_ids

    async with drafting_engine(model) as engine:
        async with anyio.create_task_group() as group:
            for idx in range(6):
                group.start_soon(user, idx)
        assert [tokens[idx] for idx in range(6)] == model.references
        assert engine.statistics().accepted_tokens > 0
        await check_nothing_is_left(engine)


@pytest.mark.parametrize(("temperature", "seed"), [(0.2, 1), (0.5, 2), (1.0, 3)])
async def test_seeded_samples_are_the_same(model: Any, temperature: float, seed: int) -> None:
    params = SamplingParams(max_tokens=50, temperature=temperature, seed=seed, ignore_eos=True)
    await check_same(model, model.prompts[::2], params)


OF_SAMPLING: list[dict[str, Any]] = [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}]
OTHERS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.3},
    {"logit_bias": {5: 2.0, 6: -3.0}},
    {"min_tokens": 20, "stop_token_ids": [6, 34, 0]},
]


@pytest.mark.parametrize(
    ("temperature", "more"),
    [(0.3, more) for more in [*OF_SAMPLING, *OTHERS]] + [(0, more) for more in OTHERS],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
async def test_the_same_with_any_other_parameter(model: Any, more: dict[str, Any], temperature: float) -> None:
    params = SamplingParams(max_tokens=50, temperature=temperature, seed=1, ignore_eos="min_tokens" not in more, **more)
    await check_same(model, model.prompts[::2], params)


async def test_log_probabilities_are_the_same(model: Any) -> None:
    params = dataclasses.replace(model.params, logprobs=3)
    *plain, _ = await answers(model, model.prompts[::2], params, prompt_lookup=False)
    *drafted, statistics = await answers(model, model.prompts[::2], params)
    assert statistics.accepted_tokens > 0
    for done, reference in zip(drafted, plain, strict=True):
        assert tuple(sampled.token_id for sampled in done.logprobs) == done.token_ids
        for sampled, expected in zip(done.logprobs, reference.logprobs, strict=True):
            assert sampled.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert sampled.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)


async def test_chunks_have_all_tokens_of_their_sweep(model: Any) -> None:
    async with drafting_engine(model) as engine:
        chunks = [
            chunk
            async for chunk in engine.generate(
                model.prompts[3], dataclasses.replace(model.params, logprobs=0), request_id="r"
            )
        ]
        assert tuple(token_id for chunk in chunks for token_id in chunk.token_ids) == model.references[3]
        assert max(len(chunk.token_ids) for chunk in chunks) > 2
        assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
        last, statistics = chunks[-1], engine.statistics()
        assert last.timings.sweeps == statistics.sweeps == len(chunks)
        assert last.usage.completion_tokens == statistics.tokens_generated == 50
        assert last.timings.drafted_tokens == statistics.drafted_tokens > 0
        assert last.timings.accepted_tokens == statistics.accepted_tokens == 50 - len(chunks)
        assert statistics.tokens_per_sweep == 50 / len(chunks)


async def test_nothing_is_drafted_where_that_is_switched_off(model: Any) -> None:
    async with drafting_engine(model, prompt_lookup=False) as engine:
        chunks = [chunk async for chunk in engine.generate(model.prompts[3], model.params)]
        assert [len(chunk.token_ids) for chunk in chunks] == [1] * 50


async def test_nothing_is_drafted_while_sweeps_are_not_known_to_be_faster(model: Any) -> None:
    config = EngineConfig(num_loading_agents=1, max_resident_layers=2)
    async with Engine(model.path, memory_budget="16MiB", config=config) as engine:
        inside(engine).freeze_sweep_times()
        assert (await engine.complete(model.prompts[3], model.params)).token_ids == model.references[3]
        assert engine.statistics().drafted_tokens == 0


# The same ends


async def answers_to_one(model: Any, prompt: Any, all_params: Sequence[SamplingParams], **config: Any) -> list[Any]:
    """With each of the parameters, one after the other."""
    async with drafting_engine(model, share_prefixes=False, **config) as engine:
        completions = [await engine.complete(prompt, params) for params in all_params]
        await check_nothing_is_left(engine)
        return completions


async def test_stop_tokens_within_accepted_runs(model: Any) -> None:
    stops = sorted(set(model.references[2]))
    all_params = [dataclasses.replace(model.params, stop_token_ids=[stop]) for stop in stops]
    all_plain = await answers_to_one(model, model.prompts[2], all_params, prompt_lookup=False)
    all_drafted = await answers_to_one(model, model.prompts[2], all_params)
    for plain, drafted in zip(all_plain, all_drafted, strict=True):
        assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, "stop")
        assert drafted.usage == plain.usage
    assert len({len(drafted.token_ids) for drafted in all_drafted}) > 10
    assert sum(drafted.timings.accepted_tokens for drafted in all_drafted) > 0


async def test_stop_texts_within_accepted_runs(model: Any) -> None:
    """Stop texts end in the middle of a word, or take several, so that text is held back over sweeps."""
    reference = model.references[2]
    words = [f"w{token_id}" for token_id in reference]
    stops = [*(" ".join(words[idx : idx + 2]) for idx in range(20, 48, 3)), "w99", words[40][:2]]
    all_params = [dataclasses.replace(model.params, stop=stop) for stop in stops]
    all_plain = await answers_to_one(model, model.prompts[2], all_params, prompt_lookup=False)
    all_drafted = await answers_to_one(model, model.prompts[2], all_params)
    for stop, plain, drafted in zip(stops, all_plain, all_drafted, strict=True):
        assert drafted.token_ids == plain.token_ids == reference[: len(drafted.token_ids)]
        assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
        assert stop not in drafted.text
    assert sum(drafted.timings.accepted_tokens for drafted in all_drafted) > 0


async def test_the_end_of_sequence_within_an_accepted_run(model: Any) -> None:
    """The model says `</s>` after some while, as it is made likelier than what it would say."""
    params = SamplingParams(max_tokens=200, temperature=0.5, seed=1, logit_bias={1: 3.0})
    completions = await check_same(model, model.prompts, params)
    assert {done.finish_reason for done in completions} >= {"stop"}


async def test_never_more_tokens_than_asked_for(model: Any) -> None:
    async with drafting_engine(model) as engine:
        for num_tokens in range(1, 30):
            params = dataclasses.replace(model.params, max_tokens=num_tokens)
            completion = await engine.complete(model.prompts[3], params)
            assert completion.token_ids == model.references[3][:num_tokens]
            assert completion.finish_reason == "length"
            assert completion.timings.drafted_tokens <= num_tokens * 31
        assert engine.statistics().accepted_tokens > 0
        await check_nothing_is_left(engine)


async def test_the_context_s_end(model: Any) -> None:
    prompt = [2] * 490
    async with drafting_engine(model) as engine:
        for params in (dataclasses.replace(model.params, max_tokens=None), model.params):
            completion = await engine.complete(prompt, params)
            assert completion.token_ids == model.greedy(prompt, 22)
            assert completion.finish_reason == "length"
        assert engine.statistics().accepted_tokens > 0
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("num_chosen", range(1, 12))
async def test_a_token_that_cannot_be_chosen_ends_one_request_after_those_before_it(
    model: Any, monkeypatch: pytest.MonkeyPatch, num_chosen: int
) -> None:
    class FailingLate(Sampler):
        def __init__(self, params: SamplingParams, *args: Any, **kwargs: Any) -> None:
            super().__init__(params, *args, **kwargs)
            self.num_left = num_chosen if params.max_tokens == 51 else 1000

        def sample(self, logits: torch.Tensor) -> Any:
            if self.num_left == 0:
                raise RequestError("no token can be chosen")
            self.num_left -= 1
            return super().sample(logits)

    monkeypatch.setattr("hermes_async.modeling.sampling.Sampler", FailingLate)
    results: list[Any] = []

    async def other() -> None:
        results.append((await engine.complete(model.prompts[2], model.params)).token_ids)

    async with drafting_engine(model) as engine:
        token_ids: list[int] = []
        async with anyio.create_task_group() as group:
            group.start_soon(other)
            with pytest.raises(RequestError, match="no token"):
                async for chunk in engine.generate(model.prompts[3], dataclasses.replace(model.params, max_tokens=51)):
                    token_ids += chunk.token_ids
        assert tuple(token_ids) == model.references[3][:num_chosen]
        assert results == [model.references[2]]
        await check_nothing_is_left(engine)


# What is kept of drafts


async def test_keys_and_values_of_accepted_drafts_are_those_of_their_tokens(model: Any) -> None:
    """What others find of an answer is right, though much was written behind it that was not."""
    async with drafting_engine(model) as engine:
        for prompt, reference in zip(model.prompts, model.references, strict=True):
            await engine.complete(prompt, model.params)
            for length in (17, 33, 49):
                longer = [*prompt, *reference[:length], 5, 5]
                completion = await engine.complete(longer, model.params)
                assert completion.token_ids == model.greedy(longer, 50)
                assert completion.usage.cached_tokens == (len(prompt) + length) // 16 * 16
        assert engine.statistics().accepted_tokens < engine.statistics().drafted_tokens
        await check_nothing_is_left(engine)


async def test_a_session_s_turns_draft_from_its_history(model: Any) -> None:
    async with drafting_engine(model) as engine:
        async with engine.session() as chat:
            history: list[int] = []
            for prompt in model.prompts:
                history += prompt
                completion = await chat.complete(prompt, model.params)
                assert completion.token_ids == model.greedy(history, 50)
                assert completion.usage.cached_tokens == max(0, len(history) - len(prompt) - 1)
                history += completion.token_ids
                assert chat.token_ids == tuple(history)
        assert engine.statistics().accepted_tokens > 0
        await check_nothing_is_left(engine)


async def test_requests_that_leave_while_drafts_are_verified(model: Any) -> None:
    chosen = random.Random(4)
    wrong: list[Any] = []

    async def user(idx: int) -> None:
        for _ in range(6):
            most = chosen.randrange(1, 50)
            token_ids: list[int] = []
            async with aclosing(engine.generate(model.prompts[idx], model.params)) as chunks:
                async for chunk in chunks:
                    token_ids += chunk.token_ids
                    if len(token_ids) >= most:
                        break
            if tuple(token_ids) != model.references[idx][: len(token_ids)]:
                wrong.append((idx, token_ids))

    async with drafting_engine(model, max_sequences=4, kv_budget=24 * 8192) as engine:
        async with anyio.create_task_group() as group:
            for idx in range(6):
                group.start_soon(user, idx)
        assert wrong == []
        await check_nothing_is_left(engine)


# The same distribution


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> SmallVocabulary:
    return SmallVocabulary(tmp_path_factory.mktemp("small"))


async def test_samples_have_the_model_s_distribution(small_vocabulary: Any) -> None:
    """Of tokens behind accepted drafts, and of those that were drafted.

    Whether a position is reached in a sweep depends only on the tokens before it, so what is chosen there has the
    model's distribution whatever was drafted. The bounds are passed by chance less than once in 10**8 runs.
    """
    prompt, num_tokens = [3, 4, 5, 6] * 3, 16
    params = SamplingParams(max_tokens=num_tokens, temperature=1.0, ignore_eos=True)
    sequences: list[list[int]] = []
    behind_drafts: list[list[bool]] = []
    foreseen: list[list[int]] = []

    async def user() -> None:
        for _ in range(25):
            token_ids, behind, drafts = list(prompt), [], []
            async for chunk in engine.generate(prompt, params):
                draft = PromptLookup(token_ids).propose(num_tokens)
                behind += [idx > 0 for idx in range(len(chunk.token_ids))]
                drafts += [-1] * len(chunk.token_ids) if draft is None else draft.token_ids[: len(chunk.token_ids)]
                token_ids += chunk.token_ids
            sequences.append(token_ids)
            behind_drafts.append(behind)
            foreseen.append(drafts)

    async with drafting_engine(small_vocabulary, max_sequences=64, max_tokens_per_sweep=128) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(user)
        assert engine.statistics().accepted_tokens > 1000

    with torch.inference_mode():
        logits = small_vocabulary.model(torch.tensor(sequences)[:, :-1]).logits[:, len(prompt) - 1 :].double()
    probs = logits.softmax(-1)
    chosen = torch.tensor(sequences)[:, len(prompt) :]

    reached = torch.tensor(behind_drafts)
    expected = probs[reached].sum(0)
    observed = torch.bincount(chosen[reached], minlength=13)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert int(observed.sum()) > 1000
    assert chi_square < 70, (observed, expected)  # twelve degrees of freedom

    drafted = torch.tensor(foreseen)
    for among in (drafted >= 0, (drafted >= 0) & reached):
        chances = probs.gather(2, drafted.clamp(min=0)[..., None])[..., 0][among]
        hits = int((chosen == drafted)[among].sum())
        sigma = math.sqrt(float((chances * (1 - chances)).sum()))
        assert abs(hits - float(chances.sum())) < 6 * sigma
