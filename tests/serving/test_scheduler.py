"""Which sequences take part in a sweep, and with how many tokens: decided by what runs, and by what sweeps take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, cast

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hermes_async import Chunk, SamplingParams
from hermes_async.modeling.kv_cache import BLOCK_TOKENS, KVLayout, KVPool, KVShape, SequenceKV
from hermes_async.modeling.turns import TurnTraits
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.serving.jobs import GenerationJob
from hermes_async.serving.kv_blocks import BlockReservation, KVBlocks
from hermes_async.serving.request import PreparedPrompt, Request
from hermes_async.serving.scheduler import Scheduler
from hermes_async.serving.speculation import AcceptanceRates, PromptLookup
from hermes_async.serving.sweep_times import SweepTimes

LAYOUT = KVLayout({0: KVShape(1, 1, 1, 1)}, torch.float32)
NEW = 7
"""What every request's next token is."""


class Sweeps:
    """A scheduler, the requests it schedules, and what a sweep does to them; no prompt has anything in common, unless
    it is given.

    Args:
        max_tokens: Of a sweep with as many outputs as there may be; with each one less there may be `more_tokens`.
        compute_seconds: A token's.
        read_seconds: A sweep's; None for neither known.
        options: Of the scheduler.
    """

    def __init__(
        self,
        max_tokens: int = 100,
        *,
        max_sequences: int = 64,
        max_outputs: int = 100,
        more_tokens: int = 0,
        compute_seconds: float = 1.0,
        read_seconds: float | None = None,
        **options: Any,
    ) -> None:
        times = SweepTimes()
        if read_seconds is not None:
            times.record(1, compute_seconds)
            times.record(128, 128 * compute_seconds)
            times.record_read(read_seconds)
        self.blocks = KVBlocks(KVPool(LAYOUT, 1024 * LAYOUT.block_bytes), MemoryGovernor(2048 * LAYOUT.block_bytes))
        most_tokens = [max_tokens + more_tokens * less for less in reversed(range(max_outputs))]
        self.scheduler = Scheduler(most_tokens, max_sequences, times, **options)
        self.requests: list[Request] = []

    def add(
        self, prompt: int | list[int], *, drafts: bool = False, max_tokens: int = 50, **prepared_as: Any
    ) -> Request:
        """Admits a request; of a number, a prompt of so many tokens that no other has."""
        number = len(self.requests) + 1
        token_ids = [1000 * number + idx for idx in range(prompt)] if isinstance(prompt, int) else prompt
        prepared = PreparedPrompt(
            token_ids,
            len(token_ids) + max_tokens,
            cast(Any, None),
            None,
            PromptLookup(token_ids) if drafts else None,
            AcceptanceRates(),
            **prepared_as,
        )
        request = Request(str(number), prepared, SamplingParams(max_tokens=max_tokens), 2, 0.0)
        self.requests.append(request)
        request.reservation = self.blocks.reserve(request.request_id, token_ids, prepared.capacity)
        assert request.reservation is not None
        self.scheduler.add(request)
        return request

    def add_decoding(self, **kwargs: Any) -> Request:
        request = self.add(3, **kwargs)
        kv_of(request).length = 2
        return request

    def remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        if request.reservation is not None:
            self.blocks.release(request.reservation)
            request.reservation = None

    def run(self) -> list[GenerationJob]:
        """Schedules a sweep and does it; no draft is right."""
        sweep = self.scheduler.schedule()
        for job in sweep:
            request = job.request
            assert request.reservation is not None
            if job.samples:
                request.token_ids.append(NEW)
                if request.prepared.lookup is not None:
                    request.prepared.lookup.extend([NEW])
            kv_of(request).length = job.past + len(job.token_ids) - job.num_drafted
            self.blocks.commit(request.reservation, request.token_ids)
        return sweep

    def shares(self) -> list[tuple[Request, int, bool]]:
        """Who takes part in the next sweep, with how many tokens, and whether a token can be chosen after them."""
        return [(job.request, len(job.token_ids), job.samples) for job in self.scheduler.schedule()]

    def close(self) -> None:
        for request in self.requests:
            self.remove(request)
            request.send.close()
            request.receive.close()
        self.blocks.close()


