"""`hermes-async timeline`: draws a trace as a picture of the pipeline and its memory, or as a map of experts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from hermes_async.cli.pictures import pyplot, save
from hermes_async.cli.run import errors_in_one_line
from hermes_async.config import format_bytes, format_count
from hermes_async.errors import ConfigError
from hermes_async.pipeload.trace import WAITS_FOR_KV, WAITS_FOR_MEMORY, Span, Timeline

_MAX_BARS = 20_000
_MAX_NAMES = 60  # a row with more bars has no names in them
_THINNEST = 1 / 2000  # of the picture: the shortest bars are drawn so wide


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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture: .png, .svg or .pdf.", show_default=False)
    ] = None,
    start: Annotated[
        float | None, typer.Option(help="The first second to show; by default, where work begins.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How many seconds to show; by default, two sweeps, or all with --experts.")
    ] = None,
    experts: Annotated[
        bool,
        typer.Option("--experts", help="Show how often each expert was used, and was in memory. As text without -o."),
    ] = False,
) -> None:
    """Draw a trace: loads, computations, waits and frees, and below them the memory of the weights."""
    if output is None and not experts:
        raise typer.BadParameter("it is needed, except with --experts", param_hint="--output")
    with errors_in_one_line():
        everything = read(file)
        if experts:
            _show_experts(everything, file, output, start=start, seconds=seconds)
        elif output is not None:
            _show_spans(everything, file, output, start=start, seconds=seconds)


def _show_spans(everything: Timeline, file: Path, output: Path, *, start: float | None, seconds: float | None) -> None:
    first, last = _window(everything, start, seconds)
    shown = everything.between(first, last)
    num_spans = sum(map(len, shown.rows.values()))
    if not num_spans:
        raise ConfigError(f"{file} has nothing between {first:.3f} s and {last:.3f} s")
    bars = {row: list(bars_of(shown, row, shortest=(last - first) * _THINNEST)) for row in shown.rows}
    if sum(map(len, bars.values())) > _MAX_BARS:
        raise ConfigError(f"{num_spans} spans are too many for one picture; use a smaller --seconds")
    _draw(shown, bars, (first, last), output)
    print(f"{output} shows {first:.3f} s to {last:.3f} s of {file}: {format_count(num_spans, 'span')}")


def _show_experts(
    everything: Timeline, file: Path, output: Path | None, *, start: float | None, seconds: float | None
) -> None:
    if not everything.experts:
        raise ConfigError(f"{file} has no experts that are read one by one")
    sweeps = everything.rows.get("sweeps", [])
    first = min((sweep.start for sweep in sweeps), default=0.0) if start is None else start
    last = max((sweep.end for sweep in sweeps), default=first) if seconds is None else first + seconds
    from hermes_async.cli.expert_map import ExpertMap  # imports numpy

    expert_map = ExpertMap.of(everything, first, last)
    if not expert_map.num_sweeps:
        raise ConfigError(f"{file} has no sweep between {first:.3f} s and {last:.3f} s")
    if output is None:
        print(expert_map)
        return
    expert_map.draw(output)
    print(f"{output} shows {first:.3f} s to {last:.3f} s of {file}: {format_count(expert_map.num_sweeps, 'sweep')}")


def _window(everything: Timeline, start: float | None, seconds: float | None) -> tuple[float, float]:
    sweeps = everything.rows.get("sweeps", [])
    ends = [span.end for row in everything.rows.values() for span in row]
    if start is None:  # includes loads before the first sweep, unless the engine was idle for longer than that sweep
        start = sweeps[0].start if sweeps and sweeps[0].start > sweeps[0].end - sweeps[0].start else 0.0
    if seconds is not None:
        return start, start + seconds
    shown_sweeps = [span for span in sweeps if span.end > start][:2]
    return start, shown_sweeps[-1].end if shown_sweeps else max(ends, default=start)


def _draw(shown: Timeline, bars: Mapping[str, Sequence[Bar]], window: tuple[float, float], output: Path) -> None:
    """Draws the rows above, and the counters below.

    Args:
        bars: Of each row.
        window: The first and the last second.

    Raises:
        ConfigError: matplotlib is not installed, or the picture cannot be written.
    """
    plots = pyplot()
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    names = list(bars)
    start, end = window
    figure, (above, below) = plots.subplots(
        2, 1, figsize=(14, 2.5 + 0.6 * len(names)), sharex=True, layout="constrained",
        height_ratios=[max(2, len(names)), 2],
    )  # fmt: skip
    kinds = {*_COLORS} - _OF_EXPERTS
    for height, name in enumerate(reversed(names)):
        if name == "inference agent":  # between stages and waits, a sweep computes modules without weights
            sweeps = [(span.start, span.end - span.start) for span in shown.rows.get("sweeps", ())]
            above.broken_barh(sweeps, (height - 0.4, 0.8), color=_COLORS[_OUTSIDE])
        kinds.update(bar.kind for bar in bars[name])
        _draw_row(above, height, bars[name], window=window)
    above.set(yticks=range(len(names)), yticklabels=names[::-1], ylim=(-0.6, len(names) - 0.4))
    above.grid(axis="x", alpha=0.3)
    patches = [Patch(color=color, label=kind) for kind, color in _COLORS.items() if kind in kinds]
    above.legend(handles=patches, ncols=len(patches), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
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
_OF_EXPERTS = {"load experts", "compute experts"}
_COLORS = {
    "load": "#4c78a8",
    "load experts": "#72b7b2",
    "compute": "#54a24b",
    "compute experts": "#eeca3b",
    _OUTSIDE: "#b7dfb0",
    "wait": "#e45756",
    "free": "#b279a2",
    "sweep": "#bab0ac",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a row in one color."""

    kind: str
    name: str
    start: float
    end: float


