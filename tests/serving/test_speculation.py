"""Drafts are what followed before; rates follow the text; verification takes what pays, as brute force finds it."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_async.serving.speculation import AcceptanceRates, Draft, PromptLookup, allocate

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def longest_match(tokens: list[int], max_length: int) -> tuple[int, int] | None:
    """Its length, and the position behind its latest earlier occurrence."""
    for length in range(min(max_length, len(tokens)), 0, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return length, end
    return None


def test_nothing_matches() -> None:
    for tokens in ([], [1], [1, 2, 3]):
        assert PromptLookup(tokens).propose(4) is None


def test_what_followed_the_match_is_drafted() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert lookup.propose(3) == Draft([4, 5, 6], match_length=2)
    assert lookup.propose(1) == Draft([4], match_length=2)
    assert lookup.propose(0) is None
    assert lookup.propose(-1) is None


def test_a_longer_match_wins_over_a_later_one_and_the_latest_among_equals() -> None:
    assert PromptLookup([1, 2, 7, 2, 8, 1, 2]).propose(1) == Draft([7], match_length=2)
    assert PromptLookup([1, 2, 7, 1, 2, 8, 1, 2]).propose(1) == Draft([8], match_length=2)


def test_a_repeating_text_is_drafted_beyond_its_end() -> None:
    assert PromptLookup([0, 1, 2, 3, 1, 2, 3]).propose(7) == Draft([1, 2, 3, 1, 2, 3, 1], match_length=3)
    assert PromptLookup([5, 5]).propose(4) == Draft([5, 5, 5, 5], match_length=1)


@given(TEXTS, st.integers(-1, 20))
def test_drafts_continue_the_latest_of_the_longest_matches(tokens: list[int], most: int) -> None:
    draft = PromptLookup(tokens).propose(most)
    match = longest_match(tokens, max_length=5)
    if most < 1 or match is None:
        assert draft is None
        return
    assert draft is not None
    length, start = match
    assert draft.match_length == length
    drafted = tokens + draft.token_ids
    assert len(draft.token_ids) == most
    assert draft.token_ids == drafted[start : start + most]


@given(TEXTS, st.lists(TEXTS, max_size=5))
def test_it_makes_no_difference_when_tokens_come(prompt: list[int], outputs: list[list[int]]) -> None:
    lookup = PromptLookup(prompt)
    tokens = list(prompt)
    for output in outputs:
        lookup.extend(output)
        tokens += output
        assert lookup.propose(8) == PromptLookup(tokens).propose(8)


def test_rates_begin_at_a_half_and_follow_laplace() -> None:
    rates = AcceptanceRates()
    assert rates.rate(3) == 0.5
    rates.record(3, drafted=8, accepted=0)
    assert rates.rate(3) == pytest.approx(1 / 3)
    assert rates.rate(2) == 0.5


def test_tokens_behind_a_wrong_one_say_nothing() -> None:
    short, long, whole = AcceptanceRates(), AcceptanceRates(), AcceptanceRates()
    short.record(1, drafted=3, accepted=2)
    long.record(1, drafted=30, accepted=2)
    whole.record(1, drafted=2, accepted=2)
    assert short.rate(1) == long.rate(1) < whole.rate(1)
    before = whole.rate(1)
    whole.record(1, drafted=0, accepted=0)
    assert whole.rate(1) == before


EVENTS = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(0, 40)), max_size=80)


@given(EVENTS, st.booleans())
def test_rates_are_always_between_zero_and_one(events: list[tuple[int, int, int]], with_prior: bool) -> None:
    prior = AcceptanceRates() if with_prior else None
    rates = AcceptanceRates(prior)
    for match_length, drafted, accepted in events:
        if drafted:
            rates.record(match_length, drafted, min(accepted, drafted))
        else:
            rates.passed(match_length)
        assert 0 < rates.rate(match_length) < 1


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_the_rate_of_a_steady_text_is_learned(chance: float) -> None:
    text = random.Random(0)
    rates = AcceptanceRates()
    seen = []
    for _ in range(500):
        accepted = 0
        while accepted < 4 and text.random() < chance:
            accepted += 1
        rates.record(2, 4, accepted)
        seen.append(rates.rate(2))
    assert sum(seen[20:]) / len(seen[20:]) == pytest.approx(chance, abs=0.06)


def test_a_change_of_the_text_is_learned_within_a_dozen_drafts() -> None:
    rates = AcceptanceRates(AcceptanceRates())
    for _ in range(100):
        rates.record(5, 16, 16)
    assert rates.rate(5) > 0.9
    for _ in range(12):
        rates.record(5, 16, 0)
    assert rates.rate(5) < 0.5
    rates.record(5, 16, 16)
    assert rates.rate(5) > 0.6


def test_a_new_request_begins_with_what_others_saw() -> None:
    everyone = AcceptanceRates()
    one, other = AcceptanceRates(everyone), AcceptanceRates(everyone)
    for _ in range(20):
        one.record(4, 8, 8)
    assert other.rate(4) == everyone.rate(4) > 0.9
    for _ in range(3):
        other.record(4, 8, 0)
    assert other.rate(4) < 0.5 < one.rate(4)


def verify(rates: AcceptanceRates, pays_from: float, chances: int, accepted: int) -> int:
    """Verifies a token wherever that pays; how often it did."""
    tries = 0
    for _ in range(chances):
        if rates.rate(1) >= pays_from:
            rates.record(1, 1, accepted)
            tries += 1
        else:
            rates.passed(1)
    return tries


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("pays_from", [0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9])
def test_hopeless_drafts_take_little_time_and_are_never_given_up(pays_from: float, num_requests: int) -> None:
    everyone = AcceptanceRates()
    requests = [AcceptanceRates(everyone) for _ in range(num_requests)]
    tries = [0] * 4
    for quarter in range(4):
        for _ in range(500):
            tries[quarter] += sum(verify(rates, pays_from, 1, accepted=0) for rates in requests)
    assert all(tries)
    assert pays_from * sum(tries) / (2000 * num_requests) < 1 / 50


@pytest.mark.parametrize("pays_from", [0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
def test_drafting_recovers_when_the_text_becomes_predictable(pays_from: float) -> None:
    rates = AcceptanceRates(AcceptanceRates())
    verify(rates, pays_from, 2000, accepted=0)
    verify(rates, pays_from, round(128 * pays_from / (1 - pays_from)) + 16, accepted=1)
    assert verify(rates, pays_from, 20, accepted=1) == 20


def read_bound(num_tokens: int) -> float:
    return 5.0


def compute_bound(num_tokens: int) -> float:
    return 1.0 + 0.2 * num_tokens


def mixed(num_tokens: int) -> float:
    return max(2.0, 0.4 * num_tokens)


def stepwise(num_tokens: int) -> float:
    return 1.0 + -(-num_tokens // 4)


MACHINES = (read_bound, compute_bound, mixed, stepwise)


def outputs_per_second(
    counts: tuple[int, ...] | list[int], rates: list[float], num_tokens: int, machine: Callable[[int], float]
) -> float:
    drafted = sum(rate**k for rate, count in zip(rates, counts, strict=True) for k in range(1, count + 1))
    return (len(rates) + drafted) / machine(num_tokens + sum(counts))


@given(
    st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(0, 10),
    st.sampled_from(MACHINES),
)
def test_no_other_allocation_gives_more_outputs_a_second(
    drafts: list[tuple[float, int]], prompt_tokens: int, most: int, machine: Callable[[int], float]
) -> None:
    rates, available = [rate for rate, _ in drafts], [count for _, count in drafts]
    num_tokens = len(rates) + prompt_tokens
    counts = allocate(rates, available, num_tokens=num_tokens, num_outputs=len(rates), most=most, sweep_seconds=machine)
    assert all(0 <= count <= limit for count, limit in zip(counts, available, strict=True))
    assert sum(counts) <= most
    possible = [choice for choice in product(*(range(limit + 1) for limit in available)) if sum(choice) <= most]
    best = max(outputs_per_second(choice, rates, num_tokens, machine) for choice in possible)
    assert outputs_per_second(counts, rates, num_tokens, machine) == pytest.approx(best)
    if machine is read_bound:
        assert sum(counts) == min(most, sum(available))


def test_drafts_are_free_until_computing_takes_as_long_as_reading() -> None:
    counts = allocate([0.3], [10], num_tokens=1, num_outputs=1, most=8, sweep_seconds=mixed)
    assert counts == [4]  # five tokens in two seconds


def test_what_is_likelier_comes_first() -> None:
    assert allocate([0.9, 0.5], [8, 8], num_tokens=2, num_outputs=2, most=7, sweep_seconds=read_bound) == [6, 1]
    assert allocate([0.5, 0.5], [8, 8], num_tokens=2, num_outputs=2, most=4, sweep_seconds=read_bound) == [2, 2]


def test_a_step_is_taken_where_what_lies_behind_it_pays() -> None:
    counts = allocate([0.95], [8], num_tokens=4, num_outputs=1, most=8, sweep_seconds=stepwise)
    assert counts == [8]  # the first token alone would cost more than it gives


@pytest.mark.parametrize("known", [0, 4, 6])
def test_nothing_is_drafted_into_the_unknown(known: int) -> None:
    def sweep_seconds(num_tokens: int) -> float | None:
        return 1.0 if num_tokens <= known else None

    counts = allocate([0.9], [8], num_tokens=4, num_outputs=1, most=8, sweep_seconds=sweep_seconds)
    assert counts == [max(0, known - 4)]


def test_time_that_is_too_short_to_measure_is_no_error() -> None:
    assert allocate([0.1], [3], num_tokens=1, num_outputs=1, most=8, sweep_seconds=lambda num_tokens: 0.0) == [3]


def test_nobody_drafts() -> None:
    assert allocate([], [], num_tokens=1, num_outputs=1, most=8, sweep_seconds=read_bound) == []
    assert allocate([0.9], [0], num_tokens=1, num_outputs=1, most=8, sweep_seconds=read_bound) == [0]