@pytest.fixture
def sweeps() -> Iterator[Sweeps]:
    with closing(Sweeps()) as sweeps:
        yield sweeps


def kv_of(request: Request) -> SequenceKV:
    assert isinstance(request.reservation, BlockReservation)
    return request.reservation.kv


def pause(request: Request) -> None:
    for _ in range(request.max_buffered):
        request.send.send_nowait(Chunk("", ()))


# Decodes and prompts


def test_nothing_to_do(sweeps: Sweeps) -> None:
    assert sweeps.scheduler.schedule() == []


def test_decodes_come_before_prompts_and_prompts_in_order(sweeps: Sweeps) -> None:
    long, decode, short = sweeps.add(10), sweeps.add_decoding(), sweeps.add(5)
    assert sweeps.shares() == [(decode, 1, True), (long, 10, True), (short, 5, True)]
    assert sweeps.scheduler.running == (long, decode, short)


def test_a_long_prompt_goes_in_chunks_and_samples_with_the_last() -> None:
    with closing(Sweeps(8)) as sweeps:
        request = sweeps.add(20)
        seen: list[int] = []
        for past, num_tokens, samples in ((0, 8, False), (8, 8, False), (16, 4, True), (20, 1, True)):
            (job,) = sweeps.run()
            assert (job.past, len(job.token_ids), job.samples) == (past, num_tokens, samples)
            assert job.num_outputs == samples
            seen += job.token_ids
        assert seen == [*request.prepared.token_ids, NEW]


def test_a_prompt_fills_what_decodes_leave() -> None:
    with closing(Sweeps(4)) as sweeps:
        prompt, one, two = sweeps.add(9), sweeps.add_decoding(), sweeps.add_decoding()
        assert sweeps.shares() == [(one, 1, True), (two, 1, True), (prompt, 2, False)]


def test_more_decodes_than_a_sweep_has_tokens() -> None:
    with closing(Sweeps(2)) as sweeps:
        first, second, _ = (sweeps.add_decoding() for _ in range(3))
        sweeps.add(9)
        assert sweeps.shares() == [(first, 1, True), (second, 1, True)]


def test_a_removed_request_is_out_and_a_second_removal_does_nothing(sweeps: Sweeps) -> None:
    request = sweeps.add(1)
    sweeps.scheduler.remove(request)
    sweeps.scheduler.remove(request)
    assert sweeps.scheduler.running == ()
    assert sweeps.scheduler.schedule() == []


# Chunks beside decodes


def test_with_nobody_decoding_a_prompt_gets_the_whole_sweep() -> None:
    with closing(Sweeps(read_seconds=0.0)) as sweeps:
        prompt = sweeps.add(500)
        assert sweeps.shares() == [(prompt, 100, False)]


def test_beside_decodes_a_chunk_is_what_can_be_computed_while_a_sweep_is_read() -> None:
    with closing(Sweeps(read_seconds=40.0)) as sweeps:
        decodes, prompt = [sweeps.add_decoding() for _ in range(3)], sweeps.add(500)
        assert sweeps.shares() == [*((decode, 1, True) for decode in decodes), (prompt, 37, False)]


def test_where_nothing_is_read_a_sweep_with_a_chunk_takes_at_most_twice_its_decodes() -> None:
    with closing(Sweeps(read_seconds=0.0)) as sweeps:
        decodes, prompt = [sweeps.add_decoding() for _ in range(20)], sweeps.add(500)
        assert sweeps.shares() == [*((decode, 1, True) for decode in decodes), (prompt, 20, False)]


