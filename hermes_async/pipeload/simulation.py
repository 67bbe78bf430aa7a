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
        self.read_s: dict[tuple[int, int], float] = {}
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
            self._start_loads()
            step = min(left, self._until_loaded())
            self._pass(step)
            left -= step

    def _wait_for(self, idx: int) -> None:
        while idx not in self.loaded:
            self._start_loads()
            self._pass(self._until_loaded())

    def _start_loads(self) -> None:
        while len(self.loading) < self.num_agents and self.next_load - self.num_computed < self.num_buffers:
            self.loading[self.next_load] = 1.0
            self.next_load += 1

    def _until_loaded(self) -> float:
        if not self.loading:
            return float("inf")
        return min(left * self._read_s(idx) for idx, left in self.loading.items())

    def _pass(self, seconds: float) -> None:
        if seconds == float("inf"):
            return
        self.now += seconds
        for idx, left in list(self.loading.items()):
            left -= seconds / self._read_s(idx)
            self.loading[idx] = left
        for idx in [idx for idx, left in self.loading.items() if left <= 1e-9]:
            del self.loading[idx]
            self.loaded.add(idx)

    def _read_s(self, idx: int) -> float:
        key = self.order[idx % len(self.order)][0], len(self.loading)
        if key not in self.read_s:
            self.read_s[key] = self.speeds.read_seconds(*key)
        return self.read_s[key]
