"""Tries faults of a scenario one after another; after one that has broken something, in a new engine."""

from __future__ import annotations

import asyncio
import faulthandler
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from hermes_async.memory import claims
from hermes_async.memory.other_processes import ProcessRegistry
from tests.every_failure.points import FAULTS, Fault, Faults, Kind, counted
from tests.every_failure.scenarios import Scenario
from tests.every_failure.stand import BrokenError, Stand
from tests.inside import park_in

_DEAD_AFTER_S = 540


@dataclass(slots=True)
class Tried:
    """What came of a scenario.

    Attributes:
        points: Of each kind, how many there are when nothing fails.
        num_runs: Runs with a fault.
        broken: What faults did that they may not do.
    """

    points: Counter[Kind] = field(default_factory=Counter)
    num_runs: int = 0
    broken: list[str] = field(default_factory=list)


Choice = Callable[[Counter[Kind], Faults], Iterator[Fault]]
"""The faults to try of a scenario with so many points, in which these may go wrong.

A generator; it is sent whether there was such a point.
"""


def every(kinds: tuple[Kind, ...] = tuple(FAULTS), stride: int = 1, first: int = 1) -> Choice:
    """Each way in which points of these kinds go wrong, for every so manieth point from `first` on.

    The end is where no such point is reached: threads and tasks take turns as they like, so the number varies a little.
    """

    def faults(points: Counter[Kind], possible: Faults) -> Iterator[Fault]:
        for kind in kinds:
            for how in possible.get(kind, ()):
                for number in count(first, stride):
                    if not (yield Fault(kind, how, number)):
                        break

    return faults


def sample(most: int, offset: float) -> Choice:
    """At most so many faults, spread over all points and all ways in which they go wrong.

    Args:
        offset: Where the first one is, from 0 to 1; so that several samples together are of all kinds.
    """

    def faults(points: Counter[Kind], possible: Faults) -> Iterator[Fault]:
        everything = [
            Fault(kind, how, number)
            for kind, hows in possible.items()
            for how in hows
            for number in range(1, points[kind] + 1)
        ]
        stride = max(1, len(everything) / most)
        yield from (everything[int((idx + offset) * stride)] for idx in range(min(most, len(everything))))

    return faults


def try_faults(scenario: Scenario, choice: Choice, complain: Callable[[str], None] = lambda what: None) -> Tried:
    """Runs a scenario with one fault after another. Blocks, and runs event loops of its own.

    Args:
        complain: Called with what a fault has broken, as soon as it has.
    """
    tried = Tried()
    with tempfile.TemporaryDirectory(prefix="every-failure-") as folder:
        root = Path(folder).resolve()
        with _alone(root):
            (root / "model").mkdir()
            path = scenario.model(root / "model")
            todo = _Todo(choice, scenario.faults)
            while not todo.is_done:
                broken: str | None = None
                try:
                    broken = asyncio.run(_try_until_one_breaks(scenario, path, root, todo, tried))
                except Exception as error:
                    broken = f"{todo.fault}: leaving the engine raises {error!r}"
                    if not tried.num_runs:
                        raise
                if broken is not None:
                    tried.broken.append(broken)
                    complain(broken)
    return tried


class _Todo:
    """The faults that are left.

    Attributes:
        fault: The one that is tried now; None before the first.
    """

    def __init__(self, choice: Choice, possible: Faults) -> None:
        self._choice, self._possible = choice, possible
        self._faults: Iterator[Fault] | None = None
        self.fault: Fault | None = None
        self.is_done = False

    def advance(self, points: Counter[Kind], *, reached: bool) -> None:
        """The next fault."""
        try:
            if self._faults is None:
                self._faults = self._choice(points, self._possible)
                self.fault = next(self._faults)
            else:
                self.fault = self._faults.send(reached)  # type: ignore[attr-defined]
        except StopIteration:
            self.is_done = True


async def _try_until_one_breaks(scenario: Scenario, path: Path, root: Path, todo: _Todo, tried: Tried) -> str | None:
    with counted(root) as points:
        async with Stand.open(scenario, path, points, root) as stand:
            if todo.fault is None:
                tried.points = await stand.count()
            todo.advance(tried.points, reached=True)
            while not todo.is_done:
                assert todo.fault is not None
                faulthandler.dump_traceback_later(_DEAD_AFTER_S, exit=True)
                try:
                    reached = await stand.run(todo.fault) is not None
                except BrokenError as error:
                    tried.num_runs += 1
                    return f"{todo.fault}, at {points.where}:\n    {error}"
                finally:
                    faulthandler.cancel_dump_traceback_later()
                tried.num_runs += reached
                todo.advance(tried.points, reached=reached)
    return None


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Files that the package keeps for a user are in the scenario's folder, where their reads are points."""
    with pytest.MonkeyPatch.context() as patch:
        (root / "neighbours").mkdir()
        (root / "parked").mkdir()
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setenv("TMPDIR", str(root))
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(claims, "PROCESSES", ProcessRegistry(root / "neighbours"))
        park_in(patch, root / "parked")
        yield
