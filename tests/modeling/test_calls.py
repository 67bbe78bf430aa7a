"""Model calls that share a sweep: stage by stage, one at a time, and whatever one of them does is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hermes_async.errors import ReadError
from hermes_async.modeling.calls import ModelCall, Turn, run_calls
from hermes_async.pipeload.stage import Stage, StageLayout

STAGES = [Stage(idx, StageLayout(f"stage {idx}", (), (), 0, 0, 0), resident=False) for idx in range(4)]


class Sweep:
    """Runs calls that visit stages, and keeps what happened in its order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.on_enter: Callable[[Stage], None] = lambda stage: None
        self._num_computing = 0

    def visiting(self, name: str, stages: list[int], fail_at: int | None = None) -> ModelCall:
        def compute() -> str:
            turn = Turn.current()
            for idx in stages:
                turn.rest(STAGES[idx], entering=True)
                self._num_computing += 1
                assert self._num_computing == 1
                self.log.append((name, idx))
                self._num_computing -= 1
                if idx == fail_at:
                    raise ValueError(name)
                turn.rest(STAGES[idx], entering=False)
            return name

        return ModelCall(compute)

    def run(self, *calls: ModelCall) -> None:
        def enter(stage: Stage) -> bool:
            self.on_enter(stage)
            self.log.append(("enter", stage.idx))
            return True

        before = threading.active_count()
        try:
            run_calls(
                calls,
                first=None,
                enter=enter,
                leave=lambda stage: self.log.append(("leave", stage.idx)),
                switch_to=lambda call: None,
            )
        finally:
            assert threading.active_count() == before


@pytest.fixture
def sweep() -> Sweep:
    return Sweep()


def test_every_call_goes_through_a_stage_before_the_next_one_is_entered(sweep: Sweep) -> None:
    calls = [sweep.visiting(name, [0, 1]) for name in "ab"]
    sweep.run(*calls)
    first, second = [("enter", 0), ("a", 0), ("b", 0), ("leave", 0)], [("enter", 1), ("a", 1), ("b", 1), ("leave", 1)]
    assert sweep.log == [*first, *second]
    assert [item.result for item in calls] == ["a", "b"]
    assert all(item.completed and item.error is None for item in calls)


def test_calls_that_part_and_meet_again(sweep: Sweep) -> None:
    calls = [sweep.visiting("a", [0, 1, 3]), sweep.visiting("b", [0, 2, 3]), sweep.visiting("c", [2])]
    sweep.run(*calls)
    assert [item for item in sweep.log if item[0] == "enter"] == [("enter", idx) for idx in range(4)]
    assert [item for item in sweep.log if item[0] in "bc"] == [("b", 0), ("b", 2), ("c", 2), ("b", 3)]
    assert [item.result for item in calls] == ["a", "b", "c"]


def test_a_call_that_goes_back_enters_the_stage_again(sweep: Sweep) -> None:
    sweep.run(sweep.visiting("a", [1, 0]), sweep.visiting("b", [0, 1]))
    assert [item for item in sweep.log if item[0] == "enter"] == [("enter", idx) for idx in (0, 1, 0)]


def test_a_call_that_fails_leaves_the_others_alone(sweep: Sweep) -> None:
    calls = [sweep.visiting("a", [0, 1]), sweep.visiting("b", [0, 1], fail_at=0), sweep.visiting("c", [0, 1])]
    sweep.run(*calls)
    assert [item.result for item in calls] == ["a", None, "c"]
    assert isinstance(calls[1].error, ValueError)
    assert ("b", 1) not in sweep.log


def test_a_call_that_is_dropped_ends_before_its_next_stage(sweep: Sweep) -> None:
    calls = [sweep.visiting("a", [0, 1]), sweep.visiting("b", [0, 1])]
    sweep.on_enter = lambda stage: setattr(calls[0], "dropped", stage.idx == 1)
    sweep.run(*calls)
    assert ("a", 0) in sweep.log
    assert ("a", 1) not in sweep.log
    assert not calls[0].completed
    assert calls[0].error is None
    assert calls[1].result == "b"


@pytest.mark.parametrize("idx", [0, 1])
@pytest.mark.parametrize("error", [ReadError("gone", path=Path("shard"), offset=0), KeyboardInterrupt()])
def test_a_stage_that_cannot_be_entered_ends_all(sweep: Sweep, idx: int, error: BaseException) -> None:
    def fail(stage: Stage) -> None:
        if stage.idx == idx:
            raise error

    sweep.on_enter = fail
    calls = [sweep.visiting(name, [0, 1]) for name in "ab"]
    with pytest.raises(type(error)):
        sweep.run(*calls)
    assert not any(item.completed for item in calls)


def test_no_calls(sweep: Sweep) -> None:
    sweep.run()
    assert sweep.log == []
