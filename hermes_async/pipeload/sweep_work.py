"""What passes between a sweep that is awaited and the thread that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio


@dataclass(eq=False, slots=True)
class SweepWork:
    """What the inference agent is to compute, and then what came of it."""

    compute: Callable[[], Any]
    done: anyio.Event = field(default_factory=anyio.Event)
    result: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        """Sets `result` or `error`; called by the inference agent."""
        try:
            self.result = self.compute()
        except BaseException as error:  # raised again where the sweep is awaited
            self.error = error
