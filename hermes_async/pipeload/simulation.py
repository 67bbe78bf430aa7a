"""PIPELOAD on paper: when loads, computations and frees would happen, from what each of them takes.

The rules are those of `hermes_async.pipeload.pipeline`: loading agents take the streamed stages in their order, sweep
after sweep, whenever a buffer is free; reads that run at one time share the disk; a stage is computed when it is there
and all before it are done, and its buffer is then free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hermes_async.pipeload.speeds import Speeds


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
    """State: the moment, loads under way with the share of each that is left, and what is read and computed so far."""

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
        self.read_s: dict[int, list[float]] = {0: []}
        self.now = 0.0
        self.loading: dict[int, float] = {}
        self.loaded: set[int] = set(range(self.num_buffers))
        self.next_load = self.num_buffers
        self.num_computed = 0

    def run(self, num_sweeps: int) -> list[float]:
        seconds = []
        for sweep in range(num_sweeps):
            started = self.now
            for position, (_, compute_s, before_s) in enumerate(self.order):
                idx = sweep * len(self.order) + position
                self._advance(before_s)
                self._wait_for(idx)
                self._advance(compute_s)
                self.loaded.discard(idx)
                self.num_computed += 1
            self._advance(self.tail_s)
            seconds.append(self.now - started)
        return seconds

    def _advance(self, seconds: float) -> None:
        """Lets so much time pass."""
        left = seconds
        while left > 0:
            left -= self._step(left)

    def _wait_for(self, idx: int) -> None:
        while idx not in self.loaded:
            self._step(float("inf"))

    def _start_loads(self) -> None:
        while len(self.loading) < self.num_agents and self.next_load - self.num_computed < self.num_buffers:
            self.loading[self.next_load] = 1.0
            self.next_load += 1

    def _step(self, most_s: float) -> float:
        """Lets time pass until a load ends, or `most_s` if that is less; returns how much it was."""
        self._start_loads()
        whole_s, num_stages = self._read_seconds(len(self.loading)), len(self.order)
        loads = [(idx, left, whole_s[idx % num_stages]) for idx, left in self.loading.items()]
        seconds = min([most_s, *(left * each_s for _, left, each_s in loads)])
        self.now += seconds
        for idx, left, each_s in loads:
            left -= seconds / each_s
            if left <= 1e-9:
                del self.loading[idx]
                self.loaded.add(idx)
            else:
                self.loading[idx] = left
        return seconds

    def _read_seconds(self, num_loads: int) -> list[float]:
        """What reading each stage takes while there are so many loads."""
        if num_loads not in self.read_s:
            of_size = {
                nbytes: self.speeds.read_seconds(nbytes, num_loads) for nbytes in {nbytes for nbytes, *_ in self.order}
            }
            self.read_s[num_loads] = [of_size[nbytes] for nbytes, *_ in self.order]
        return self.read_s[num_loads]
