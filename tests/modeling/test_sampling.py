"""Sampler against transformers' processors, transformers' generate, and examples worked by hand."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hermes_async.config import SamplingParams
from hermes_async.errors import RequestError
from hermes_async.modeling.sampling import Sampler, TopPWarper
from hermes_async.results import SampledToken

VOCAB_SIZE = 50


def make_sampler(
    prompt_ids: Sequence[int] = (1, 2, 3),
    *,
    eos_token_ids: frozenset[int] = frozenset(),
    vocab_size: int = VOCAB_SIZE,
    **params: Any,
) -> Sampler:
    return Sampler(SamplingParams(**params), prompt_ids, eos_token_ids=eos_token_ids, vocab_size=vocab_size)


def make_logits(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def draws(logits: torch.Tensor, num_draws: int, **params: Any) -> Counter[int]:
    sampler = make_sampler([0], vocab_size=len(logits), seed=7, **params)
    return Counter(sampler.sample(logits).token_id for _ in range(num_draws))


def assert_drawn_from(counts: Counter[int], probs: torch.Tensor) -> None:
    """Checks that nothing impossible was drawn, and that chi-square is under about its 99.99 % quantile."""
    num_draws = counts.total()
    possible = [token_id for token_id in range(len(probs)) if probs[token_id] > 0]
    assert set(counts) <= set(possible)
    expected = {token_id: num_draws * float(probs[token_id]) for token_id in possible}
    chi_square = sum((counts[token_id] - mean) ** 2 / mean for token_id, mean in expected.items())
    degrees = len(possible) - 1
    assert chi_square <= degrees + 4 * math.sqrt(2 * degrees) + 8


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    sampler = make_sampler(temperature=0.0)
    for seed in range(20):
        logits = make_logits(seed).to(dtype)
        assert sampler.sample(logits) == SampledToken(int(logits.argmax()), None, None)


def test_greedy_takes_the_token_that_argmax_takes_of_equal_ones() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0], dtype=torch.bfloat16)
    assert make_sampler([0], vocab_size=4, temperature=0.0).sample(logits).token_id == int(logits.argmax())


def test_greedy_of_float64_sees_differences_that_float32_does_not() -> None:
    logits = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert make_sampler([0], vocab_size=2, temperature=0.0).sample(logits).token_id == 1


def test_temperature_that_is_nearly_zero_is_greedy() -> None:
    sampler = make_sampler(temperature=1e-300)
    assert sampler.sample(make_logits()).token_id == int(make_logits().argmax())


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"logit_bias": {1: 5.0}},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"min_tokens": 2, "stop_token_ids": [4]},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.5, "min_p": 0.01, "logprobs": 3},
    ],
)
def test_logits_are_not_changed(params: dict[str, Any]) -> None:
    logits = make_logits()
    make_sampler(**params).sample(logits)
    assert torch.equal(logits, make_logits())


# Each parameter


def test_repetition_penalty_is_transformers_over_prompt_and_output() -> None:
    prompt_ids = [1, 2, 3, 3]
    sampler = make_sampler(prompt_ids, temperature=0.0, repetition_penalty=3.0)
    processor = RepetitionPenaltyLogitsProcessor(3.0)
    sequence = list(prompt_ids)
    for step in range(60):  # more distinct tokens than the sampler first makes room for
        logits = make_logits(step)
        expected = int(processor(torch.tensor([sequence]), logits[None]).argmax())
        assert sampler.sample(logits).token_id == expected
        sequence.append(expected)


def test_repetition_penalty_of_an_empty_prompt() -> None:
    logits = torch.tensor([1.0, 0.9, -1.0])
    sampler = make_sampler([], vocab_size=3, temperature=0.0, repetition_penalty=1.2)
    assert [sampler.sample(logits).token_id for _ in range(3)] == [0, 1, 0]  # 1.0 | 0.83, 0.9 | 0.83, 0.75


def test_frequency_penalty_counts_each_output_token() -> None:
    logits = torch.tensor([3.0, 2.5, 0.0])
    sampler = make_sampler([0, 0, 0], vocab_size=3, temperature=0.0, frequency_penalty=1.0)
    # 3.0 2.5 | 2.0 2.5 | 2.0 1.5 | 1.0 1.5 | 1.0 0.5; the prompt's tokens do not count
    assert [sampler.sample(logits).token_id for _ in range(5)] == [0, 1, 0, 1, 0]


def test_presence_penalty_counts_an_output_token_once() -> None:
    logits = torch.tensor([3.0, 2.5, 0.0])
    sampler = make_sampler([0, 0, 0], vocab_size=3, temperature=0.0, presence_penalty=1.0)
    # 3.0 2.5 | 2.0 2.5 | 2.0 1.5 | 2.0 1.5
    assert [sampler.sample(logits).token_id for _ in range(4)] == [0, 1, 0, 0]


def test_negative_penalties_favour_repetition() -> None:
    logits = torch.tensor([3.0, 2.5])
    sampler = make_sampler([0], vocab_size=2, temperature=0.0, presence_penalty=-1.0, logit_bias={0: 0.1})
    assert sampler.sample(logits).token_id == 0
    assert sampler.sample(torch.tensor([2.5, 3.0])).token_id == 0  # 3.6 to 3.0


def test_repetition_penalty_comes_before_the_others_as_in_vllm() -> None:
    sampler = make_sampler([], vocab_size=3, temperature=0.0, repetition_penalty=2.0, frequency_penalty=1.0)
    assert sampler.sample(torch.tensor([4.0, 0.0, 0.0])).token_id == 0
    # Token 0: 4 / 2 - 1 = 1, less than 1.2; the other way round it would be (4 - 1) / 2 = 1.5.
    assert sampler.sample(torch.tensor([4.0, 1.2, 0.0])).token_id == 1


def test_logit_bias_is_added() -> None:
    logits = torch.tensor([3.0, 2.5, 0.0], dtype=torch.bfloat16)
    assert make_sampler([0], vocab_size=3, temperature=0.0, logit_bias={2: 2.9}).sample(logits).token_id == 0
    assert make_sampler([0], vocab_size=3, temperature=0.0, logit_bias={2: 3.1}).sample(logits).token_id == 2
    assert make_sampler([0], vocab_size=3, temperature=0.0, logit_bias={0: -1}).sample(logits).token_id == 1


def test_logit_bias_is_added_before_the_repetition_penalty_as_in_vllm() -> None:
    sampler = make_sampler([0], vocab_size=2, temperature=0.0, repetition_penalty=2.0, logit_bias={0: 2.0})
    # Token 0: (2 + 2) / 2 = 2, less than 2.5; the other way round it would be 2 / 2 + 2 = 3.
    assert sampler.sample(torch.tensor([2.0, 2.5])).token_id == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_holds_off_end_tokens(temperature: float) -> None:
    logits = torch.tensor([20.0, 40.0, 60.0, -20.0])
    sampler = make_sampler(
        [3],
        vocab_size=4,
        eos_token_ids=frozenset([2, 99]),
        stop_token_ids=[1],
        min_tokens=3,
        temperature=temperature,
    )
    assert [sampler.sample(logits).token_id for _ in range(5)] == [0, 0, 0, 2, 2]


def test_min_tokens_cannot_be_overcome_by_logit_bias() -> None:
    sampler = make_sampler([0], vocab_size=2, eos_token_ids=frozenset([1]), min_tokens=1, logit_bias={1: 1e9})
    assert sampler.sample(torch.tensor([0.0, 0.0])).token_id == 0


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 2}, [TemperatureLogitsWarper(2.0)]),
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_k": 1000}, []),
        ({"top_k": -1}, []),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 2.0, "min_p": 0.05, "top_k": 6, "top_p": 0.8},
            [
                TemperatureLogitsWarper(2.0),
                MinPLogitsWarper(0.05),
                TopKLogitsWarper(6),
                TopPLogitsWarper(0.8),
            ],
        ),
    ],
)
def test_draws_are_distributed_as_transformers_processors_say(
    params: dict[str, Any], processors: list[LogitsProcessor]
) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    scores = logits[None]
    for processor in processors:
        scores = processor(None, scores)
    assert_drawn_from(draws(logits, 4000, **params), scores[0].softmax(-1))


@pytest.mark.parametrize("vocab_size", [1, 2, 100, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(vocab_size: int, top_p: float) -> None:
    for seed in range(5):
        scores = make_logits(seed, vocab_size)[None].double()  # float32 sums round differently at the edge
        assert torch.equal(TopPWarper(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores))


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 1 - 1e-9])
def test_top_p_of_a_flat_distribution_keeps_its_share(top_p: float) -> None:
    kept = TopPWarper(top_p)(None, torch.zeros(1, 3000)).isfinite().sum()
    assert abs(int(kept) - max(3000 * top_p, 1)) <= 1


# Draws


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
def test_tokens_are_those_of_generate_with_the_same_seed(model: Any, params: dict[str, Any]) -> None:
    prompt_ids = [5, 6, 7]
    options = {"top_k": 0, "top_p": 1.0} | {k: v for k, v in params.items() if k != "temperature"}
    if params["temperature"]:
        options |= {"do_sample": True, "temperature": params["temperature"]}
    torch.manual_seed(11)
    expected = model.generate(torch.tensor([prompt_ids]), max_new_tokens=20, **options)[0, 3:].tolist()

    sampler = make_sampler(prompt_ids, seed=11, **params)
    sequence = list(prompt_ids)
    with torch.inference_mode():
        for _ in range(20):
            sequence.append(sampler.sample(model(torch.tensor([sequence])).logits[0, -1]).token_id)

    assert sequence[3:] == expected


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
def test_same_seed_draws_the_same_tokens_whatever_others_draw(seed: int) -> None:
    first, second, neighbour = make_sampler(seed=seed), make_sampler(seed=seed), make_sampler(seed=1)
    flat = torch.zeros(VOCAB_SIZE)
    alone = [first.sample(flat).token_id for _ in range(30)]
    beside = []
    for _ in range(30):
        neighbour.sample(flat)
        torch.rand(3)
        beside.append(second.sample(flat).token_id)
    assert alone == beside
    assert len(set(alone)) > 10


def test_without_a_seed_each_request_draws_its_own() -> None:
    torch.manual_seed(0)
    first = make_sampler()
    torch.manual_seed(0)
    second = make_sampler()
    flat = torch.zeros(VOCAB_SIZE)
    assert [first.sample(flat) for _ in range(40)] != [second.sample(flat) for _ in range(40)]


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make_sampler(seed=3).sample(make_logits())
    make_sampler().sample(make_logits())
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_that_an_edge_lets_in_or_out_do_not_change_other_draws() -> None:
    with_edge, without_edge = make_sampler(seed=5, top_k=20), make_sampler(seed=5, top_k=21)
    pairs = [(with_edge.sample(make_logits(i)), without_edge.sample(make_logits(i))) for i in range(100)]
    assert sum(one == other for one, other in pairs) > 95


def test_copy_goes_on_from_the_same_place() -> None:
    sampler = make_sampler(seed=5, repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=3, logprobs=2)
    for step in range(30):
        sampler.sample(make_logits(step))
    fork = copy.deepcopy(sampler)
    logits = [make_logits(100 + step) for step in range(30)]
    assert [fork.sample(one) for one in logits] == [sampler.sample(one) for one in logits]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_logits_may_come_from_inference_mode_or_not(inference_mode: bool) -> None:
    sampler = make_sampler(repetition_penalty=1.2, logit_bias={3: 1.0}, logprobs=1)
    for step in range(60):
        with torch.inference_mode(inference_mode if step % 2 else not inference_mode):
            logits = make_logits(step) + 0
        sampler.sample(logits)
    sampler.sample(make_logits().requires_grad_())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_logits_that_leave_no_token_to_choose_are_refused(temperature: float, value: float) -> None:
    logits = torch.full([VOCAB_SIZE], -math.inf)
    logits[3] = value
    with pytest.raises(RequestError, match="no token can be chosen"):
        make_sampler(temperature=temperature).sample(logits)


def test_every_token_suppressed_is_refused() -> None:
    sampler = make_sampler([0], vocab_size=2, stop_token_ids=[0, 1], min_tokens=1)
    with pytest.raises(RequestError, match="every token is suppressed"):
        sampler.sample(torch.zeros(2))


def test_logits_past_float32_draw_the_likeliest() -> None:
    sampler = make_sampler(temperature=0.001, logit_bias={4: 1e9}, top_p=0.9, min_p=0.1, top_k=3)
    assert sampler.sample(make_logits()).token_id == 4


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_own(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().to(dtype)  # probabilities of 0.1 to 0.4
    params: dict[str, Any] = {
        "temperature": 0.0,
        "logprobs": 2,
        "logit_bias": {0: 50},
        "repetition_penalty": 2.0,
    }
    sampled = make_sampler([3], vocab_size=4, **params).sample(logits)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert sampled.token_id == 0
    assert sampled.logprob == pytest.approx(math.log(0.1), abs=tolerance)
    expected = {3: math.log(0.4), 2: math.log(0.3), 0: math.log(0.1)}
    assert sampled.top_logprobs == pytest.approx(expected, abs=tolerance)
    assert list(sampled.top_logprobs or {}) == [3, 2, 0]


def test_logprobs_of_minus_one_are_all_tokens() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    sampled = make_sampler([0], vocab_size=3, temperature=0.0, logprobs=-1).sample(logits)
    expected = logits.log_softmax(-1).tolist()
    assert sampled.top_logprobs == {1: expected[1], 2: expected[2], 0: expected[0]}
    assert list(sampled.top_logprobs or {}) == [1, 2, 0]


def test_logprobs_of_zero_is_the_chosen_tokens_only() -> None:
    sampled = make_sampler([0], vocab_size=2, temperature=0.0, logprobs=0).sample(torch.tensor([0.0, 0.0]))
    assert sampled.logprob == pytest.approx(-math.log(2))
    assert sampled.top_logprobs == {sampled.token_id: sampled.logprob}


def test_logprobs_of_the_whole_vocabulary() -> None:
    sampler = make_sampler([0], vocab_size=3, temperature=0.0, logprobs=3)
    sampled = sampler.sample(torch.tensor([0.0, 2.0, 1.0]))
    assert list(sampled.top_logprobs or {}) == [1, 2, 0]


# Out of the vocabulary


@pytest.mark.parametrize(
    ("prompt_ids", "params", "number"),
    [
        ([1], {"logit_bias": {50: 1.0}}, "50"),
        ([1], {"logit_bias": {-1: 1.0}}, "-1"),
        ([1], {"stop_token_ids": [3, 51]}, "51"),
        ([1], {"logprobs": 52}, "52"),
        ([1, 53], {}, "53"),
        ([1, 2**80], {"repetition_penalty": 2.0}, str(2**80)),
        ([-2], {}, "-2"),
    ],
)
def test_numbers_out_of_range_are_refused(prompt_ids: list[int], params: dict[str, Any], number: str) -> None:
    with pytest.raises(RequestError, match=rf"{number}\b.*\b{VOCAB_SIZE} tokens"):
        make_sampler(prompt_ids, **params)
