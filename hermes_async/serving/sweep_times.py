"""Estimates the seconds of a sweep from earlier sweeps. Synchronous; does no I/O and reads no clock."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from operator import itemgetter
from statistics import median_low
from typing import NamedTuple

_WINDOW = 5  # measurements whose median counts, so two may be outliers
_STALL_SHARE = 0.1  # a sweep that stalls for more than this share waits for reads; uneven stages cause shorter stalls
_FRESH_SWEEPS = 32  # often minutes: long enough to see all usual sizes, short enough to follow the machine


class _Measurement(NamedTuple):
    seconds: float  # first, so that measurements are ordered by it
    num_tokens: int
    sweep: int


class SweepTimes:
    """Measured times of sweeps, and an estimate for the next one.

    Measurements are kept by size: 1, 2-3, 4-7, ... tokens. The median of the last five of a size counts. So a sweep
    that another process disturbed has no effect, and a slower or faster machine is noticed after three. Between two
    sizes, time grows linearly. Above the largest size, time grows in proportion to tokens, which is too high, because
    the weights are read from memory once for all tokens. Below the smallest size it falls in proportion, which is too
    low. Both errors lead to a measurement that corrects them: a larger sweep runs once its estimate fits, and a sweep
    without drafts runs once drafts seem to cost time.

    More tokens never take less time: if sizes contradict each other, the latest measurement holds. A size that was not
    measured in the last 32 sweeps is dropped if a larger one was. The largest sizes are kept, because long prompts are
    rare. An old or single measurement counts at most in proportion to the next smaller size. So an old figure that is
    too high, or that of a cold first sweep, is corrected as sweeps grow towards its size. One that is too low is
    corrected by the first sweep that relies on it.
    """

    def __init__(self) -> None:
        self._num_sweeps = 0
        self._sizes: dict[int, deque[_Measurement]] = {}
        self._reads: deque[float] = deque(maxlen=_WINDOW)
        self._curve: list[tuple[int, float]] = []

    def record(self, num_tokens: int, compute_seconds: float) -> None:
        """Learns from one sweep of at least one token; `compute_seconds` is without stalls."""
        self._num_sweeps += 1
        measurements = self._sizes.setdefault(num_tokens.bit_length(), deque(maxlen=_WINDOW))
        while measurements and self._is_stale(measurements[0]):
            measurements.popleft()
        measurements.append(_Measurement(compute_seconds, num_tokens, self._num_sweeps))
        self._curve = self._fit()

    def record_read(self, seconds: float) -> None:
        """Learns the seconds to read one sweep's streamed weights; 0.0 if everything is resident."""
        self._reads.append(seconds)

    def record_stalls(self, sweep_seconds: float, stall_seconds: float) -> None:
        """Learns the read time from a sweep that waited for weights for `stall_seconds`.

        A sweep that waited took as long as its reads. For another, its time is an upper bound. The times of single
        reads are no measure: while computing is the limit, reads come in bursts, which disks serve faster.
        """
        waited = stall_seconds > _STALL_SHARE * sweep_seconds
        known = self.read_seconds
        self.record_read(sweep_seconds if waited or known is None else min(known, sweep_seconds))

    @property
    def read_seconds(self) -> float | None:
        return median_low(self._reads) if self._reads else None

    def compute_seconds(self, num_tokens: int) -> float | None:
        """The expected seconds to compute `num_tokens`; None before the first measurement."""
        if not self._curve:
            return None
        right = bisect_left(self._curve, num_tokens, key=itemgetter(0))
        if right in (0, len(self._curve)):
            known_tokens, known_seconds = self._curve[min(right, len(self._curve) - 1)]
            return known_seconds * (num_tokens / known_tokens)
        (left_tokens, left_seconds), (right_tokens, right_seconds) = self._curve[right - 1 : right + 1]
        more_seconds = (right_seconds - left_seconds) * (num_tokens - left_tokens) / (right_tokens - left_tokens)
        return min(left_seconds + more_seconds, right_seconds)  # rounding must not break the order

    def sweep_seconds(self, num_tokens: int) -> float | None:
        """The longer of reading and computing, which overlap; None while either is unknown."""
        compute_seconds, read_seconds = self.compute_seconds(num_tokens), self.read_seconds
        if compute_seconds is None or read_seconds is None:
            return None
        return max(compute_seconds, read_seconds)

    def tokens_within(self, seconds: float, most: int) -> int:
        """The most tokens, up to `most`, that are computed in `seconds`; `most` before the first measurement."""
        if not self._curve:
            return most
        return bisect_right(range(1, most + 1), seconds, key=lambda num_tokens: self.compute_seconds(num_tokens) or 0.0)

    def _is_stale(self, measurement: _Measurement) -> bool:
        return measurement.sweep <= self._num_sweeps - _FRESH_SWEEPS

    def _fit(self) -> list[tuple[int, float]]:
        """Points (tokens, seconds), ascending in both. Sizes are added from the newest to the oldest."""
        curve: list[tuple[int, float]] = []
        for measurements in sorted(self._sizes.values(), key=lambda measurements: -measurements[-1].sweep):
            seconds, num_tokens, _ = median_low(measurements)
            stale = self._is_stale(measurements[-1])
            right = bisect_left(curve, num_tokens, key=itemgetter(0))
            if right < len(curve):
                if stale:
                    continue
                seconds = min(seconds, curve[right][1])
            if right > 0:
                left_tokens, left_seconds = curve[right - 1]
                if stale or len(measurements) == 1:
                    seconds = min(seconds, left_seconds * (num_tokens / left_tokens))
                seconds = max(seconds, left_seconds)
            curve.insert(right, (num_tokens, seconds))
        return curve
