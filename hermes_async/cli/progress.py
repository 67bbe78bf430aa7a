"""What an engine is busy with while no token comes: rows on standard error, if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import anyio

from hermes_async.config import format_bytes, format_count
from hermes_async.foreign_errors import ungrouped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from hermes_async import Engine, EngineSnapshot, RequestSnapshot

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, slots=True)
class Row:
    """One line of progress.

    Attributes:
        done: How much of `total` is done; both are None if that is not known.
        detail: The same, for people.
    """

    what: str
    done: int | None = None
    total: int | None = None
    detail: str = ""


def rows_of(snapshot: EngineSnapshot) -> list[Row]:
    """What an open engine does for which its users wait; empty if tokens come, or nothing is to be done."""
    rows: list[Row] = []
    loaded, resident = snapshot.resident_bytes
    if loaded < resident:
        detail = f"{format_bytes(loaded)} of {format_bytes(resident)}"
        rows.append(Row("loading the weights that stay", loaded, resident, detail))
    rows += _request_rows(snapshot.requests)
    if snapshot.sweeping and (snapshot.num_forwards or any(row.what.startswith("reading") for row in rows)):
        stage = 0 if snapshot.stage_idx is None else snapshot.stage_idx + 1
        detail = f"stage {stage} of {len(snapshot.stages)}"
        rows.append(Row(f"computing sweep {snapshot.sweep + 1}", stage, len(snapshot.stages), detail))
    return rows


def _request_rows(requests: Sequence[RequestSnapshot]) -> list[Row]:
    rows = []
    prefilling = [request for request in requests if request.activity == "prefilling"]
    if prefilling:
        done = sum(request.computed_tokens for request in prefilling)
        total = sum(request.prompt_tokens for request in prefilling)
        what = "reading the prompt" if len(prefilling) == 1 else f"reading {len(prefilling)} prompts"
        rows.append(Row(what, done, total, f"{done} of {format_count(total, 'token')}"))
    for activity, what in (
        ("preparing", "tokenizing"),
        ("waiting", "waiting for memory or a place"),
        ("restoring", "reading the history of a session from disk"),
    ):
        num = sum(request.activity == activity for request in requests)
        if num:
            rows.append(Row(what if len(requests) == 1 else f"{what}: {format_count(num, 'request')}"))
    return rows


class EngineProgress:
    """Shows rows while it is not hidden. On the event loop.

    Args:
        console: Where the rows are shown; None shows nothing.
    """

    def __init__(self, engine: Engine, console: Console | None) -> None:
        self._engine = engine
        self._console = console
        # All mutable state: rich's display, which is None while nothing is shown; its tasks, by what their rows say;
        # whether rows are hidden; and whether the engine was open before.
        self._display: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._is_hidden = False
        self._has_opened = False

    def hide(self) -> None:
        """Removes the rows, until `show`. Call it before the command prints."""
        self._is_hidden = True
        self._clear()

    def show(self) -> None:
        """Shows rows from now on."""
        self._is_hidden = False
        self.update()

    def update(self) -> None:
        """Shows what the engine does now."""
        if self._is_hidden or self._console is None:
            return
        if self._engine.is_open:
            self._has_opened = True
            self._draw(rows_of(self._engine.snapshot()))
        else:
            self._draw([] if self._has_opened else [Row("opening the model")])

    async def watch(self) -> None:
        """Updates the rows; never returns. Cancellation: removes them."""
        try:
            while True:
                self.update()
                await anyio.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self._clear()

    def _draw(self, rows: Sequence[Row]) -> None:
        if not rows:
            self._clear()
            return
        if self._display is None:
            self._display = new_display(self._console)
            self._display.start()
        for what in self._tasks.keys() - {row.what for row in rows}:
            self._display.remove_task(self._tasks.pop(what))
        for row in rows:
            if row.what in self._tasks:
                self._display.update(self._tasks[row.what], completed=row.done or 0, total=row.total, detail=row.detail)
            else:
                self._tasks[row.what] = self._display.add_task(
                    row.what, completed=row.done or 0, total=row.total, detail=row.detail
                )

    def _clear(self) -> None:
        if self._display is not None:
            self._display.stop()
        self._display, self._tasks = None, {}


def new_display(console: Console | None) -> Progress:
    """A display without rows, which vanishes when it stops."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


async def with_progress(engine: Engine, work: Callable[[EngineProgress], Awaitable[T]], *, quiet: bool = False) -> T:
    """Awaits `work`, and shows meanwhile what the engine does, from its opening on.

    Args:
        quiet: Show nothing. Nothing is shown either if standard error is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        return await work(EngineProgress(engine, None))
    from rich.console import Console

    progress = EngineProgress(engine, Console(stderr=True))
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.watch)
            try:
                return await work(progress)
            finally:
                progress.hide()
                tasks.cancel_scope.cancel()
    raise AssertionError("the block above returns or raises")
