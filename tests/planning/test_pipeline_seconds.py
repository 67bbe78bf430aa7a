"""Seconds of simulated sweeps, against figures by hand, and against limits that hold for any pipeline."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_async.planning.cost_model import ExpertSeconds, StageSeconds, pipeline_seconds

READ_S = 1.0  # of the largest stages


def sweeps(
    stages: list[StageSeconds], agents: int, buffers: int, num_sweeps: int = 5, rest_s: float = 0.0
) -> list[float]:
    return pipeline_seconds(stages, num_agents=agents, num_buffers=buffers, num_sweeps=num_sweeps, rest_s=rest_s)


def test_all_resident_is_computing_alone() -> None:
    assert sweeps([StageSeconds(0, 1.0), StageSeconds(0, 2.0)], 1, 0, rest_s=0.5) == [3.5] * 5


def test_the_disk_is_the_limit() -> None:
    stages = [StageSeconds(READ_S, 0.25)] * 8  # a second to read, a quarter to compute
    first, *others = sweeps(stages, 1, 2)
    assert others == pytest.approx([8.0] * 4)
    assert first == pytest.approx(0.25 + 6 + 0.25)  # two were there; the first buffer is free after a quarter


def test_computing_is_the_limit() -> None:
    assert sweeps([StageSeconds(READ_S, 2.0)] * 4, 1, 2) == pytest.approx([8.0] * 5)


def test_with_one_buffer_nothing_overlaps() -> None:
    assert sweeps([StageSeconds(READ_S, 0.5)] * 4, 1, 1)[-1] == pytest.approx(4 * 1.5)


def test_a_second_agent_does_not_make_the_disk_faster() -> None:
    stages = [StageSeconds(READ_S, 0.1)] * 10
    assert sweeps(stages, 2, 3)[-1] == pytest.approx(sweeps(stages, 1, 2)[-1])


def test_resident_stages_hide_reads() -> None:
    stages = [StageSeconds(READ_S, 0.1), StageSeconds(0, 0.9)] * 4
    assert sweeps(stages, 1, 2)[-1] == pytest.approx(4.0)


def test_a_ring_larger_than_what_is_streamed() -> None:
    assert sweeps([StageSeconds(READ_S, 0.5), StageSeconds(0, 0.2)], 4, 5)[-1] == pytest.approx(1.5)


def test_experts_are_read_while_others_are_computed_and_the_last_ones_are_not() -> None:
    few = ExpertSeconds(read_s=1.0, compute_s=0.25, last_s=0.5, ahead_s=0.0)
    assert sweeps([StageSeconds(0, 0.125, (few,))] * 2, 1, 0) == pytest.approx([2 * (0.125 + 1.0 + 0.5)] * 5)
    known = few._replace(read_s=0.0)
    assert sweeps([StageSeconds(0, 0.125, (known,))] * 2, 1, 0) == pytest.approx([2 * (0.125 + 0.25 + 0.5)] * 5)


def test_experts_are_read_before_stages_and_both_share_the_disk() -> None:
    experts = ExpertSeconds(read_s=2.0, compute_s=0.0, last_s=0.0, ahead_s=0.0)
    stages = [StageSeconds(READ_S, 0.0, (experts,))] * 4
    assert sweeps(stages, 1, 2)[1:] == pytest.approx([4 * 3.0] * 4)


def test_experts_that_are_read_ahead_use_the_time_in_which_others_are_computed() -> None:
    asked = ExpertSeconds(read_s=1.0, compute_s=0.0, last_s=2.0, ahead_s=0.0)
    ahead = asked._replace(ahead_s=0.75)
    assert sweeps([StageSeconds(0, 0.0, (asked,))] * 4, 1, 0)[-1] == pytest.approx(4 * 3.0)
    assert sweeps([StageSeconds(0, 0.0, (ahead,))] * 4, 1, 0)[-1] == pytest.approx(4 * 2.25)


experts_of = st.builds(
    ExpertSeconds,
    read_s=st.sampled_from([0.0, READ_S / 8, READ_S]),
    compute_s=st.sampled_from([0.0, 0.25]),
    last_s=st.sampled_from([0.0, 0.125]),
    ahead_s=st.sampled_from([0.0, READ_S / 8]),
)
stages_of = st.lists(
    st.builds(
        StageSeconds,
        st.sampled_from([0, READ_S / 4, READ_S]),
        st.sampled_from([0.05, 0.5, 2.0]),
        st.lists(experts_of, max_size=1).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(stages_of, st.integers(1, 4), st.integers(1, 3))
def test_never_faster_than_the_limits_nor_slower_than_one_after_another(
    stages: list[StageSeconds], agents: int, more: int
) -> None:
    buffers = agents + more - 1
    seconds = sweeps(stages, agents, max(1, buffers))
    experts = [one for stage in stages for one in stage.experts]
    read_s = sum(stage.read_s for stage in stages) + sum(one.read_s for one in experts)
    compute_s = sum(stage.compute_s for stage in stages) + sum(one.compute_s + one.last_s for one in experts)
    assert all(sweep_s >= compute_s - 1e-6 for sweep_s in seconds)
    # Of one sweep alone this would not hold: what is read for the next one shares the disk with it.
    for num_sweeps, passed_s in enumerate(accumulate(seconds), start=1):
        assert passed_s <= num_sweeps * (read_s + compute_s) + 1e-6
    # Over all sweeps no more can come than was in the ring and is read since.
    in_ring = max(1, buffers) * READ_S
    assert sum(seconds) >= len(seconds) * read_s - in_ring - 1e-6
