"""What the loading agents read next: what a sweep needs first, of what can have a place in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import anyio

from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.storage.buffers import Buffer, BufferLock


class LoadOrder:
    """The cycle of streamed stages, sweep after sweep, and the resident stages that are not in memory yet.

    A streamed stage needs a place in the ring. A resident stage has memory of its own, and waits for nothing. A stage
    of a group, such as the vision tower, is optional: a sweep passes over it unless it asked for its group. Belongs to
    the event loop, but for `is_next` and `enter`, which the compute thread calls.

    Methods that free places of the ring return the stages that must be freed for it.

    No deadlock: at any time, the streamed stages that are in memory or on their way there are those that are computed
    next, without a gap: from `_next_compute` up to `_next_load`, the optional ones left out that the sweep did not ask
    for. Other places of the ring are held only by stages that are computed already or that are stale, and such a place
    is given back without anybody's help. So if the stage that is computed next has no place, no stage holds a place for
    good, and the loading agent that waits at the governor with this stage, the first of all, gets one, if the ring has
    a place at all. The agents load the first stages of the next sweep before it is known which groups that sweep asks
    for, and suppose that it asks for none. If it asks for some, a gap may open in front of stages that were loaded
    already. These give their places back (`begin_sweep`), and are read again later. To let some of them wait in their
    places would save these reads, but hold up the agents: the ring has just one place more than there are agents.
    The places are also given back of optional stages that the model passes over in spite of what the sweep asked for
    (`reorder`, `end_sweep`).

    Args:
        stages: All stages, in the order they are expected to be computed in.
        ring: Grants the places of streamed stages.
        lock: Locks the memory of resident stages; None locks nothing.
    """

    def __init__(self, stages: Sequence[Stage], ring: MemoryGovernor, lock: BufferLock | None = None) -> None:
        self._stages = stages
        self._ring = ring
        self._lock = lock or BufferLock()
        # All mutable state. `cycle` has the streamed stages as the model visits them, the optional ones too. `_groups`
        # are those that the running sweep asked for. `_next_load` is where the loading agents are in the cycle,
        # `_is_ahead` whether they are there for the next sweep, `_next_compute` where the running sweep is, and
        # `_entered` the index of the stage entered last. `_missing` are the resident stages that nobody reads yet, in
        # order, with their memory. `_choice` is the scope in which a loading agent waits for the next stage; it is
        # cancelled when there may be another one.
        self.cycle = [stage for stage in stages if not stage.resident]
        self._groups: frozenset[str] = frozenset()
        self._next_load = 0
        self._is_ahead = False
        self._next_compute = 0
        self._entered = -1
        self._missing: dict[Stage, Buffer] = {}
        self.is_held_back = False
        self._choice: anyio.CancelScope | None = None
        self.find_missing()

    # --- positions in the cycle ---

    def _is_wanted(self, stage: Stage, *, ahead: bool = False) -> bool:
        """Whether the running sweep computes it, or with `ahead` the next one, as far as is known."""
        return stage.group is None or (stage.group in self._groups and not ahead)

    def _wanted_from(self, position: int, *, ahead: bool = False) -> int | None:
        """The first position from this one on with a stage that is wanted; None up to the end of the cycle."""
        positions = range(position, len(self.cycle))
        return next((idx for idx in positions if self._is_wanted(self.cycle[idx], ahead=ahead)), None)

    def _load_position(self) -> tuple[int, bool] | None:
        """The position of the streamed stage that is loaded next, and whether that is for the next sweep."""
        position = self._wanted_from(self._next_load, ahead=self._is_ahead)
        if position is not None:
            return position, self._is_ahead
        position = self._wanted_from(0, ahead=True)
        return None if position is None else (position, True)

    # --- for the loading agents ---

    def choice(self) -> anyio.CancelScope:
        """A scope in which one agent chooses a stage and waits for its place; cancelled when it must choose again."""
        self._choice = anyio.CancelScope()
        return self._choice

    def choose_again(self) -> None:
        """Lets the agent that waits look for the next stage again."""
        if self._choice is not None:
            self._choice.cancel()

    def next_stage(self) -> Stage | None:
        """The stage that is needed first of those that can be loaded now.

        If there is none, a streamed stage that must wait for its place; if nothing is to be loaded, None.
        """
        if self.is_held_back:
            return None
        position = self._load_position()
        streamed = None if position is None else self.cycle[position[0]]
        wanted = (stage for stage in self._missing if self._is_wanted(stage))
        resident = next(wanted, None) or next(iter(self._missing), None)
        if streamed is None or resident is None:
            return streamed or resident
        return min(streamed, resident, key=self._distance) if self.has_place(streamed) else resident

    def has_place(self, stage: Stage) -> bool:
        """Whether a stage can be loaded now."""
        has_room = stage.resident or self._ring.can_grant(stage.layout.slot_bytes)
        return has_room and stage.state is StageState.EMPTY

    def _distance(self, stage: Stage) -> tuple[bool, int]:
        """How many stages there are until this one is needed; it is least for what is needed first."""
        return not self._is_wanted(stage), (stage.idx - self._entered - 1) % len(self._stages)

    def take(self, stage: Stage) -> Buffer | None:
        """An agent loads `stage`, which was next, from now on; returns the memory of a resident stage."""
        if stage.resident:
            return self._missing.pop(stage)
        position = self._load_position()
        assert position is not None
        self._next_load, self._is_ahead = position[0] + 1, position[1]
        return None

    # --- for the sweeps ---

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within the block no agent begins another load; not to be nested."""
        self.is_held_back = True
        self.choose_again()
        try:
            yield
        finally:
            self.is_held_back = False
            self.choose_again()

    def begin_sweep(self, groups: Collection[str]) -> list[Stage]:
        """The next sweep asks for these groups. Their stages are loaded before those that come behind them."""
        self._groups = frozenset(groups)
        first = next((idx for idx, stage in enumerate(self.cycle) if stage.group in self._groups), None)
        if first is not None and first < self._next_load:
            return self.rewind(first)
        self.choose_again()
        return []

    def is_next(self, stage: Stage) -> bool:
        """Whether it comes next in the order that is known; a resident stage may be entered at any time."""
        if stage.resident:
            return True
        position = self._wanted_from(self._next_compute)
        return position is not None and self.cycle[position] is stage

    @property
    def entered_idx(self) -> int | None:
        """Index of the stage that the running sweep has entered last; None before the first one."""
        return None if self._entered < 0 else self._entered

    def enter(self, stage: Stage) -> None:
        """It is computed next."""
        self._entered = stage.idx
        if not stage.resident:
            position = self._wanted_from(self._next_compute)
            assert position is not None
            self._next_compute = position + 1

    def reorder(self, stage: Stage) -> list[Stage]:
        """The model visits another stage than was expected: loads on from this stage.

        If only optional stages were passed over, that says nothing of the order. Otherwise the order is learned.
        """
        if stage.group is not None:
            self._groups |= {stage.group}
        for position in range(self._next_compute, len(self.cycle)):
            if self.cycle[position] is stage:
                self._next_compute = position
                return self.rewind(position)
            if self.cycle[position].group is None:
                break
        if stage in self.cycle[self._next_compute :]:
            del self.cycle[self.cycle.index(stage, self._next_compute)]
        self.cycle.insert(self._next_compute, stage)
        return self.rewind(self._next_compute)

    def end_sweep(self, *, complete: bool) -> list[Stage]:
        """The next sweep begins with the first stage. An incomplete one says nothing of the order."""
        unvisited = [stage for stage in self.cycle[self._next_compute :] if self._is_wanted(stage)]
        num_visited, self._next_compute, self._entered = self._next_compute, 0, -1
        groups, self._groups = self._groups, frozenset()
        if complete and not unvisited:
            self._next_load, self._is_ahead = self._next_load if self._is_ahead else 0, False
            return []
        if complete and not num_visited and not groups:
            return []  # what is loaded is needed next, as before
        if complete and num_visited:
            behind = self.cycle[num_visited:]
            self.cycle[num_visited:] = [stage for stage in behind if stage.group is not None]
        return self.rewind(0)

    # --- starting over ---

    def stream(self, stages: Iterable[Stage]) -> list[Stage]:
        """Makes these the streamed stages."""
        self.cycle = list(stages)
        return self.rewind(0)

    def rewind(self, position: int) -> list[Stage]:
        """Loads on from `position` of the cycle. The ring keeps only what the running sweep needs before that."""
        kept = {stage for stage in self.cycle[self._next_compute : position] if self._is_wanted(stage)}
        self._next_load, self._is_ahead = position, False
        dropped = [stage for stage in self._stages if not stage.resident and stage not in kept]
        for stage in dropped:
            if stage.state is StageState.LOADING:
                stage.stale = True
        self.choose_again()
        return [stage for stage in dropped if stage.state is StageState.READY]

    def find_missing(self) -> None:
        """Looks for resident stages that are to be loaded, and maps the memory of all of them at once.

        A mapping waits for the page faults of threads that read. One mapping for each stage, behind each other, would
        hold up the event loop.
        """
        missing = [stage for stage in self._stages if stage.resident and stage.state is StageState.EMPTY]
        new = [stage for stage in missing if stage not in self._missing]
        buffers = Buffer.side_by_side([stage.layout.slot_bytes for stage in new])
        self._lock.add(buffers)
        known = self._missing | dict(zip(new, buffers, strict=True))
        self._missing = {stage: known.pop(stage) for stage in missing}
        for buffer in known.values():  # of stages that are no longer resident
            buffer.close()
        self.choose_again()
