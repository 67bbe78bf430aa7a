"""What sweeps take, learned as they run. Synchronous; does no I/O and looks at no clock."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from operator import itemgetter
from statistics import median_low
from typing import NamedTuple

_WINDOW = 5  # measurements of which the middle one counts: two may be outliers
_STALL_SHARE = 0.1  # of a sweep that counts as waiting for its weights; less comes of uneven stages
_FRESH_SWEEPS = 32  # often minutes: long enough for every usual size to come by, short enough to follow the machine


class _Measurement(NamedTuple):
    seconds: float  # first, so that measurements are ordered by it
    num_tokens: int
    sweep: int


class SweepTimes:
    """What sweeps took so far, and from that what the next one would take.

    Measurements are kept by power of two (1, 2-3, 4-7, ... tokens). Of each size the middle one of the last five
    counts, so a sweep that another process disturbed counts nothing, and a machine that became slower or faster is
    believed after three. Between sizes time grows linearly. Beyond the largest it grows in proportion, which is too
    much, as weights are passed over once for all tokens; below the smallest it falls in proportion, which is too
    little. Either way the error ends in a measurement: a larger sweep is tried as soon as even in proportion it fits,
    and one without drafted tokens wherever these might cost time.

    More tokens never take less: where sizes disagree, the one measured last is right. A size that was not measured in
    the last 32 sweeps is forgotten if a larger one was since. The largest are kept, because long prompts are rare and
    small sweeps say little about them; but these, and what was measured only once, take at most in proportion to what
    the next smaller one took since. So an old figure that is too high, or that of a cold first sweep, gives way as
    sweeps grow towards it, and one that is too low is put right by the first sweeps that it misleads.
    """

    def __init__(self) -> None:
        self._num_sweeps = 0
        self._sizes: dict[int, deque[_Measurement]] = {}
        self._reads: deque[float] = deque(maxlen=_WINDOW)
        self._curve: list[tuple[int, float]] = []

    def record(self, num_tokens: int, compute_seconds: float) -> None:
        """Learns from one whole sweep of at least one token; stalls are not part of `compute_seconds`."""
        self._num_sweeps += 1
        measurements = self._sizes.setdefault(num_tokens.bit_length(), deque(maxlen=_WINDOW))
        while measurements and self._is_stale(measurements[0]):
            measurements.popleft()
        measurements.append(_Measurement(compute_seconds, num_tokens, self._num_sweeps))
        self._curve = self._fit()

    def record_read(self, seconds: float) -> None:
        """Learns what reading one sweep's streamed weights takes; 0.0 where everything is resident."""
        self._reads.append(seconds)

    def record_stalls(self, sweep_seconds: float, stall_seconds: float) -> None:
        """Learns what reading takes from a sweep that waited `stall_seconds` of its time for weights.

        One that waited took as long as reading; another only says that reading takes no longer. How fast the reads
        themselves were would not do: while computing is the limit they come in bursts, which disks take faster.
        """
        waited = stall_seconds > _STALL_SHARE * sweep_seconds
        known = self.read_seconds
        self.record_read(sweep_seconds if waited or known is None else min(known, sweep_seconds))

    @property
    def read_seconds(self) -> float | None:
        return median_low(self._reads) if self._reads else None

    def compute_seconds(self, num_tokens: int) -> float | None:
        """What computing so many tokens would take; None while nothing was measured."""
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
        """What a sweep would take, as reading and computing overlap; None while either is unknown."""
        compute_seconds, read_seconds = self.compute_seconds(num_tokens), self.read_seconds
        if compute_seconds is None or read_seconds is None:
            return None
        return max(compute_seconds, read_seconds)

    def tokens_within(self, seconds: float, most: int) -> int:
        """The largest number of tokens up to `most` computed in `seconds`; `most` while nothing was measured."""
        if not self._curve:
            return most
        return bisect_right(range(1, most + 1), seconds, key=lambda num_tokens: self.compute_seconds(num_tokens) or 0.0)

    def _is_stale(self, measurement: _Measurement) -> bool:
        return measurement.sweep <= self._num_sweeps - _FRESH_SWEEPS

    def _fit(self) -> list[tuple[int, float]]:
        """Tokens and seconds, ascending in both, made from the newest size to the oldest."""
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
