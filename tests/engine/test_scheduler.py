"""Which sequences take part in a sweep, and with how many tokens: pure functions of what is running."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from hermes_async.engine.request import Request
from hermes_async.engine.scheduler import Scheduler


@dataclass(eq=False)
class FakeRequest:
    pending: list[int] = field(default_factory=list)


def request(num_pending: int) -> Request:
    return cast(Request, FakeRequest(list(range(num_pending))))


def shares(scheduler: Scheduler) -> list[tuple[Any, int, bool]]:
    return [(item.request, len(item.token_ids), item.samples) for item in scheduler.schedule()]


def test_nothing_to_do() -> None:
    assert Scheduler(8).schedule() == []


def test_decodes_come_before_prompts_and_prompts_in_order() -> None:
    scheduler = Scheduler(100)
    long, decode, short = request(10), request(1), request(5)
    for item in (long, decode, short):
        scheduler.add(item)
    assert shares(scheduler) == [(decode, 1, True), (long, 10, True), (short, 5, True)]
    assert scheduler.running == (long, decode, short)


def test_a_long_prompt_goes_in_chunks_and_samples_with_the_last() -> None:
    scheduler = Scheduler(8)
    long = request(20)
    scheduler.add(long)
    cast(Any, long).pending = list(range(20))
    seen: list[int] = []
    for expected in ((8, False), (8, False), (4, True)):
        (item,) = scheduler.schedule()
        assert (len(item.token_ids), item.samples) == expected
        seen += item.token_ids
        cast(Any, long).pending = cast(Any, long).pending[len(item.token_ids) :]
    assert seen == list(range(20))


def test_a_prompt_fills_what_decodes_leave() -> None:
    scheduler = Scheduler(4)
    prompt, one, two = request(9), request(1), request(1)
    for item in (prompt, one, two):
        scheduler.add(item)
    assert shares(scheduler) == [(one, 1, True), (two, 1, True), (prompt, 2, False)]


def test_a_removed_request_is_out_and_a_second_removal_does_nothing() -> None:
    scheduler = Scheduler(8)
    item = request(1)
    scheduler.add(item)
    scheduler.remove(item)
    scheduler.remove(item)
    assert scheduler.running == ()
    assert scheduler.schedule() == []


@given(st.integers(1, 40), st.lists(st.integers(1, 60), max_size=40))
def test_sweeps_keep_their_size_and_end(max_tokens: int, lengths: list[int]) -> None:
    scheduler = Scheduler(max_tokens)
    requests = [request(length) for length in lengths[:max_tokens]]
    for item in requests:
        scheduler.add(item)
    left = sum(lengths[:max_tokens])
    while scheduler.running:
        sweep = scheduler.schedule()
        num_tokens = sum(len(item.token_ids) for item in sweep)
        assert 0 < num_tokens <= max_tokens
        assert num_tokens == min(max_tokens, left)  # no room is wasted
        assert len({id(item.request) for item in sweep}) == len(sweep)
        for item in sweep:
            pending = cast(Any, item.request).pending
            assert item.token_ids == pending[: len(item.token_ids)]
            assert item.samples == (len(item.token_ids) == len(pending))
            cast(Any, item.request).pending = pending[len(item.token_ids) :]
            if item.samples:
                scheduler.remove(item.request)
        left -= num_tokens
    assert left == 0