def test_where_nothing_is_read_each_prompt_gets_as_much_as_a_decode() -> None:
    with closing(Sweeps(read_seconds=0.0)) as sweeps:
        decodes = [sweeps.add_decoding() for _ in range(5)]
        prompts = [sweeps.add(10) for _ in range(30)]
        chunks = [(prompt, 10, True) for prompt in prompts[:3]]
        assert sweeps.shares() == [*((decode, 1, True) for decode in decodes), *chunks]


def test_a_chunk_is_at_least_a_block() -> None:
    """A prompt must come to its end."""
    with closing(Sweeps(read_seconds=0.0)) as sweeps:
        decode, prompt = sweeps.add_decoding(), sweeps.add(500)
        assert sweeps.shares() == [(decode, 1, True), (prompt, BLOCK_TOKENS, False)]


def test_several_prompts_share_what_is_left() -> None:
    with closing(Sweeps(read_seconds=40.0)) as sweeps:
        decode, first, second, _ = sweeps.add_decoding(), sweeps.add(30), sweeps.add(30), sweeps.add(30)
        assert sweeps.shares() == [(decode, 1, True), (first, 30, True), (second, 9, False)]


def test_before_anything_was_measured_a_chunk_fills_the_sweep(sweeps: Sweeps) -> None:
    decode, prompt = sweeps.add_decoding(), sweeps.add(500)
    assert sweeps.shares() == [(decode, 1, True), (prompt, 99, False)]


# Who takes part


def test_of_more_than_max_sequences_the_first_to_be_admitted_take_part() -> None:
    with closing(Sweeps(max_sequences=2)) as sweeps:
        prompt, decode, late = sweeps.add(5), sweeps.add_decoding(), sweeps.add_decoding()
        assert sweeps.shares() == [(decode, 1, True), (prompt, 5, True)]
        sweeps.remove(prompt)
        assert sweeps.shares() == [(decode, 1, True), (late, 1, True)]


def test_a_paused_request_is_left_out_and_its_place_is_another_s() -> None:
    with closing(Sweeps(max_sequences=2)) as sweeps:
        first, second, third = (sweeps.add_decoding() for _ in range(3))
        pause(first)
        assert sweeps.scheduler.num_active == 2
        assert sweeps.shares() == [(second, 1, True), (third, 1, True)]
        first.receive.receive_nowait()
        assert sweeps.scheduler.num_active == 3
        assert sweeps.shares() == [(first, 1, True), (second, 1, True)]


def test_with_everybody_paused_there_is_nothing_to_do(sweeps: Sweeps) -> None:
    pause(sweeps.add_decoding())
    assert sweeps.scheduler.schedule() == []


# Prompts with a common beginning


def common(num_blocks: int, *rest: int) -> list[int]:
    return [*range(num_blocks * BLOCK_TOKENS), *rest]


def test_a_follower_starts_behind_what_another_computes_in_the_same_sweep(sweeps: Sweeps) -> None:
    sweeps.add(common(2, 101, 102))
    sweeps.add(common(2, 103))
    leader, follower = sweeps.scheduler.schedule()
    assert (leader.past, len(leader.token_ids), leader.shares_blocks) == (0, 34, True)
    assert (follower.past, follower.token_ids, follower.samples, follower.shares_blocks) == (32, [103], True, False)


def test_a_follower_of_a_follower(sweeps: Sweeps) -> None:
    sweeps.add(common(1, 101))
    sweeps.add(common(3, 102))
    sweeps.add(common(3, 103))
    first, second, third = sweeps.scheduler.schedule()
    assert [job.past for job in (first, second, third)] == [0, 16, 48]
    assert [job.shares_blocks for job in (first, second, third)] == [True, True, False]


def test_what_does_not_come_into_this_sweep_is_not_waited_for() -> None:
    """The leader's chunk ends the sweep; the follower starts in the next one, behind what is there by then."""
    with closing(Sweeps(40)) as sweeps:
        leader, follower = sweeps.add(common(4, 101)), sweeps.add(common(4, 102))
        (chunk,) = sweeps.run()
        assert (chunk.request, len(chunk.token_ids), chunk.shares_blocks) == (leader, 40, False)
        assert kv_of(follower).length == 0
        rest, behind = sweeps.run()
        assert (rest.past, len(rest.token_ids), rest.shares_blocks) == (40, 25, True)
        assert (behind.past, behind.token_ids) == (64, [102])
        assert kv_of(follower).length == 65


