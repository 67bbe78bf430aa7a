"""How late the event loop runs what is due, while the engine has work."""

from __future__ import annotations

import asyncio
from collections import deque

_SECONDS_BETWEEN = 0.05
_MAX_SAMPLES = 1200  # the last minute of work


class LoopLag:
    """Has the event loop call it every 50 ms while the engine has work, and notes how late each call is.

    A late call says that something blocked the loop: other code of the process, or a thread that kept the interpreter's
    lock. Timers of an event loop have a resolution of about 1 ms. Event-loop side only.
    """

    def __init__(self) -> None:
        # All mutable state: seconds of the last calls, and the timer of the next one with the time at which it is due.
        self._lags: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def begin(self) -> None:
        """The engine has work; does nothing if it had some before."""
        if self._timer is None:
            self._call_later(asyncio.get_running_loop())

    def pause(self) -> None:
        """The engine has no work."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def milliseconds(self) -> dict[str, float]:
        """The median ("p50"), the 99th percentile ("p99") and the longest ("max") of the last minute of work, in ms.

        All are 0.0 before the first call.
        """
        lags = sorted(self._lags) or [0.0]
        last = len(lags) - 1
        return {
            "p50": 1000 * lags[round(0.5 * last)],
            "p99": 1000 * lags[round(0.99 * last)],
            "max": 1000 * lags[last],
        }

    def _call_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + _SECONDS_BETWEEN
        self._timer = loop.call_at(self._due, self._note, loop)

    def _note(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lags.append(max(0.0, loop.time() - self._due))
        self._call_later(loop)