def bars_of(shown: Timeline, row: str, *, shortest: float) -> Iterator[Bar]:
    """What is drawn of a row.

    Experts of one layer that follow each other are one bar of each kind, as long as all of them together, where they
    are shorter than `shortest` seconds on average.
    """

    def module_of(span: Span) -> str:
        expert = shown.expert_of(span)
        return "" if expert is None else expert[0]

    for module, group in groupby(shown.rows[row], module_of):
        spans = list(group)
        if not module or sum(span.end - span.start for span in spans) > shortest * len(spans):
            for span in spans:
                yield Bar(_kind(row, span, is_expert=bool(module)), span.name, span.start, span.end)
        else:
            yield from _joined(row, module, spans)


def _joined(row: str, module: str, spans: Sequence[Span]) -> Iterator[Bar]:
    """Experts of a layer, as one bar of each kind behind each other."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for span in spans:
        kind = _kind(row, span, is_expert=True)
        seconds[kind] += span.end - span.start
        counts[kind] += 1
    start = spans[0].start
    for kind in seconds:
        yield Bar(kind, f"{module}: {counts[kind]}", start, start + seconds[kind])
        start += seconds[kind]


def _draw_row(axes: Any, height: int, bars: Sequence[Bar], *, window: tuple[float, float]) -> None:
    start, end = window
    thinnest = (end - start) * _THINNEST
    alike: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    for bar in bars:
        width = max(bar.end - bar.start, thinnest)
        has_edge = width > (end - start) / 200  # an edge would cover a thin bar
        alike[bar.kind, has_edge].append((bar.start, width))
        if len(bars) <= _MAX_NAMES and width > (end - start) / 40 and bar.kind != "wait":
            middle = (max(bar.start, start) + min(bar.end, end)) / 2
            axes.text(
                middle, height, _short(bar.name), ha="center", va="center", fontsize=6, color="white", clip_on=True
            )
    for (kind, has_edge), places in alike.items():
        axes.broken_barh(
            places, (height - 0.4, 0.8), color=_COLORS[kind], edgecolor="white", linewidth=0.3 if has_edge else 0.0
        )


def _short(name: str) -> str:
    """A stage's name without its common parts, such as `mlp.up_proj`, or `up_proj[1]` of a matrix in blocks."""
    parts = name.split(".")
    if "blocks" in parts[:-1]:
        return f"{parts[-3]}[{parts[-1]}]"
    return ".".join(parts[-2:])


def _kind(row: str, span: Span, *, is_expert: bool) -> str:
    of_experts = " experts" if is_expert else ""
    if row.startswith("inference"):
        return "wait" if span.name.startswith("wait for ") else f"compute{of_experts}"
    others = {"sweeps": "sweep", "daemon agent": "free", WAITS_FOR_MEMORY: "wait", WAITS_FOR_KV: "wait"}
    return others.get(row, f"load{of_experts}")
