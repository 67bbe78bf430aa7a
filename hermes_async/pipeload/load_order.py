"""What the loading agents read next: what a sweep needs first, of what can have a place in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import anyio

from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.storage.buffers import Buffer


class LoadOrder:
    """The cycle of streamed stages, sweep after sweep, and the resident stages that are not in memory yet.

    A streamed stage needs a place in the ring. A resident stage has memory of its own, and waits for nothing. Belongs
    to the event loop, but for `is_next` and `enter`, which the compute thread calls.

    Methods that start the ring over return the stages that must be freed for it.

    Args:
        stages: All stages, in the order they are expected to be computed in.
        ring: Grants the places of streamed stages.
    """

    def __init__(self, stages: Sequence[Stage], ring: MemoryGovernor) -> None:
        self._stages = stages
        self._ring = ring
        # All mutable state. `cycle` has the streamed stages as the model visits them. `_next_load` is where the loading
        # agents are in it, `_next_compute` where the sweep is, and `_entered` the index of the stage entered last.
        # `_missing` are the resident stages that nobody reads yet, in order, with their memory. `_choice` is the scope
        # in which a loading agent waits for the next stage; it is cancelled when there may be another one.
        self.cycle = [stage for stage in stages if not stage.resident]
        self._next_load = 0
        self._next_compute = 0
        self._entered = -1
        self._missing: dict[Stage, Buffer] = {}
        self._is_held_back = False
        self._choice: anyio.CancelScope | None = None
        self.find_missing()

    # --- for the loading agents ---

    def choice(self) -> anyio.CancelScope:
        """A scope in which one agent chooses a stage and waits for its place; cancelled when it must choose again."""
        self._choice = anyio.CancelScope()
        return self._choice

    def _choose_again(self) -> None:
        if self._choice is not None:
            self._choice.cancel()

    def next_stage(self) -> Stage | None:
        """The stage that is needed first of those that can be loaded now.

        If there is none, a streamed stage that must wait for its place; if nothing is to be loaded, None.
        """
        if self._is_held_back:
            return None
        streamed = self.cycle[self._next_load] if self.cycle else None
        resident = next(iter(self._missing), None)
        if streamed is None or resident is None:
            return streamed or resident
        has_place = streamed.state is StageState.EMPTY and self._ring.can_grant(streamed.layout.slot_bytes)
        return min(streamed, resident, key=self._distance) if has_place else resident

    def _distance(self, stage: Stage) -> int:
        """How many stages there are until this one is needed."""
        return (stage.idx - self._entered - 1) % len(self._stages)

    def take(self, stage: Stage) -> Buffer | None:
        """An agent loads `stage`, which was next, from now on; returns the memory of a resident stage."""
        if stage.resident:
            return self._missing.pop(stage)
        self._next_load = (self._next_load + 1) % len(self.cycle)
        return None

    # --- for the sweeps ---

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within the block no agent begins another load; not to be nested."""
        self._is_held_back = True
        self._choose_again()
        try:
            yield
        finally:
            self._is_held_back = False
            self._choose_again()

    def is_next(self, stage: Stage) -> bool:
        """Whether it comes next in the order that is known; a resident stage may be entered at any time."""
        if stage.resident:
            return True
        return self._next_compute < len(self.cycle) and self.cycle[self._next_compute] is stage

    @property
    def entered_idx(self) -> int | None:
        """Index of the stage that the running sweep has entered last; None before the first one."""
        return None if self._entered < 0 else self._entered

    def enter(self, stage: Stage) -> None:
        """It is computed next."""
        self._entered = stage.idx
        if not stage.resident:
            self._next_compute += 1

    def reorder(self, stage: Stage) -> list[Stage]:
        """The model visits its stages in another order than was known: learns it, and loads on from this stage."""
        if stage in self.cycle[self._next_compute :]:
            del self.cycle[self.cycle.index(stage, self._next_compute)]
        self.cycle.insert(self._next_compute, stage)
        return self.rewind(self._next_compute)

    def end_sweep(self, *, complete: bool) -> list[Stage]:
        """The next sweep begins with the first stage. An incomplete one says nothing of the order."""
        num_visited, self._next_compute, self._entered = self._next_compute, 0, -1
        if not complete:
            return self.rewind(0)
        if 0 < num_visited < len(self.cycle):
            del self.cycle[num_visited:]  # the model did not visit these
            return self.rewind(0)
        return []

    # --- starting over ---

    def stream(self, stages: Iterable[Stage]) -> list[Stage]:
        """Makes these the streamed stages."""
        self.cycle = list(stages)
        return self.rewind(0)

    def rewind(self, position: int) -> list[Stage]:
        """Empties the ring and loads on from `position` of the cycle."""
        self._next_load = position
        for stage in self._stages:
            if not stage.resident and stage.state is StageState.LOADING:
                stage.stale = True
        self._choose_again()
        return [stage for stage in self._stages if not stage.resident and stage.state is StageState.READY]

    def find_missing(self) -> None:
        """Looks for resident stages that are to be loaded, and maps the memory of all of them at once.

        A mapping waits for the page faults of threads that read. One mapping for each stage, behind each other, would
        hold up the event loop.
        """
        missing = [stage for stage in self._stages if stage.resident and stage.state is StageState.EMPTY]
        new = [stage for stage in missing if stage not in self._missing]
        buffers = Buffer.side_by_side([stage.layout.slot_bytes for stage in new])
        known = self._missing | dict(zip(new, buffers, strict=True))
        self._missing = {stage: known.pop(stage) for stage in missing}
        for buffer in known.values():  # of stages that are no longer resident
            buffer.close()
        self._choose_again()
