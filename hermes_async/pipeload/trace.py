"""What the agents do and when, as events that Perfetto and chrome://tracing show.

Source: the Trace Event Format (Chrome), its JSON array form, which may be cut off anywhere and can still be read.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]

_ROWS = ("loading agent", "inference agent", "daemon agent", "sweeps")
"""What rows begin with, in the order in which they are drawn."""


class Trace:
    """Collects events; any thread may add some, and one drains them now and then.

    A row is a line of the picture: one for each loading agent, one for computing, one for the daemon, one for sweeps.
    Times are seconds on `time.perf_counter`'s clock; events have microseconds since the trace began.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        # All mutable state, guarded by the lock: events that were not drained, and each row's number.
        self._events: deque[Event] = deque()
        self._rows: dict[str, int] = {}
        self._add({"ph": "M", "name": "process_name", "tid": 0, "args": {"name": "hermes_async"}})

    def span(self, row: str, name: str, started: float, ended: float, **args: object) -> None:
        """Something that took from `started` to `ended`."""
        duration = self._microseconds(ended) - self._microseconds(started)
        event = {"ph": "X", "name": name, "ts": self._microseconds(started), "dur": max(0.0, duration), "args": args}
        self._add(event, row)

    def count(self, name: str, **values: int) -> None:
        """What there is of something now."""
        self._add({"ph": "C", "name": name, "ts": self._microseconds(time.perf_counter()), "tid": 0, "args": values})

    def drain(self) -> list[Event]:
        """Takes all events so far."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events

    def _microseconds(self, seconds: float) -> float:
        return round((seconds - self._began) * 1e6, 1)

    def _add(self, event: Event, row: str | None = None) -> None:
        event["pid"] = 1
        with self._lock:
            if row is not None:
                if row not in self._rows:
                    self._rows[row] = len(self._rows) + 1
                    name = {"ph": "M", "name": "thread_name", "pid": 1, "tid": self._rows[row], "args": {"name": row}}
                    order = {**name, "name": "thread_sort_index", "args": {"sort_index": self._rows[row]}}
                    self._events += (name, order)
                event["tid"] = self._rows[row]
            self._events.append(event)


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time; seconds since the trace began."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Timeline:
    """What a trace holds, by the names of its rows and counters; each in the order in which it ended."""

    rows: dict[str, list[Span]] = field(default_factory=dict)
    counters: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Sequence[Event]) -> Timeline:
        """Sorts events by row.

        Raises:
            KeyError, TypeError, AttributeError: They are not a trace's.
        """
        names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        timeline = cls({name: [] for name in names.values()})
        for event in events:
            seconds = event.get("ts", 0) / 1e6
            if event["ph"] == "X":
                span = Span(event["name"], seconds, seconds + event["dur"] / 1e6)
                timeline.rows[names[event["tid"]]].append(span)
            elif event["ph"] == "C":
                timeline.counters.setdefault(event["name"], []).append((seconds, event["args"]["bytes"]))
        return timeline

    def between(self, start: float, end: float) -> Timeline:
        """What happens in these seconds; a counter begins with what it was before."""
        rows = {
            name: [span for span in spans if span.end >= start and span.start <= end]
            for name, spans in sorted(self.rows.items(), key=lambda row: _place(row[0]))
        }
        counters = {}
        for name, values in self.counters.items():
            before = [(start, value) for moment, value in values if moment < start][-1:]
            counters[name] = before + [(moment, value) for moment, value in values if start <= moment <= end]
        return Timeline({name: spans for name, spans in rows.items() if spans}, counters)


def _place(row: str) -> int:
    return next((place for place, name in enumerate(_ROWS) if row.startswith(name)), len(_ROWS))
