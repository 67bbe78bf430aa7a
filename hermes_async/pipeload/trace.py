"""What the agents do and when, as events that Perfetto and chrome://tracing show.

Source: the Trace Event Format (Chrome), its JSON array form, which may be cut off anywhere and can still be read.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Event = dict[str, Any]

WAITS_FOR_MEMORY = "waits for memory"
"""The row of the waits of loading agents for the governor."""

WAITS_FOR_KV = "waits for KV memory"
"""The row of the waits of requests for the governor."""

_EXPERTS = "experts"
"""The counter of bytes of experts in memory, and the note that says how many experts each module has."""

_MAX_EXPERTS = 65_536  # of a module; more are an error of the file

_ROWS = ("loading agent", WAITS_FOR_MEMORY, "inference agent", "daemon agent", WAITS_FOR_KV, "sweeps")
"""What rows begin with, in the order in which they are drawn."""


class Trace:
    """Collects events; any thread may add some, and one drains them now and then.

    A row is a line of the picture: one for each loading agent, one each for the waits of loading agents and of
    requests, and one each for the inference agent, the daemon agent and the sweeps.
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

    def note(self, name: str, args: Mapping[str, object]) -> None:
        """Something that holds for the whole trace."""
        self._add({"ph": "M", "name": name, "tid": 0, "args": dict(args)})

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


class AgentTrace:
    """What the agents of one pipeline tell a trace; without a trace, nothing is recorded."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        # All mutable state: bytes of stages' weights and of experts in memory or on their way there, and what was told
        # last of experts, of the event loop; the stage that is computed, and since when, of the compute thread.
        self._weight_bytes = 0
        self._expert_bytes = self._told_expert_bytes = 0
        self._computing: tuple[str, float] | None = None

    def note_experts(self, layers: Mapping[str, int]) -> None:
        """The experts that are read one by one: how many each module has."""
        if self._trace is not None and layers:
            self._trace.note(_EXPERTS, layers)

    def span(self, row: str, name: str, started: float, **args: object) -> None:
        """Something that began at `started` and ends now."""
        if self._trace is not None:
            self._trace.span(row, name, started, time.perf_counter(), **args)

    def add_weights(self, more_bytes: int) -> None:
        """So many more bytes of stages' weights are in memory, or fewer."""
        if self._trace is not None:
            self._weight_bytes += more_bytes
            self._trace.count("weights", bytes=self._weight_bytes)

    def add_expert(self, more_bytes: int) -> None:
        """As `add_weights`, of an expert. `tell_experts` records it: most experts take the place of another one."""
        self._expert_bytes += more_bytes

    def tell_experts(self) -> None:
        """Records how many bytes of experts are in memory, if they are not as many as before."""
        if self._trace is not None and self._expert_bytes != self._told_expert_bytes:
            self._told_expert_bytes = self._expert_bytes
            self._trace.count(_EXPERTS, bytes=self._expert_bytes)

    def read_callback(self, stage: str, read_bytes: int) -> Callable[[float, float], None] | None:
        """What `Reader.read` calls on the thread that has read a stage."""
        return None if self._trace is None else partial(self._add_read, self._trace, stage, read_bytes)

    @staticmethod
    def _add_read(trace: Trace, stage: str, read_bytes: int, started: float, ended: float) -> None:
        thread = threading.current_thread().name.rpartition("_")[2]
        trace.span(f"loading agent {thread}", stage, started, ended, bytes=read_bytes)

    def begin_computing(self, stage: str) -> None:
        if self._trace is not None:
            self._computing = stage, time.perf_counter()

    def end_computing(self) -> None:
        """Of the stage that was begun, if any; a resident one is not left, and ends where the next one begins."""
        if self._computing is not None:
            (name, started), self._computing = self._computing, None
            self.span("inference agent", name, started)


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time; seconds since the trace began."""

    name: str
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class Timeline:
    """What a trace holds, by the names of its rows and counters; each in the order in which it ended.

    Attributes:
        experts: How many experts each module has whose experts are read one by one.
    """

    rows: dict[str, list[Span]] = field(default_factory=dict)
    counters: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Sequence[Event]) -> Timeline:
        """Sorts events by row.

        Raises:
            KeyError, TypeError, AttributeError, ValueError: They are not a trace's.
        """
        names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        timeline = cls({name: [] for name in names.values()})
        noted = [event["args"] for event in events if (event["ph"], event["name"]) == ("M", _EXPERTS)]
        timeline.experts = {module: int(count) for args in noted for module, count in args.items()}
        if not all(0 < count <= _MAX_EXPERTS for count in timeline.experts.values()):
            raise ValueError(f"a module has from 1 to {_MAX_EXPERTS} experts")
        for event in events:
            seconds = event.get("ts", 0) / 1e6
            if event["ph"] == "X":
                span = Span(event["name"], seconds, seconds + event["dur"] / 1e6, event.get("args") or {})
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
        return Timeline({name: spans for name, spans in rows.items() if spans}, counters, self.experts)

    def expert_of(self, span: Span) -> tuple[str, int] | None:
        """The module and the number of the expert that is loaded, awaited, computed or freed; None for other stages."""
        module, _, number = span.name.rpartition(" ")[2].rpartition(".")
        is_expert = number.isdecimal() and int(number) < self.experts.get(module, 0)
        return (module, int(number)) if is_expert else None


def _place(row: str) -> int:
    return next((place for place, name in enumerate(_ROWS) if row.startswith(name)), len(_ROWS))