def test_a_follower_computes_what_its_leader_left(sweeps: Sweeps) -> None:
    leader, follower = sweeps.add(common(2, 101)), sweeps.add(common(2, 102))
    sweeps.remove(leader)
    (job,) = sweeps.scheduler.schedule()
    assert (job.request, job.past, len(job.token_ids)) == (follower, 0, 33)


def test_a_follower_does_not_wait_for_one_that_is_left_out() -> None:
    with closing(Sweeps(max_sequences=1)) as sweeps:
        leader, follower = sweeps.add(common(2, 101)), sweeps.add(common(2, 102))
        pause(leader)
        (job,) = sweeps.run()
        assert (job.request, job.past, len(job.token_ids)) == (follower, 0, 33)
        leader.receive.receive_nowait()
        (job,) = sweeps.scheduler.schedule()
        assert (job.request, job.past, job.token_ids) == (leader, 32, [101])


def test_the_last_token_is_computed_even_where_another_computes_it_too(sweeps: Sweeps) -> None:
    sweeps.add(common(2, 101))
    sweeps.add(common(2))
    leader, follower = sweeps.scheduler.schedule()
    assert (follower.past, len(follower.token_ids), follower.samples) == (16, 16, True)
    assert leader.shares_blocks


# Drafts


REPEATING = [11, 12, 13, 14, 11, 12, 13, 14, 11]


def add_drafting(sweeps: Sweeps, **kwargs: Any) -> Request:
    request = sweeps.add(list(REPEATING), drafts=True, **kwargs)
    kv_of(request).length = len(REPEATING) - 1
    return request


def test_drafts_come_behind_the_last_token_where_they_cost_no_time() -> None:
    """Reading takes as long as computing five tokens."""
    with closing(Sweeps(read_seconds=5.0)) as sweeps:
        add_drafting(sweeps)
        (job,) = sweeps.scheduler.schedule()
        assert job.token_ids == [11, 12, 13, 14, 11]
        assert (job.num_drafted, job.match_length, job.num_outputs) == (4, 5, 5)


def test_where_every_token_costs_its_time_nothing_is_drafted() -> None:
    with closing(Sweeps(read_seconds=0.0)) as sweeps:
        request = add_drafting(sweeps)
        before = request.prepared.acceptance.rate(5)
        (job,) = sweeps.scheduler.schedule()
        assert (job.token_ids, job.num_drafted) == ([11], 0)
        assert request.prepared.acceptance.rate(5) > before  # by and by it is tried again


def test_before_anything_was_measured_nothing_is_drafted(sweeps: Sweeps) -> None:
    add_drafting(sweeps)
    (job,) = sweeps.scheduler.schedule()
    assert job.token_ids == [11]


@pytest.mark.parametrize(("max_tokens", "max_outputs"), [(6, 100), (100, 6)])
def test_drafts_get_the_room_that_is_left(max_tokens: int, max_outputs: int) -> None:
    with closing(Sweeps(max_tokens, max_outputs=max_outputs, read_seconds=1000.0)) as sweeps:
        for _ in range(3):
            add_drafting(sweeps)
        sweep = sweeps.scheduler.schedule()
        assert sum(len(job.token_ids) for job in sweep) == 6
        assert sum(job.num_outputs for job in sweep) == 6
        assert sum(job.num_drafted for job in sweep) == 3


