"""`hermes-async timeline`: draws a trace as a picture of the pipeline, with the memory below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hermes_async.cli.pictures import pyplot, save
from hermes_async.cli.run import errors_in_one_line
from hermes_async.config import format_bytes, format_count
from hermes_async.errors import ConfigError
from hermes_async.pipeload.trace import WAITS_FOR_KV, WAITS_FOR_MEMORY, Span, Timeline

_MAX_SPANS = 20_000
_MAX_NAMES = 60  # a row with more bars has no names in them


def read(file: Path) -> Timeline:
    """Reads a trace, even if it is incomplete.

    Raises:
        ConfigError: The file cannot be read, or is no trace.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if not text.rstrip().endswith("]"):  # its writer was killed: take all whole events
            text = text[: text.rfind(",\n")] + "]"
        return Timeline.of(json.loads(text))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no trace of hermes-async: {type(error).__name__}: {error}") from error


def timeline(
    file: Annotated[Path, typer.Argument(help="A trace that --trace has written.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .svg or .pdf.")],
    start: Annotated[
        float | None, typer.Option(help="The first second to show; by default, where work begins.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="How many seconds to show; by default, two sweeps.")] = None,
) -> None:
    """Draw a trace: loads, computations, waits and frees, and below them the memory of the weights."""
    with errors_in_one_line():
        everything = read(file)
        first, last = _window(everything, start, seconds)
        shown = everything.between(first, last)
        spans = [span for row in shown.rows.values() for span in row]
        if not spans:
            raise ConfigError(f"{file} has nothing between {first:.3f} s and {last:.3f} s")
        if len(spans) > _MAX_SPANS:
            raise ConfigError(f"{len(spans)} spans are too many for one picture; use a smaller --seconds")
        draw(shown, first, last, output)
        print(f"{output} shows {first:.3f} s to {last:.3f} s of {file}: {format_count(len(spans), 'span')}")


def _window(everything: Timeline, start: float | None, seconds: float | None) -> tuple[float, float]:
    sweeps = everything.rows.get("sweeps", [])
    ends = [span.end for row in everything.rows.values() for span in row]
    if start is None:  # includes loads before the first sweep, unless the engine was idle for longer than that sweep
        start = sweeps[0].start if sweeps and sweeps[0].start > sweeps[0].end - sweeps[0].start else 0.0
    if seconds is not None:
        return start, start + seconds
    shown_sweeps = [span for span in sweeps if span.end > start][:2]
    return start, shown_sweeps[-1].end if shown_sweeps else max(ends, default=start)


def draw(shown: Timeline, start: float, end: float, output: Path) -> None:
    """Draws the rows above, and the counters below.

    Raises:
        ConfigError: matplotlib is not installed, or the picture cannot be written.
    """
    plots = pyplot()
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    names = list(shown.rows)
    figure, (above, below) = plots.subplots(
        2, 1, figsize=(14, 2.5 + 0.6 * len(names)), sharex=True, layout="constrained",
        height_ratios=[max(2, len(names)), 2],
    )  # fmt: skip
    for height, name in enumerate(reversed(names)):
        if name == "inference agent":  # between stages and waits, a sweep computes modules without weights
            sweeps = [(span.start, span.end - span.start) for span in shown.rows.get("sweeps", ())]
            above.broken_barh(sweeps, (height - 0.4, 0.8), color=_COLORS[_OUTSIDE])
        _draw_row(above, height, name, shown.rows[name], window=(start, end))
    above.set(yticks=range(len(names)), yticklabels=names[::-1], ylim=(-0.6, len(names) - 0.4))
    above.grid(axis="x", alpha=0.3)
    above.legend(handles=[Patch(color=color, label=kind) for kind, color in _COLORS.items()], ncols=6, fontsize=8,
                 loc="lower center", bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    for name, values in shown.counters.items():
        moments = [moment for moment, _ in values]
        amounts = [value for _, value in values]
        if values:
            label = f"{name}, at most {format_bytes(max(amounts))}"
            below.step([*moments, end], [*amounts, amounts[-1]], where="post", label=label)
    below.set(xlabel="seconds", xlim=(start, end), ylim=(0, None))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(int(value))))
    below.grid(alpha=0.3)
    below.legend(loc="lower right", fontsize=8)
    save(figure, output)


_OUTSIDE = "compute outside of stages"
_COLORS = {
    "load": "#4c78a8",
    "compute": "#54a24b",
    _OUTSIDE: "#b7dfb0",
    "wait": "#e45756",
    "free": "#b279a2",
    "sweep": "#bab0ac",
}


def _draw_row(axes: Any, height: int, row: str, spans: list[Span], *, window: tuple[float, float]) -> None:
    start, end = window
    thinnest = (end - start) / 2000  # makes the shortest spans visible
    for span in spans:
        kind = _kind(row, span)
        width = max(span.end - span.start, thinnest)
        place = (height - 0.4, 0.8)
        edge = 0.3 if width > (end - start) / 200 else 0.0  # an edge would cover a thin bar
        axes.broken_barh([(span.start, width)], place, color=_COLORS[kind], edgecolor="white", linewidth=edge)
        if len(spans) <= _MAX_NAMES and width > (end - start) / 40 and kind != "wait":
            middle = (max(span.start, start) + min(span.end, end)) / 2
            axes.text(
                middle, height, _short(span.name), ha="center", va="center", fontsize=6, color="white", clip_on=True
            )


def _short(name: str) -> str:
    """A stage's name without its common parts, such as `mlp.up_proj`, or `up_proj[1]` of a matrix in blocks."""
    parts = name.split(".")
    if "blocks" in parts[:-1]:
        return f"{parts[-3]}[{parts[-1]}]"
    return ".".join(parts[-2:])


def _kind(row: str, span: Span) -> str:
    if row.startswith("inference"):
        return "wait" if span.name.startswith("wait for ") else "compute"
    return {"sweeps": "sweep", "daemon agent": "free", WAITS_FOR_MEMORY: "wait", WAITS_FOR_KV: "wait"}.get(row, "load")
