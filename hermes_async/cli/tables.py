"""Prints tables in the terminal, for `plan`, `profile` and `demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def new_table(title: str) -> Table:
    """An empty table with a title."""
    from rich.table import Table

    return Table(title=title, title_justify="left")


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table. Lines break only between words; lines that are wider than the terminal continue past its edge."""
    from rich.console import Console
    from rich.measure import Measurement

    console = console or Console()
    for column in table.columns:
        for cell in (column.header, *column.cells):
            least = Measurement.get(console, console.options, cell).minimum
            column.min_width = max(column.min_width or 0, least)
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)
