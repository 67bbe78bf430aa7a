"""What `hermes-async demo` shows: sessions side by side while their tokens arrive, then statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hermes_async.config import format_bytes, format_count
from hermes_async.results import Chunk, EngineStatistics, FinishReason

_LINES = range(4, 16)
"""How many lines of text a panel may show."""


@dataclass
class Story:
    """The text of one session of the demo, so far."""

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.finish_reason = chunk.finish_reason

    @property
    def state(self) -> str:
        if not self.token_ids and self.finish_reason is None:
            return "waiting"
        count = format_count(len(self.token_ids), "token")
        return count if self.finish_reason is None else f"{count}, {self.finish_reason}"

    def as_text(self) -> Text:
        return Text.assemble((self.prompt, "bold"), self.text)


@dataclass
class SideBySide:
    """A rich renderable with a panel for each session, which shows the end of its text."""

    stories: list[Story]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = min(len(self.stories), max(1, options.max_width // 36))
        rows = -(-len(self.stories) // columns)
        columns = -(-len(self.stories) // rows)
        num_lines = max(_LINES.start, min(_LINES.stop - 1, console.height // rows - 3))
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [self._panel(console, story, options.max_width // columns - 4, num_lines) for story in self.stories]
        for start in range(0, len(panels), columns):
            grid.add_row(*panels[start : start + columns])
        yield grid

    def _panel(self, console: Console, story: Story, width: int, num_lines: int) -> Panel:
        lines = story.as_text().wrap(console, max(1, width))
        return Panel(
            Text("\n").join(lines[-num_lines:]),
            subtitle=story.state,
            height=num_lines + 2,
            border_style="dim" if story.finish_reason is not None else "green",
        )


def print_stories(console: Console, stories: list[Story]) -> None:
    """Prints the whole text of each session, one after another."""
    for number, story in enumerate(stories, start=1):
        console.print(f"--- session {number}: {story.state}", markup=False, highlight=False, soft_wrap=True)
        console.print(story.as_text(), soft_wrap=True)
        console.print()


def statistics_table(statistics: EngineStatistics, weight_bytes: int) -> Table:
    """The statistics of a run, one per line."""
    generated, sweeps = statistics.tokens_generated, statistics.sweeps
    share = statistics.peak_bytes_in_use / statistics.memory_budget
    table = Table(title="statistics", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, figure in (
        ("weights", format_bytes(weight_bytes)),
        ("memory budget", format_bytes(statistics.memory_budget)),
        ("peak in use", f"{format_bytes(statistics.peak_bytes_in_use)} ({share:.0%} of the budget)"),
        ("resident weights", format_bytes(statistics.bytes_resident)),
        ("read from disk", format_bytes(statistics.bytes_read)),
        ("sweeps over the weights", str(sweeps)),
        ("tokens generated", str(generated)),
        ("tokens per sweep", f"{generated / sweeps:.2f}" if sweeps else "-"),
        ("computing", f"{statistics.compute_seconds:.2f} s"),
        ("waiting for the disk", f"{statistics.stall_seconds:.2f} s"),
    ):
        table.add_row(name, figure)
    return table
