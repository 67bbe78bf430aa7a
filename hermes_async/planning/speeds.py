"""What reading and computing take on a machine, in the terms that the planner predicts with."""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile

from hermes_async.config import format_count

_GIB = 1 << 30
_MIB = 1 << 20

HANDOVER_SECONDS = 0.3e-3
"""What a streamed stage costs beside its computation, where that was never measured: two hops between threads."""

_WORTH_NATIVE = 1.1  # times as fast as oneDNN's kernels, from where torch's own are said to be faster


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What the disk gives: bytes a second, with so many agents that read so much at once."""

    num_agents: int
    read_bytes: int
    bytes_per_s: float


def without_noise(disk: Sequence[DiskSpeed]) -> tuple[DiskSpeed, ...]:
    """The disk with one rate for all that comes within a tenth of what it gives at the most.

    Each rate is measured for a second, and is off by some percent. Who plans by the best of many would take the one
    that is off the most, and expect too much of it. What one agent gives is not made more: it leaves the disk alone
    between two reads, the longer the busier the processor is.
    """
    most = max((speed.bytes_per_s for speed in disk), default=0.0)
    plateau = statistics.median([speed.bytes_per_s for speed in disk if speed.bytes_per_s >= 0.85 * most] or [0.0])

    def settled(speed: DiskSpeed) -> DiskSpeed:
        least = plateau if speed.num_agents == 1 else 0.9 * plateau
        return replace(speed, bytes_per_s=plateau) if speed.bytes_per_s >= least else speed

    return tuple(settled(speed) for speed in disk)


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a model takes on a machine.

    A layer's time goes with its bytes, and so does that of a part of it; the head is told apart, because it computes
    only the positions whose logits are wanted.

    Attributes:
        disk: What was measured, each pair of agents and read size once.
        layer_seconds: By tokens in the sweep, of one byte of weights.
        head_seconds: By outputs of the sweep, of one byte of the head's weights.
        sweep_seconds: By outputs, what a sweep takes outside of its stages: packing, sampling, delivering.
        handover_seconds: What each streamed stage costs beside its computation.
        source: Where the figures come from, for people.
        measured: Whether they come from this machine.
        notes: What else was found, for people; a line each.
        native_gain: By tokens, how many times as fast torch's own kernels are as oneDNN's, which torch takes by itself.
        native_tokens: Sweeps of at most so many tokens are computed by torch's own.
        others: What the machine may be instead, where nothing was measured: a plan must do well on all of them.
    """

    disk: tuple[DiskSpeed, ...]
    layer_seconds: Mapping[int, float]
    head_seconds: Mapping[int, float]
    sweep_seconds: Mapping[int, float]
    handover_seconds: float
    source: str
    measured: bool
    notes: tuple[str, ...] = ()
    native_gain: Mapping[int, float] = field(default_factory=dict)
    native_tokens: int = 0
    others: tuple[Speeds, ...] = ()

    def with_fastest_kernels(self) -> Speeds:
        """With torch's own kernels for the sweeps of few tokens that they are faster for."""
        counts = sorted(self.native_gain)
        ahead = list(takewhile(lambda count: self.native_gain[count] > _WORTH_NATIVE, counts))
        if not ahead:
            return self
        most, gains = ahead[-1], [self.native_gain[count] for count in ahead]

        def faster(curve: Mapping[int, float]) -> dict[int, float]:
            known = {**{count: at(curve, count) for count in (*ahead, most + 1)}, **curve} if curve else {}
            return {
                count: seconds / gains[max(0, bisect_right(ahead, count) - 1)] if count <= most else seconds
                for count, seconds in known.items()
            }

        return replace(
            self,
            layer_seconds=faster(self.layer_seconds),
            head_seconds=faster(self.head_seconds),
            native_tokens=most,
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """Which kernels are taken and what else was found, for people; a line each."""
        ahead = [
            f"{gain:.1f} times at {count}"
            for count, gain in self.native_gain.items()
            if gain > _WORTH_NATIVE and count <= (self.native_tokens or count)
        ]
        if self.native_tokens:
            tokens = format_count(self.native_tokens, "token")
            kernels = (
                f"kernels: torch's own in sweeps of up to {tokens} ({', '.join(ahead)} as fast as oneDNN's), which "
                "round otherwise than transformers"
            )
        elif not self.measured:
            kernels = "kernels: torch's default, as nothing was measured here"
        else:
            left = f"; torch's own would be {', '.join(ahead)}, and round otherwise: kernels='fastest'" if ahead else ""
            kernels = f"kernels: torch's default, as transformers{left}"
        return (kernels, *self.notes)

    @property
    def num_agents(self) -> tuple[int, ...]:
        """The numbers of loading agents that the disk was measured with."""
        return tuple(sorted({speed.num_agents for speed in self.disk if speed.bytes_per_s > 0}))

    def compute_seconds(self, nbytes: int, head_bytes: int, num_tokens: int, num_outputs: int) -> float:
        """What a sweep computes: layers, head, and what is outside of them.

        Args:
            nbytes: Of weights, without those of the head.
        """
        layer_s, head_s = self.seconds_per_byte(num_tokens, num_outputs)
        return nbytes * layer_s + head_bytes * head_s + self.outside_seconds(num_outputs)

    def seconds_per_byte(self, num_tokens: int, num_outputs: int) -> tuple[float, float]:
        """What computing one byte of weights takes: of layers, and of the head."""
        head_s = at(self.head_seconds, num_outputs) if num_outputs else 0.0
        return at(self.layer_seconds, num_tokens), head_s

    def outside_seconds(self, num_outputs: int) -> float:
        """What a sweep takes outside of its stages."""
        return at(self.sweep_seconds, max(1, num_outputs))

    def read_seconds(self, nbytes: int, num_agents: int) -> float:
        """What one agent takes to read `nbytes` at once while so many agents read as much."""
        return read_seconds(self.disk, nbytes, num_agents)


def read_seconds(disk: tuple[DiskSpeed, ...], nbytes: int, num_agents: int) -> float:
    """What one agent takes to read `nbytes` at once while so many agents read as much; 0.0 where nothing is known."""
    return _between(_points_for(disk, num_agents), nbytes)


@lru_cache(maxsize=64)
def _points_for(disk: tuple[DiskSpeed, ...], num_agents: int) -> tuple[tuple[float, float], ...]:
    """Bytes and seconds of one read beside `num_agents - 1` others; between what was measured, in proportion."""
    known = sorted({speed.num_agents for speed in disk if speed.bytes_per_s > 0})
    if not known:
        return ()
    right = bisect_left(known, num_agents)
    if right < len(known) and known[right] == num_agents:
        return _points(disk, num_agents)
    if right in (0, len(known)):  # fewer share the disk less well, more share the same
        nearest = known[min(right, len(known) - 1)]
        return tuple((size, seconds * num_agents / nearest) for size, seconds in _points(disk, nearest))
    low, high = known[right - 1], known[right]
    share = (num_agents - low) / (high - low)
    both = zip(_points(disk, low), _points(disk, high), strict=False)
    return tuple((size, first + share * (second - first)) for (size, first), (_, second) in both)


def _points(disk: tuple[DiskSpeed, ...], num_agents: int) -> tuple[tuple[float, float], ...]:
    measured = {
        speed.read_bytes: num_agents * speed.read_bytes / speed.bytes_per_s
        for speed in disk
        if speed.num_agents == num_agents and speed.bytes_per_s > 0
    }
    points: list[tuple[float, float]] = []
    for size, seconds in sorted(measured.items()):  # a larger read never takes less
        points.append((size, max(seconds, points[-1][1] if points else 0.0)))
    return tuple(points)


def at(curve: Mapping[int, float], count: int) -> float:
    """Between what was measured on a straight line, beyond it on the last one; 0.0 where nothing was."""
    return _between(tuple(sorted(curve.items())), count)


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    if not points:
        return 0.0
    if len(points) == 1:
        size, seconds = points[0]
        return seconds if x <= size or not size else seconds * x / size
    right = min(max(bisect_left([size for size, _ in points], x), 1), len(points) - 1)
    (left_x, left_y), (right_x, right_y) = points[right - 1], points[right]
    slope = (right_y - left_y) / (right_x - left_x)
    if x < left_x:  # what is smaller than all takes less, and never nothing
        return max(left_y + slope * (x - left_x), left_y * x / left_x)
    return max(left_y, left_y + slope * (x - left_x))


def estimated() -> Speeds:
    """What a small machine of these years does, for when nothing was measured.

    500 MiB/s from disk, a millisecond to start a read, 10 GiB/s of weights for one token, and three times that time for
    64 tokens. Or with a fast disk: 3 GiB/s, and half a millisecond to start a read.
    """
    fast = _estimated(3 * _GIB, 0.5e-3)
    return replace(_estimated(500 * _MIB, 1e-3), others=(fast,))


def _estimated(bytes_per_s: float, start_s: float) -> Speeds:
    sizes = (_MIB, 16 * _MIB, 256 * _MIB)
    disk = tuple(
        DiskSpeed(agents, size, agents * size / (agents * size / bytes_per_s + start_s))
        for agents in (1, 2, 3, 4)
        for size in sizes
    )
    by_tokens = {count: times / (10 * _GIB) for count, times in ((1, 1.0), (8, 1.1), (64, 3.0), (256, 9.0))}
    return Speeds(
        disk,
        by_tokens,
        by_tokens,
        {1: 2e-3, 64: 20e-3},
        HANDOVER_SECONDS,
        "estimated, as nothing was measured here: run `hermes-async profile`",
        measured=False,
    )
