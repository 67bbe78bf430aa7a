"""MachineSpeeds: what lies between and beyond measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_async.planning.machine_speeds import DiskRate, MachineSpeeds, estimated, interpolate, without_noise

MIB = 1 << 20


def speeds(*disk: DiskRate) -> MachineSpeeds:
    return MachineSpeeds(disk, {1: 1e-9, 64: 4e-9}, {1: 2e-9}, {1: 0.5, 64: 1.0}, 0.001, "of a test", measured=True)


def compute_seconds(known: MachineSpeeds, nbytes: int, head_bytes: int, num_tokens: int, num_outputs: int) -> float:
    layer_s, head_s = known.seconds_per_byte(num_tokens, num_outputs)
    return nbytes * layer_s + head_bytes * head_s + known.outside_seconds(num_outputs)


def test_a_curve_is_straight_between_and_beyond_what_was_measured() -> None:
    curve = {1: 1.0, 3: 2.0, 11: 4.0}
    assert [interpolate(curve, count) for count in (1, 2, 3, 7, 11, 19)] == [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize(("curve", "count", "seconds"), [({}, 5, 0.0), ({4: 2.0}, 1, 2.0), ({4: 2.0}, 8, 4.0)])
def test_a_curve_of_few_points(curve: dict[int, float], count: int, seconds: float) -> None:
    assert interpolate(curve, count) == seconds


def test_more_tokens_never_take_less_even_where_they_did() -> None:
    assert interpolate({1: 2.0, 4: 1.0}, 4) >= interpolate({1: 2.0, 4: 1.0}, 1)


def test_reads_of_one_agent() -> None:
    # 1 ms to start, and 1 MiB in 1 ms
    known = speeds(DiskRate(1, MIB, MIB / 2e-3), DiskRate(1, 4 * MIB, 4 * MIB / 5e-3))
    for size, seconds in ((1, 2e-3), (2, 3e-3), (4, 5e-3), (16, 17e-3), (0.5, 1.5e-3)):
        assert known.read_seconds(int(size * MIB), 1) == pytest.approx(seconds)


def test_agents_share_the_disk() -> None:
    known = speeds(*(DiskRate(agents, size * MIB, 1e9) for agents in (1, 4) for size in (1, 4)))
    assert known.agent_counts == (1, 4)
    one, two, four, eight = (known.read_seconds(MIB, agents) for agents in (1, 2, 4, 8))
    assert (two, four, eight) == pytest.approx((2 * one, 4 * one, 8 * one))


def test_rates_that_cannot_be_told_apart_are_one() -> None:
    rates = {(1, MIB): 100.0, (1, 16 * MIB): 480.0, (2, MIB): 430.0, (2, 16 * MIB): 540.0, (3, 16 * MIB): 500.0}
    disk = [DiskRate(agents, size, rate) for (agents, size), rate in rates.items()]
    assert [speed.bytes_per_s for speed in without_noise(disk)] == [100.0, 480.0, 430.0, 500.0, 500.0]
    assert without_noise([]) == ()


def test_a_sweep_is_layers_and_head_and_what_is_outside() -> None:
    known = speeds()
    assert compute_seconds(known, 10**9, 10**9, 1, 1) == pytest.approx(1.0 + 2.0 + 0.5)
    assert compute_seconds(known, 10**9, 10**9, 64, 0) == pytest.approx(4.0 + 0.5)
    assert compute_seconds(known, 0, 0, 64, 64) == pytest.approx(1.0)


def test_the_fastest_kernels_of_few_tokens() -> None:
    known = replace(speeds(), native_gain={1: 2.0, 4: 1.5, 16: 0.9, 64: 3.0})
    assert known.native_tokens == 0
    fast = known.with_fastest_kernels()
    assert fast.native_tokens == 4  # from where they are slower, nothing is asked of them any more
    for count, gain in ((1, 2.0), (4, 1.5), (5, 1.0), (16, 1.0), (64, 1.0), (256, 1.0)):
        assert interpolate(fast.layer_seconds, count) == pytest.approx(interpolate(known.layer_seconds, count) / gain)
    assert "up to 4 tokens (2.0 times at 1, 1.5 times at 4 as fast" in fast.explanation[0]
    assert replace(known, native_gain={1: 1.0, 4: 9.0}).with_fastest_kernels().native_tokens == 0


@given(st.integers(1, 1 << 34), st.integers(1, 16), st.integers(1, 4096))
def test_an_estimate_is_always_to_be_had(nbytes: int, agents: int, tokens: int) -> None:
    guess = estimated()
    assert not guess.measured
    assert guess.read_seconds(nbytes, agents) > 0
    assert guess.read_seconds(nbytes, agents + 1) >= guess.read_seconds(nbytes, agents)
    assert compute_seconds(guess, nbytes, nbytes, tokens, tokens) >= compute_seconds(guess, nbytes, nbytes, 1, 1) > 0


def test_estimates_count_dequantizing_for_each_stored_byte() -> None:
    plain = estimated()
    halved = plain.with_dequantizing(2.0, 1e-9, in_head=False)
    layer_s, head_s = plain.seconds_per_byte(8, 4)
    assert halved.seconds_per_byte(8, 4) == pytest.approx((2 * layer_s + 1e-9, head_s))
    assert plain.with_dequantizing(2.0, 1e-9, in_head=True).seconds_per_byte(8, 4)[1] == pytest.approx(
        2 * head_s + 1e-9
    )
