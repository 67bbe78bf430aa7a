"""What a benchmark and the program of one side tell each other. Imports the standard library only: each side runs in an
environment of its own.

A program gets one JSON object as its argument. It prints "ready" when it has imported everything, and waits for a line.
Then it prints JSON objects, each in a line of its own: one about opening, one for each point, and the empty object when
it is done. It waits for a line once more, so that its process can be looked at.

A point is asked for as `{"prompts": [[token, ...], ...], "tokens": number}`: sequences that start together.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_bytes() -> int | None:
    """What this process has read from disks so far, by the kernel's count; None if the kernel does not count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


@dataclass(frozen=True)
class Moment:
    """A time in seconds, and the bytes read until then."""

    seconds: float = field(default_factory=time.perf_counter)
    read_bytes: int | None = field(default_factory=read_bytes)


class Benchmark:
    """The benchmark that started this program. Standard output is its own; what libraries print goes to stderr."""

    def __init__(self) -> None:
        self.asked: Record = json.loads(sys.argv[1])
        self._output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait_for_start(self) -> Moment:
        """Says that everything is imported, and returns when the benchmark wants the model to be opened."""
        self._say("ready")
        return Moment()

    def tell(self, record: Record) -> None:
        print(json.dumps(record), file=self._output, flush=True)

    def finish(self) -> None:
        self._say("{}")

    def _say(self, text: str) -> None:
        print(text, file=self._output, flush=True)
        sys.stdin.readline()


def opened(start: Moment, **more: Any) -> Record:
    """What is told when the model has been opened just now."""
    now = Moment()
    return {"opening_s": now.seconds - start.seconds, "opening_read_bytes": _between(start, now), **more}


def decoded(
    point: Record, start: Moment, first: Moment, last: Moment, steps: Sequence[float], tokens: Sequence[Sequence[int]]
) -> Record:
    """What is told of a point.

    Args:
        first: When each sequence had its first token. The decode phase begins.
        last: When the decode phase ended.
        steps: The times of the decode phase at which each sequence had one token more, `first` included.
        tokens: The tokens of each sequence.
    """
    sessions, num_decoded = len(tokens), len(tokens) * (len(steps) - 1)
    read = _between(first, last)
    return {
        "sessions": sessions,
        "prompt_tokens": len(point["prompts"][0]),
        "first_token_s": first.seconds - start.seconds,
        "prompt_read_bytes": _between(start, first),
        "decode_tokens_per_s": num_decoded / (last.seconds - first.seconds) if num_decoded else None,
        "read_bytes_per_token": read / num_decoded if num_decoded and read is not None else None,
        "step_seconds": [later - earlier for earlier, later in pairwise(steps)],
        "tokens": [list(sequence) for sequence in tokens],
    }


def _between(start: Moment, end: Moment) -> int | None:
    return None if start.read_bytes is None or end.read_bytes is None else end.read_bytes - start.read_bytes
