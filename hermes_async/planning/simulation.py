"""PIPELOAD on paper: when loads, computations and frees would happen, from what each of them takes.

The rules are those of `hermes_async.pipeload.pipeline`: loading agents take the streamed stages in their order, sweep
after sweep, whenever a buffer is free; reads that run at one time share the disk; a stage is computed when it is there
and all before it are done, and its buffer is then free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hermes_async.planning.speeds import Speeds


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage takes.

    Attributes:
        read_bytes: 0 where it is resident.
        compute_seconds: Handing it over counted in.
    """

    read_bytes: int
    compute_seconds: float


def sweep_seconds(
    stages: Sequence[StageCost], *, num_agents: int, num_buffers: int, speeds: Speeds, num_sweeps: int, rest_s: float
) -> list[float]:
    """How long each of so many sweeps in a row takes, beginning with a full ring.

    Args:
        rest_s: What passes between the last stage of a sweep and the first one of the next, while reads go on.
    """
    # Runs of resident stages are computed as one, which changes nothing and saves most of the work.
    order: list[tuple[int, float, float]] = []  # a streamed stage: bytes, its computation, that of what is before it
    before = 0.0
    for stage in stages:
        if stage.read_bytes:
            order.append((stage.read_bytes, stage.compute_seconds, before))
            before = 0.0
        else:
            before += stage.compute_seconds
    if not order:
        return [before + rest_s] * num_sweeps
    return _Simulation(order, before + rest_s, num_agents, num_buffers, speeds).run(num_sweeps)


class _Simulation:
    """State: the moment; loads under way, each with when it ends if no other begins or ends; what is in the ring."""

    def __init__(
        self,
        order: Sequence[tuple[int, float, float]],
        tail_s: float,
        num_agents: int,
        num_buffers: int,
        speeds: Speeds,
    ) -> None:
        self.order = order
        self.tail_s = tail_s
        self.num_agents = num_agents
        # A stage that is in the ring is not read again before it is computed.
        self.num_buffers = min(num_buffers, len(order))
        self.speeds = speeds
        self.read_s: dict[int, list[float]] = {}
        self.now = 0.0
        self.loading: list[tuple[float, int]] = []
        self.loaded = set(range(self.num_buffers))
        self.next_load = self.num_buffers
        self.num_computed = 0

    def run(self, num_sweeps: int) -> list[float]:
        seconds = []
        for _ in range(num_sweeps):
            started = self.now
            for _, compute_s, before_s in self.order:
                if before_s:
                    self._pass_until(self.now + before_s)
                while self.num_computed not in self.loaded:
                    self._end_load()
                self._pass_until(self.now + compute_s)
                self.loaded.remove(self.num_computed)
                self.num_computed += 1
                self._begin_loads(len(self.loading))
            self._pass_until(self.now + self.tail_s)
            seconds.append(self.now - started)
        return seconds

    def _pass_until(self, moment: float) -> None:
        while self.loading and min(self.loading)[0] <= moment:
            self._end_load()
        self.now = moment

    def _end_load(self) -> None:
        """Lets time pass until the next load ends."""
        ended = min(self.loading)
        self.loading.remove(ended)
        self.now, idx = ended
        self.loaded.add(idx)
        self._begin_loads(len(self.loading) + 1)

    def _begin_loads(self, num_before: int) -> None:
        """Begins as many as there are agents and buffers for; then all under way share the disk with so many.

        Args:
            num_before: Loads that shared it until now.
        """
        room = min(self.num_agents - len(self.loading), self.num_computed + self.num_buffers - self.next_load)
        num_loads, num_stages = len(self.loading) + room, len(self.order)
        if num_loads == 0 or (room == 0 and num_loads == num_before):
            return
        whole_s = self._read_seconds(num_loads)
        if num_loads != num_before and self.loading:
            before_s = self._read_seconds(num_before)
            self.loading = [
                (self.now + (end - self.now) * whole_s[idx % num_stages] / before_s[idx % num_stages], idx)
                for end, idx in self.loading
            ]
        for _ in range(room):
            self.loading.append((self.now + whole_s[self.next_load % num_stages], self.next_load))
            self.next_load += 1

    def _read_seconds(self, num_loads: int) -> list[float]:
        """What reading each stage takes while there are so many loads."""
        if num_loads not in self.read_s:
            of_size = {
                nbytes: self.speeds.read_seconds(nbytes, num_loads) for nbytes in {nbytes for nbytes, *_ in self.order}
            }
            self.read_s[num_loads] = [of_size[nbytes] for nbytes, *_ in self.order]
        return self.read_s[num_loads]
