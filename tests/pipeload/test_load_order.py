"""Any stages, groups, rings and sweeps, in any interleaving of the agents: the sweeps come to their end.

The agents are played here, one step at a time, so that each step that any of them could take may be the next.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.load_order import LoadOrder
from hermes_async.pipeload.stage import Stage, StageLayout, StageState
from hermes_async.storage.buffers import Buffer
from hermes_async.storage.tensor_spec import TensorSpec

GROUPS = ("vision", "audio")


@dataclass(frozen=True)
class PlannedSweep:
    """What a sweep asks for, and how far it keeps to that.

    Attributes:
        asked: The groups it asks for.
        visited: The groups whose stages it computes.
        dropped: How many of the optional stages at the end of what it visits are passed over, as if a call ended early.
        abandoned_after: How many stages it computes until it is abandoned; None for all.
    """

    asked: frozenset[str] = frozenset()
    visited: frozenset[str] = frozenset()
    dropped: int = 0
    abandoned_after: int | None = None

    def stages(self, stages: list[Stage]) -> list[Stage]:
        optional = [stage for stage in stages if stage.group in self.visited]
        left_out = optional[len(optional) - self.dropped :] if self.dropped else []
        visited = [stage for stage in stages if stage.group is None or stage.group in self.visited]
        return [stage for stage in visited if stage not in left_out][: self.abandoned_after]

    @property
    def is_plain(self) -> bool:
        return self == PlannedSweep()


@dataclass
class Played:
    """The agents of a pipeline; `choices` decides who takes the next step.

    Attributes:
        loads: Stages of the ring in the order in which they were read, each with the groups that were known then.
        computed: Stages of the ring in the order in which they were computed.
        num_restarts: How often places were given back that were loaded for nothing.
    """

    stages: list[Stage]
    num_agents: int
    num_buffers: int
    choices: random.Random
    loading: list[Stage] = field(default_factory=list)
    loads: list[Stage] = field(default_factory=list)
    computed: list[Stage] = field(default_factory=list)
    num_restarts: int = 0
    known: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        slot_bytes = max(stage.layout.slot_bytes for stage in self.stages)
        self.ring = (
            MemoryGovernor(self.num_buffers * slot_bytes)
            .part("ring", self.num_buffers * slot_bytes, max_leases=self.num_buffers)
            .__enter__()
        )
        self.order = LoadOrder(self.stages, self.ring)

    def sweep(self, planned: PlannedSweep) -> None:
        self.known = planned.asked
        self.free(self.order.begin_sweep(planned.asked))
        for stage in planned.stages(self.stages):
            self.agents_work(at_least=0)
            if not self.order.is_next(stage):
                self.known |= {stage.group} - {None}
                self.free(self.order.reorder(stage))
            while stage.state is not StageState.READY:
                self.agents_work(at_least=1)
            assert self.order.is_next(stage)
            self.order.enter(stage)
            if not stage.resident:
                self.computed.append(stage)
                stage.spend()
        self.known = frozenset()
        self.free(self.order.end_sweep(complete=planned.abandoned_after is None))

    def agents_work(self, at_least: int) -> None:
        """Some steps of the loading agents and the daemon agent."""
        for num_steps in range(self.choices.choice([at_least, 1, 2, 5, 50])):
            possible = [*self.loading, *(stage for stage in self.stages if stage.state is StageState.SPENT)]
            claimed = self.order.next_stage() if len(self.loading) <= self.num_agents else None
            if claimed is not None and (claimed.resident or self.has_place(claimed)):
                possible.append(claimed)
            assert possible or num_steps >= at_least, "a deadlock"
            if not possible:
                return
            self.step(self.choices.choice(possible))

    def has_place(self, stage: Stage) -> bool:
        return stage.state is StageState.EMPTY and self.ring.can_grant(stage.layout.slot_bytes)

    def step(self, stage: Stage) -> None:
        if stage.state is StageState.EMPTY:
            lease = None if stage.resident else self.ring.acquire_nowait(stage.label, stage.layout.slot_bytes)
            stage.start_loading(self.order.take(stage) or Buffer(4096), lease)
            self.loading.append(stage)
            if not stage.resident:
                assert stage.group is None or stage.group in self.known
                self.loads.append(stage)
            return
        if stage.state is StageState.LOADING:
            self.loading.remove(stage)
            if not stage.stale:
                stage.set_ready(None)
                return
        self.give_back(stage)

    def free(self, stages: list[Stage]) -> None:
        self.num_restarts += bool(stages) or any(stage.stale for stage in self.loading)
        for stage in stages:
            assert stage.state is StageState.READY
            self.give_back(stage)

    def give_back(self, stage: Stage) -> None:
        buffer, lease = stage.clear()
        buffer.close()
        if lease is not None:
            lease.release()

    def settle(self) -> None:
        """Nobody can do anything but the next sweep."""
        while self.loading or any(stage.state is StageState.SPENT for stage in self.stages):
            self.agents_work(at_least=1)
        self.agents_work(at_least=0)


@st.composite
def played(draw: st.DrawFn) -> Played:
    groups = draw(st.lists(st.sampled_from([None, None, *GROUPS]), min_size=1, max_size=10))
    stages = []
    for idx, group in enumerate(groups):
        spec = TensorSpec(f"{idx}", Path("w"), idx * 4096, 4096, torch.uint8, (4096,))
        layout = StageLayout.of(f"{idx}", [("weight", spec)], group)
        stages.append(Stage(idx, layout, resident=draw(st.sampled_from([False, False, True]))))
    return Played(
        stages, draw(st.integers(1, 3)), draw(st.integers(1, 4)), random.Random(draw(st.integers(0, 1 << 30)))
    )


subsets = st.sets(st.sampled_from(GROUPS)).map(frozenset)
usual = subsets.map(lambda groups: PlannedSweep(groups, groups))
unusual = st.builds(PlannedSweep, subsets, subsets, st.integers(0, 3), st.one_of(st.none(), st.integers(0, 6)))


@settings(deadline=None, max_examples=300)
@given(played(), st.lists(st.one_of(usual, usual, unusual), max_size=12))
def test_no_sweep_waits_for_ever(rig: Played, sweeps: list[PlannedSweep]) -> None:
    computed = []
    for planned in sweeps:
        rig.sweep(planned)
        computed += [stage for stage in planned.stages(rig.stages) if not stage.resident]
    assert rig.computed == computed
    # Whatever came before, the next sweeps find everything.
    for planned in (PlannedSweep(), PlannedSweep(frozenset(GROUPS), frozenset(GROUPS)), PlannedSweep()):
        rig.sweep(planned)


@settings(deadline=None, max_examples=200)
@given(played(), st.lists(usual, max_size=12))
def test_what_is_read_is_computed_or_was_loaded_ahead(rig: Played, sweeps: list[PlannedSweep]) -> None:
    rig.settle()
    for planned in sweeps:
        restarts = rig.num_restarts
        rig.sweep(planned)
        assert rig.num_restarts == restarts or not planned.is_plain  # text alone never has anything read twice
        rig.settle()
        held = [stage for stage in rig.stages if not stage.resident and stage.state is not StageState.EMPTY]
        assert all(stage.group is None for stage in held)
        assert held == [stage for stage in rig.stages if not stage.resident and stage.group is None][: len(held)]
    assert len(rig.loads) <= len(rig.computed) + rig.num_buffers * (rig.num_restarts + 1)
    assert rig.num_restarts <= sum(not planned.is_plain for planned in sweeps)
