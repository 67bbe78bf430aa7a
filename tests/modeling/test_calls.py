"""Model calls that share a sweep: stage by stage, one at a time, and whatever one of them does is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hermes_async.errors import ReadError
from hermes_async.modeling.calls import ModelCall, Turn, run_calls
from hermes_async.pipeload.stage import Stage, StageLayout

STAGES = [Stage(idx, StageLayout(f"stage {idx}", (), (), 0, 0, 0), resident=False) for idx in range(4)]

EXPERTS = [Stage(0, StageLayout(f"expert {idx}", (), (), 0, 0, 0), resident=False, is_expert=True) for idx in range(4)]


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

    def routed(self, name: str, experts: list[int], fail_at: int | None = None) -> ModelCall:
        """A call that visits stage 0, and these experts within it, and then stage 1."""

        def compute() -> str:
            turn = Turn.current()
            turn.rest(STAGES[0], entering=True)
            missing = {EXPERTS[idx]: idx for idx in experts}
            while missing:
                idx = missing.pop(turn.rest_for_one(tuple(missing)))
                self.log.append((name, f"expert {idx}"))
                if idx == fail_at:
                    raise ValueError(name)
            self.log.append((name, "after experts"))
            turn.rest(STAGES[0], entering=False)
            turn.rest(STAGES[1], entering=True)
            turn.rest(STAGES[1], entering=False)
            return name

        return ModelCall(compute)

    def run(self, *calls: ModelCall) -> None:
        def enter(stages: Sequence[Stage]) -> Stage:
            assert len(stages) == 1 or all(stage.is_expert for stage in stages)
            stage = max(stages, key=lambda stage: stage.name)  # the expert that happens to be in memory first
            self.on_enter(stage)
            self.log.append(("enter", stage.name if stage.is_expert else stage.idx))
            return stage

        before = threading.active_count()
        try:
            run_calls(
                calls,
                first=None,
                enter=enter,
                leave=lambda stage: self.log.append(("leave", stage.name if stage.is_expert else stage.idx)),
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


def test_each_expert_is_entered_once_for_all_calls_and_within_its_layer(sweep: Sweep) -> None:
    calls = [sweep.routed("a", [0, 2]), sweep.routed("b", [2, 3]), sweep.routed("c", [])]
    sweep.run(*calls)
    assert [call.result for call in calls] == ["a", "b", "c"]
    entered = [item for item in sweep.log if item[0] in ("enter", "leave")]
    experts = [("enter", "expert 3"), ("leave", "expert 3"), ("enter", "expert 2"), ("leave", "expert 2")]
    experts += [("enter", "expert 0"), ("leave", "expert 0")]
    assert entered == [("enter", 0), *experts, ("leave", 0), ("enter", 1), ("leave", 1)]
    assert [item for item in sweep.log if item[1] == "expert 2"][1:3] == [("a", "expert 2"), ("b", "expert 2")]


def test_a_call_that_fails_in_an_expert_leaves_the_others_and_the_layer_is_left(sweep: Sweep) -> None:
    calls = [sweep.routed("a", [1, 2], fail_at=2), sweep.routed("b", [1, 2])]
    sweep.run(*calls)
    assert isinstance(calls[0].error, ValueError) and calls[1].result == "b"
    assert ("a", "expert 1") not in sweep.log
    assert sweep.log.count(("leave", 0)) == 1


def test_calls_that_are_dropped_among_experts_end_and_the_layer_is_left(sweep: Sweep) -> None:
    calls = [sweep.routed("a", [1, 2]), sweep.routed("b", [2])]
    sweep.on_enter = lambda stage: setattr(calls[0], "dropped", stage is EXPERTS[2])
    sweep.run(*calls)
    assert not calls[0].completed and calls[1].completed
    assert [item for item in sweep.log if item[0] == "leave"] == [("leave", "expert 2"), ("leave", 0), ("leave", 1)]