def test_with_few_outputs_there_is_room_for_more_of_a_prompt() -> None:
    with closing(Sweeps(16, max_outputs=16, more_tokens=4)) as sweeps:
        alone = sweeps.add(100)
        assert sweeps.shares() == [(alone, 76, False)]
        sweeps.run()
        assert sweeps.shares() == [(alone, 24, True)]
    with closing(Sweeps(16, max_outputs=16, more_tokens=4)) as sweeps:
        decoding = [sweeps.add_decoding() for _ in range(5)]
        ending, going_on, waiting = sweeps.add(7), sweeps.add(100), sweeps.add(30)
        # With six outputs there is room for 56 tokens, and with seven for 52.
        shares = [(request, 1, True) for request in decoding]
        assert sweeps.shares() == [*shares, (ending, 7, True), (going_on, 40, False)]
        sweeps.remove(going_on)
        assert sweeps.shares() == [*shares, (ending, 7, True), (waiting, 30, True)]


def test_drafts_take_room_from_both_tokens_and_outputs() -> None:
    with closing(Sweeps(16, max_outputs=8, more_tokens=2, read_seconds=1000.0)) as sweeps:
        drafting, prompt = add_drafting(sweeps), sweeps.add(20)
        # 21 tokens with two outputs; with three more of both there would be 24, and room for 22.
        assert sweeps.shares() == [(drafting, 3, True), (prompt, 20, True)]


def test_a_prompt_s_chunk_comes_before_drafts() -> None:
    with closing(Sweeps(10, read_seconds=1000.0)) as sweeps:
        drafting, prompt = add_drafting(sweeps), sweeps.add(50, drafts=True)
        assert sweeps.shares() == [(drafting, 1, True), (prompt, 9, False)]


def test_with_the_last_chunk_of_its_prompt_a_request_drafts_nothing() -> None:
    with closing(Sweeps(read_seconds=1000.0)) as sweeps:
        request = sweeps.add(list(REPEATING), drafts=True)
        assert sweeps.shares() == [(request, len(REPEATING), True)]


@pytest.mark.parametrize(("max_tokens", "num_drafted"), [(1, 0), (2, 1), (4, 3)])
def test_no_more_is_drafted_than_a_request_may_still_generate(max_tokens: int, num_drafted: int) -> None:
    with closing(Sweeps(read_seconds=1000.0)) as sweeps:
        add_drafting(sweeps, max_tokens=max_tokens)
        (job,) = sweeps.scheduler.schedule()
        assert job.num_drafted == num_drafted


def test_rejected_drafts_are_computed_again(sweeps: Sweeps) -> None:
    with closing(Sweeps(read_seconds=5.0)) as sweeps:
        request = add_drafting(sweeps)
        sweeps.run()
        assert kv_of(request).length == len(REPEATING)
        (job,) = sweeps.scheduler.schedule()
        assert (job.past, job.token_ids) == (len(REPEATING), [NEW])


# Whatever comes, pauses and goes


