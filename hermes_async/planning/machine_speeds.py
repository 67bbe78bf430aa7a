"""The speeds of reading and computing on a machine: measured by the Layer Profiler, or estimated."""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, takewhile

from hermes_async.config import format_count

HANDOVER_SECONDS = 0.3e-3
"""Extra seconds of a streamed stage if they were not measured: two hops between threads."""

_FASTER_NATIVE = 1.1  # torch's own kernels count as faster above this gain


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes a second that `num_agents` get together, when each reads `read_bytes` at once."""

    num_agents: int
    read_bytes: int
    bytes_per_s: float


def without_noise(disk: Sequence[DiskRate]) -> tuple[DiskRate, ...]:
    """Replaces all rates that are close to the highest by their median.

    A rate is measured for a second, with an error of some percent, so the best of many rates is too high. The rate of
    one agent is never raised: the disk is idle between two of its reads.
    """
    highest = max((rate.bytes_per_s for rate in disk), default=0.0)
    plateau = statistics.median([rate.bytes_per_s for rate in disk if rate.bytes_per_s >= 0.85 * highest] or [0.0])

    def is_on_plateau(rate: DiskRate) -> bool:
        return rate.bytes_per_s >= (plateau if rate.num_agents == 1 else 0.9 * plateau)

    return tuple(replace(rate, bytes_per_s=plateau) if is_on_plateau(rate) else rate for rate in disk)


@dataclass(frozen=True, slots=True)
class MachineSpeeds:
    """The speeds of a model on a machine. A layer, or a part of it, takes time in proportion to its bytes.

    Attributes:
        disk: One rate for each number of agents and read size.
        layer_seconds: To compute one byte of a layer's weights, by tokens of the sweep.
        head_seconds: To compute one byte of the head's weights, by outputs of the sweep.
        sweep_seconds: Outside of the stages (packing, sampling, delivering), by outputs of the sweep.
        handover_seconds: Extra seconds of each streamed stage, and of each expert.
        source: Where the figures come from, for messages.
        notes: Other findings, one line each, for messages.
        native_gain: Speed of torch's own kernels as a multiple of oneDNN's, by tokens.
        native_tokens: The most tokens of a sweep that uses torch's own kernels.
        expert_uses: The probability that a token uses the likeliest expert of a layer, the next one, and so on; empty
            if that was not measured.
    """

    disk: tuple[DiskRate, ...]
    layer_seconds: Mapping[int, float]
    head_seconds: Mapping[int, float]
    sweep_seconds: Mapping[int, float]
    handover_seconds: float
    source: str
    measured: bool
    notes: tuple[str, ...] = ()
    native_gain: Mapping[int, float] = field(default_factory=dict)
    native_tokens: int = 0
    expert_uses: tuple[float, ...] = ()

    @property
    def agent_counts(self) -> tuple[int, ...]:
        """Numbers of loading agents that the disk was measured with."""
        return tuple(sorted({rate.num_agents for rate in self.disk if rate.bytes_per_s > 0}))

    def seconds_per_byte(self, num_tokens: float, num_outputs: int) -> tuple[float, float]:
        """Seconds to compute one byte of a layer, and one byte of the head."""
        head_s = interpolate(self.head_seconds, num_outputs) if num_outputs else 0.0
        return interpolate(self.layer_seconds, num_tokens), head_s

    def outside_seconds(self, num_outputs: int) -> float:
        """Seconds of a sweep outside of its stages."""
        return interpolate(self.sweep_seconds, max(1, num_outputs))

    def read_seconds(self, nbytes: int, num_agents: int) -> float:
        """Seconds of one agent to read `nbytes` at once, if `num_agents` read at the same time."""
        return interpolate(read_curve(self.disk, num_agents), nbytes)

    def with_dequantizing(self, larger: float, seconds_per_byte: float, *, in_head: bool) -> MachineSpeeds:
        """The speeds for weights that are dequantized before they are multiplied. Measured speeds count that already.

        Args:
            larger: Bytes of the dequantized weights for each stored byte.
            seconds_per_byte: To dequantize one stored byte.
            in_head: Whether the head is stored so, too.
        """

        def dequantized(curve: Mapping[int, float]) -> dict[int, float]:
            return {count: seconds * larger + seconds_per_byte for count, seconds in curve.items()}

        head_s = dequantized(self.head_seconds) if in_head else self.head_seconds
        return replace(self, layer_seconds=dequantized(self.layer_seconds), head_seconds=head_s)

    def with_fastest_kernels(self) -> MachineSpeeds:
        """The speeds with torch's own kernels for sweeps of few tokens, as long as those are faster."""
        faster = list(takewhile(lambda count: self.native_gain[count] > _FASTER_NATIVE, sorted(self.native_gain)))
        if not faster:
            return self
        last = faster[-1]

        def gain(count: int) -> float:
            """The gain at `count` tokens, or at the next smaller measured number."""
            return self.native_gain[faster[max(0, bisect_right(faster, count) - 1)]] if count <= last else 1.0

        def with_gain(curve: Mapping[int, float]) -> dict[int, float]:
            known = {count: interpolate(curve, count) for count in (*faster, last + 1)} if curve else {}
            return {count: seconds / gain(count) for count, seconds in {**known, **curve}.items()}

        layer_s, head_s = with_gain(self.layer_seconds), with_gain(self.head_seconds)
        return replace(self, layer_seconds=layer_s, head_seconds=head_s, native_tokens=last)

    @property
    def explanation(self) -> tuple[str, ...]:
        """The kernels and the notes, one line each."""
        faster = ", ".join(
            f"{gain:.1f} times at {count}"
            for count, gain in self.native_gain.items()
            if gain > _FASTER_NATIVE and count <= (self.native_tokens or count)
        )
        kernels = "torch's default, as " + ("transformers" if self.measured else "nothing was measured here")
        if self.native_tokens:
            sweeps = f"sweeps of up to {format_count(self.native_tokens, 'token')}"
            kernels = f"torch's own in {sweeps} ({faster} as fast as oneDNN's), which round otherwise than transformers"
        elif faster:
            kernels += f"; torch's own would be {faster}, and round otherwise: kernels='fastest'"
        return (f"kernels: {kernels}", *self.notes)


