"""What the loading agents read next: what a sweep needs first, of what has a place in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import anyio

from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.storage.buffers import Buffer, BufferPool


class LoadOrder:
    """The cycle of streamed stages, sweep after sweep, and the resident stages that are not in memory yet.

    A streamed stage waits for a free buffer of the ring; a resident one has memory of its own, and waits for nothing.
    Event-loop side only, but the compute thread calls `is_next` and `enter`.

    Args:
        stages: All stages, in the order they are expected to be computed in.
        ring: The buffers that streamed stages pass through.
        free: Gives the buffer of a READY streamed stage back.
        pinned: Page-locked memory for resident stages.
    """

    def __init__(
        self, stages: Sequence[Stage], ring: BufferPool, free: Callable[[Stage], None], *, pinned: bool
    ) -> None:
        self._stages = stages
        self._ring = ring
        self._free = free
        self._pinned = pinned
        # All mutable state. `cycle` has the streamed stages as the model visits them; `_next_load` is where the loading
        # agents are in it, `_next_compute` where the sweep is; `_entered` numbers the stage that it entered last.
        # `_missing` are the resident stages that nobody reads yet, with their memory. `_changed` wakes agents that
        # found nothing to read, or were held back.
        self.cycle = [stage for stage in stages if not stage.resident]
        self._next_load = 0
        self._next_compute = 0
        self._entered = -1
        self._missing: deque[tuple[Stage, Buffer]] = deque()
        self._held_back = False
        self._changed = anyio.Event()
        self.find_missing()

    # --- for the loading agents ---

    async def claim(self) -> tuple[Stage, Buffer]:
        """Waits for the next stage to load; it is LOADING then, into that buffer. A cancelled wait takes nothing."""
        while self._held_back or not (stages := [*self._next_missing(), *self._next_streamed()]):
            await self._changed.wait()
        stage = min(stages, key=self._distance)
        if stage.resident:
            _, buffer = self._missing.popleft()
        else:
            self._next_load = (self._next_load + 1) % len(self.cycle)
            buffer = self._ring.acquire_nowait()
        stage.start_loading()
        return stage, buffer

    def _next_missing(self) -> Iterable[Stage]:
        return [self._missing[0][0]] if self._missing else ()

    def _next_streamed(self) -> Iterable[Stage]:
        if not self.cycle or not self._ring.statistics().num_free:
            return ()
        stage = self.cycle[self._next_load]
        return [stage] if stage.state is StageState.EMPTY else ()

    def _distance(self, stage: Stage) -> int:
        """How many stages there are until this one is needed."""
        return (stage.idx - self._entered - 1) % len(self._stages)

    def wake(self) -> None:
        """A buffer is free, or a stage is to be loaded."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    # --- for the sweeps ---

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within the block no agent begins another load; not to be nested."""
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
            self.wake()

    def is_next(self, stage: Stage) -> bool:
        """Whether it comes in the order that is known; what is resident may be entered at any time."""
        if stage.resident:
            return True
        return self._next_compute < len(self.cycle) and self.cycle[self._next_compute] is stage

    def enter(self, stage: Stage) -> None:
        """It is computed next."""
        self._entered = stage.idx
        if not stage.resident:
            self._next_compute += 1

    def reorder(self, stage: Stage) -> None:
        """The model visits its stages in another order than was known: learn it, and load on from here."""
        if stage in self.cycle[self._next_compute :]:
            del self.cycle[self.cycle.index(stage, self._next_compute)]
        self.cycle.insert(self._next_compute, stage)
        self.rewind(self._next_compute)

    def end_sweep(self, *, complete: bool) -> None:
        """The next one begins with the first stage. One that did not come to its end says nothing of the order."""
        visited, self._next_compute, self._entered = self._next_compute, 0, -1
        if not complete:
            self.rewind(0)
        elif 0 < visited < len(self.cycle):
            del self.cycle[visited:]  # the model did not visit these
            self.rewind(0)

    # --- starting over ---

    def stream(self, stages: Iterable[Stage]) -> None:
        """Makes these the streamed stages, and looks for resident ones that are to be loaded."""
        self.cycle = list(stages)
        self.rewind(0)
        self.find_missing()

    def rewind(self, position: int) -> None:
        """Empties the ring and loads on from `position` of the cycle."""
        self._next_load = position
        for stage in self._stages:
            if stage.resident:
                continue
            if stage.state is StageState.READY:
                self._free(stage)
            elif stage.state is StageState.LOADING:
                stage.stale = True
        self.wake()

    def find_missing(self) -> None:
        """Looks for resident stages that are to be loaded, and makes room for all of them at once.

        Mapping memory waits for page faults of threads that read; one by one, behind each, it would hold the event loop
        up.
        """
        missing = [stage for stage in self._stages if stage.resident and stage.state is StageState.EMPTY]
        known = dict(self._missing)
        new = [stage for stage in missing if stage not in known]
        buffers = Buffer.side_by_side([stage.layout.slot_bytes for stage in new], pinned=self._pinned)
        places = known | dict(zip(new, buffers, strict=True))
        self._missing = deque((stage, places.pop(stage)) for stage in missing)
        for buffer in places.values():  # of stages that do not stay after all
            buffer.close()
        self.wake()