class Scheduling(RuleBasedStateMachine):
    """Prompts with beginnings in common come, pause and go between sweeps of any size."""

    @initialize(
        max_tokens=st.integers(1, 60),
        max_sequences=st.integers(1, 6),
        more_outputs=st.integers(0, 10),
        more_tokens=st.sampled_from([0, 1, 7]),
        read_seconds=st.sampled_from([None, 0.0, 5.0, 30.0]),
    )
    def open(
        self, max_tokens: int, max_sequences: int, more_outputs: int, more_tokens: int, read_seconds: float | None
    ) -> None:
        max_sequences = min(max_sequences, max_tokens)  # as the planner has it
        max_outputs = min(max_tokens, max_sequences + more_outputs)
        self.sweeps = Sweeps(
            max_tokens,
            max_sequences=max_sequences,
            max_outputs=max_outputs,
            more_tokens=more_tokens,
            read_seconds=read_seconds,
        )

    def teardown(self) -> None:
        self.sweeps.close()
        assert self.sweeps.blocks.kv_bytes == 0

    @property
    def running(self) -> tuple[Request, ...]:
        return self.sweeps.scheduler.running

    @precondition(lambda self: len(self.running) < 12)
    @rule(letters=st.lists(st.integers(1, 2), max_size=3), rest=st.integers(1, 20), drafts=st.booleans())
    def add(self, letters: list[int], rest: int, drafts: bool) -> None:
        prompt = [letter for letter in letters for _ in range(BLOCK_TOKENS)] + [3] * rest
        self.sweeps.add(prompt, drafts=drafts)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.sweeps.remove(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def pause_or_resume(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        if request.paused:
            request.receive.receive_nowait()
        else:
            request.send.send_nowait(Chunk("", ()))

    @rule()
    def sweep(self) -> None:
        scheduler = self.sweeps.scheduler
        lengths = {request: (kv_of(request).length, list(request.token_ids)) for request in self.running}
        sweep = self.sweeps.run()
        runnable = [request for request in self.running if not request.paused][: scheduler.max_sequences]
        assert len({job.request for job in sweep}) == len(sweep)
        assert {job.request for job in sweep} <= set(runnable)
        assert bool(sweep) == bool(runnable)
        num_outputs = sum(max(1, job.num_outputs) for job in sweep)
        assert num_outputs <= len(scheduler.tokens_by_outputs)
        if sweep:
            assert sum(len(job.token_ids) for job in sweep) <= scheduler.tokens_by_outputs[num_outputs - 1]
        computed: set[int] = set()
        for job in sweep:
            length, token_ids = lengths[job.request]
            end = job.past + len(job.token_ids) - job.num_drafted
            assert job.token_ids[: end - job.past] == token_ids[job.past : end]
            assert job.past < end <= len(token_ids)
            assert job.samples == (end == len(token_ids))
            assert job.num_drafted == 0 or job.samples
            # What lies between was there, or others of this sweep have computed it.
            assert job.request.reservation is not None
            for idx in range(length // BLOCK_TOKENS, job.past // BLOCK_TOKENS):
                assert job.request.reservation.shared[idx].idx in computed | self.computed_before
            computed |= set(kv_of(job.request).blocks[job.past // BLOCK_TOKENS : end // BLOCK_TOKENS])
        decoding = [request for request in runnable if len(lengths[request][1]) - lengths[request][0] == 1]
        assert {job.request for job in sweep} >= set(decoding)

    @invariant()
    def remember_what_is_computed(self) -> None:
        self.computed_before = {
            block.idx for request in self.running if request.reservation for block in request.reservation.shared
            if block.computed
        }  # fmt: skip


Scheduling.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
test_scheduling = Scheduling.TestCase


def test_packed_jobs_turns_and_images_that_do_not_fit_together_take_sweeps_by_turns() -> None:
    """The packed ones take part together, and every request takes part at some time."""
    few = 3

    def fits(jobs: Sequence[GenerationJob]) -> bool:
        return len(jobs) <= few and sum(bool(job.model_inputs) for job in jobs) <= 1

    images = {"in_turns": True, "model_inputs": {"pixel_values": torch.zeros(1)}}
    with closing(Sweeps(traits=TurnTraits(chunks=True), fits=fits)) as sweeps:
        packed = [sweeps.add_decoding(), sweeps.add_decoding()]
        turns = [sweeps.add_decoding(in_turns=True), sweeps.add_decoding(in_turns=True)]
        prompts = [sweeps.add(5, **images), sweeps.add(5, **images)]
        seen: list[set[Request]] = []
        for _ in range(30):
            seen.append({job.request for job in sweeps.run()})
            assert 0 < len(seen[-1]) <= few
            assert len(seen[-1].intersection(packed)) in (0, len(packed))
        for request in (*packed, *turns, *prompts):
            assert sum(request in together for together in seen) >= 3


def test_a_prompt_with_images_is_not_divided() -> None:
    images = {"in_turns": True, "model_inputs": {"pixel_values": torch.zeros(1)}}
    with closing(Sweeps(20, traits=TurnTraits(chunks=True), fits=lambda jobs: True)) as sweeps:
        text, image = sweeps.add(10), sweeps.add(15, **images)
        assert sweeps.shares() == [(text, 10, True)]
        sweeps.run()
        assert sweeps.shares() == [(text, 1, True), (image, 15, True)]