@lru_cache(maxsize=64)
def read_curve(disk: tuple[DiskRate, ...], num_agents: int) -> Mapping[int, float]:
    """Seconds of one agent for a read, by its bytes, if `num_agents` read at the same time.

    For a number of agents that was not measured, all share the rate of the next smaller number.
    """
    known = sorted({rate.num_agents for rate in disk if rate.bytes_per_s > 0})
    nearest = known[max(0, bisect_right(known, num_agents) - 1)] if known else 0
    seconds = {
        rate.read_bytes: num_agents * rate.read_bytes / rate.bytes_per_s
        for rate in sorted(disk, key=lambda rate: rate.read_bytes)
        if rate.num_agents == nearest and rate.bytes_per_s > 0
    }
    # The curve never falls: a larger read does not take less time.
    return dict(zip(seconds, accumulate(seconds.values(), max), strict=True))


def interpolate(curve: Mapping[int, float], x: float) -> float:
    """The value at `x`, on straight lines through the points; 0.0 without points.

    Below the first point, it is on the first line, or in proportion to `x` if that is more. To the right of a point it
    is never below it.
    """
    points = sorted(curve.items())
    if not points:
        return 0.0
    if len(points) == 1:
        size, seconds = points[0]
        return seconds if x <= size or not size else seconds * x / size
    right = min(max(bisect_left([size for size, _ in points], x), 1), len(points) - 1)
    (left_x, left_y), (right_x, right_y) = points[right - 1], points[right]
    slope = (right_y - left_y) / (right_x - left_x)
    if x < left_x:
        return max(left_y + slope * (x - left_x), left_y * x / left_x)
    return max(left_y, left_y + slope * (x - left_x))


def estimated(bytes_per_s: float = 2 << 30, start_s: float = 0.7e-3) -> MachineSpeeds:
    """The speeds of a small current machine, for when nothing was measured: it computes 10 GiB/s for one token.

    Args:
        bytes_per_s: Of the disk.
        start_s: Seconds to start a read.
    """
    disk = tuple(
        DiskRate(agents, size, agents * size / (agents * size / bytes_per_s + start_s))
        for agents in (1, 2, 3, 4)
        for size in (1 << 20, 16 << 20, 256 << 20)
    )
    by_tokens = {count: times / (10 << 30) for count, times in ((1, 1.0), (8, 1.1), (64, 3.0), (256, 9.0))}
    return MachineSpeeds(
        disk=disk,
        layer_seconds=by_tokens,
        head_seconds=by_tokens,
        sweep_seconds={1: 2e-3, 64: 20e-3},
        handover_seconds=HANDOVER_SECONDS,
        source="estimated, as nothing was measured here: run `hermes-async profile`",
        measured=False,
    )
