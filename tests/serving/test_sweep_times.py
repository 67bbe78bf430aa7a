"""What sweeps are expected to take, from what they took: examples, properties, and a machine that changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_async.serving.sweep_times import SweepTimes

Records = list[tuple[int, float]]

SECONDS = st.floats(0, 1e3, allow_subnormal=False)
RECORDS: st.SearchStrategy[Records] = st.lists(st.tuples(st.integers(1, 300), SECONDS), max_size=120)


def measured(records: Records, read_seconds: float | None = None) -> SweepTimes:
    times = SweepTimes()
    for num_tokens, seconds in records:
        times.record(num_tokens, seconds)
    if read_seconds is not None:
        times.record_read(read_seconds)
    return times


def test_nothing_is_known_before_the_first_sweep() -> None:
    times = SweepTimes()
    assert (times.read_seconds, times.compute_seconds(1), times.sweep_seconds(1)) == (None, None, None)
    assert times.tokens_within(0.0, 7) == 7
    assert measured([(1, 1.0)]).sweep_seconds(1) is None
    assert measured([], read_seconds=1.0).sweep_seconds(1) is None


def test_time_grows_linearly_between_measurements_and_in_proportion_outside() -> None:
    times = measured([(4, 2.0), (20, 6.0)])
    seconds = [times.compute_seconds(num_tokens) for num_tokens in (0, 1, 4, 12, 20, 40)]
    assert seconds == [0.0, 0.5, 2.0, 4.0, 6.0, 12.0]


def test_the_slower_of_reading_and_computing_decides() -> None:
    times = measured([(1, 1.0), (8, 8.0)], read_seconds=3.0)
    assert [times.sweep_seconds(num_tokens) for num_tokens in (1, 3, 8)] == [3.0, 3.0, 8.0]
    assert times.tokens_within(3.0, 100) == 3
    assert times.tokens_within(3.0, 2) == 2
    assert times.tokens_within(0.5, 100) == 0
    assert times.tokens_within(3.0, 0) == 0


def test_a_resident_model_reads_nothing() -> None:
    times = measured([(1, 1.0)], read_seconds=0.0)
    assert times.read_seconds == 0.0
    assert times.sweep_seconds(1) == 1.0


def test_a_sweep_that_waited_took_as_long_as_reading() -> None:
    times = measured([(1, 1.0)])
    times.record_stalls(5.0, 4.0)
    assert times.read_seconds == 5.0
    for _ in range(3):
        times.record_stalls(7.0, 1.0)
    assert times.read_seconds == 7.0


def test_a_sweep_that_did_not_wait_took_no_less_than_reading() -> None:
    times = measured([(1, 1.0)])
    times.record_stalls(9.0, 0.1)  # all that is known
    assert times.read_seconds == 9.0
    times.record_stalls(5.0, 2.0)
    for _ in range(9):
        times.record_stalls(8.0, 0.5)
    assert times.read_seconds == 5.0
    for _ in range(3):
        times.record_stalls(3.0, 0.0)
    assert times.read_seconds == 3.0


def test_reading_is_the_middle_of_the_last_five() -> None:
    times = SweepTimes()
    for seconds in (1.0, 9.0, 2.0, 0.0, 3.0):
        times.record_read(seconds)
    assert times.read_seconds == 2.0
    for _ in range(3):
        times.record_read(7.0)
    assert times.read_seconds == 7.0


@given(RECORDS)
def test_more_tokens_never_take_less(records: Records) -> None:
    times = measured(records, read_seconds=5.0)
    for seconds in (times.compute_seconds, times.sweep_seconds):
        expected = [seconds(num_tokens) for num_tokens in range(600)]
        assert expected == sorted(expected, key=lambda item: item or 0.0)
        assert (None in expected) == (not records)


@given(RECORDS, SECONDS, st.integers(0, 600))
def test_tokens_within_is_the_largest_that_fits(records: Records, seconds: float, most: int) -> None:
    times = measured(records)
    fitting = [n for n in range(most + 1) if n == 0 or (times.compute_seconds(n) or 0.0) <= seconds]
    assert times.tokens_within(seconds, most) == fitting[-1]


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), SECONDS), min_size=1, max_size=32))
def test_estimates_stay_within_what_was_measured(records: Records) -> None:
    times = measured(records)
    sizes, seconds = zip(*records, strict=True)
    for num_tokens in range(min(sizes), max(sizes) + 1):
        expected = times.compute_seconds(num_tokens)
        assert expected is not None
        assert min(seconds) <= expected <= max(seconds)


@given(
    st.lists(st.integers(1, 300), min_size=1, unique_by=lambda num_tokens: num_tokens.bit_length()),
    st.floats(0, 10),
    st.floats(0.01, 1),
)
def test_a_linear_machine_is_known_between_sizes_and_bounded_outside(
    sizes: list[int], fixed: float, slope: float
) -> None:
    times = measured([(num_tokens, fixed + slope * num_tokens) for num_tokens in sizes])
    for num_tokens in range(1, 600):
        expected, actual = times.compute_seconds(num_tokens), fixed + slope * num_tokens
        assert expected is not None
        if num_tokens < min(sizes):
            assert expected <= actual * (1 + 1e-9)
        elif num_tokens > max(sizes):
            assert expected >= actual * (1 - 1e-9)
        else:
            assert expected == pytest.approx(actual)


@pytest.mark.parametrize("outlier", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("before", [3, 4, 5, 50])
def test_an_outlier_counts_nothing(before: int, outlier: float) -> None:
    times = measured([(1, 1.0), (64, 3.0)] * before)
    usual = [times.compute_seconds(num_tokens) for num_tokens in range(200)]
    for num_tokens in (1, 64):
        times.record(num_tokens, outlier)
        assert [times.compute_seconds(num_tokens) for num_tokens in range(200)] == usual


def test_a_slow_first_sweep_is_forgotten_with_the_second() -> None:
    assert measured([(1, 10.0), (1, 1.0)]).compute_seconds(1) == 1.0


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 10.0])
def test_a_change_of_the_machine_is_believed_after_three_sweeps_of_a_size(factor: float) -> None:
    times = measured([(1, 1.0), (64, 3.0)] * 20)
    for _ in range(3):
        times.record(1, factor)
        times.record(64, 3.0 * factor)
    assert times.compute_seconds(1) == pytest.approx(factor)
    assert times.compute_seconds(64) == pytest.approx(3.0 * factor)


def test_where_sizes_disagree_the_newer_is_right() -> None:
    assert measured([(1, 5.0), (8, 2.0)]).compute_seconds(1) == 2.0
    assert measured([(8, 2.0), (1, 5.0)]).compute_seconds(8) == 5.0


def test_a_large_size_is_remembered_through_many_small_sweeps() -> None:
    assert measured([(512, 8.0)] + [(1, 1.0)] * 1000).compute_seconds(512) == 8.0


def test_an_old_large_size_never_takes_more_than_in_proportion_to_newer_ones() -> None:
    calm = [(4, 1.0)] * 32
    assert measured([(8, 50.0)] * 2 + calm[1:]).compute_seconds(8) == 50.0
    assert measured([(8, 50.0)] * 2 + calm).compute_seconds(8) == 2.0


def test_a_cold_first_sweep_does_not_stand_in_the_way() -> None:
    assert measured([(512, 60.0), (32, 1.5)]).compute_seconds(512) == 24.0
    assert measured([(512, 60.0), (512, 60.0), (32, 1.5)]).compute_seconds(512) == 60.0


def test_an_old_small_size_is_forgotten_so_that_it_is_tried_again() -> None:
    drafting = [(8, 4.0)] * 32
    assert measured([(4, 3.9), *drafting[1:]]).compute_seconds(4) == 3.9
    assert measured([(4, 3.9), *drafting]).compute_seconds(4) == 2.0


READ_SECONDS = 5.0


def run(times: SweepTimes, machine: Callable[[int], float], sweeps: int, noise: random.Random) -> list[int]:
    """The sizes of sweeps that fill the time of reading."""
    sizes = []
    for _ in range(sweeps):
        sizes.append(max(1, times.tokens_within(READ_SECONDS, 512)))
        times.record(sizes[-1], machine(sizes[-1]) * noise.lognormvariate(0, 0.05))
    return sizes


def calm(num_tokens: int) -> float:
    return 1 + num_tokens / 100


def busy(num_tokens: int) -> float:
    return 4 + num_tokens / 25


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("first", [(1, calm(1)), (512, 60.0)])
def test_sweeps_fill_the_time_of_reading_again_within_sixteen_sweeps_of_a_change(
    first: tuple[int, float], seed: int
) -> None:
    noise = random.Random(seed)
    times = measured([first])
    for _ in range(2):
        sizes = run(times, calm, 48, noise)  # 400 tokens take as long as reading
        assert min(sizes[16:]) >= 250
        assert calm(max(sizes[16:])) <= 1.25 * READ_SECONDS
        sizes = run(times, busy, 48, noise)  # and now 25
        assert all(busy(size) <= 1.25 * READ_SECONDS for size in sizes[16:])
