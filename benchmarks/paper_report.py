"""Reports the results of `benchmarks.paper`: as lines, Markdown tables, and one PNG for each limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plots
from hermes_async import format_bytes

Figures = dict[str, Any]

_HIGHEST = 6
"""Bars are cut there, and say what they are."""

_FAMILIES = {"transformers": "#9a9a9a", "baseline": "#5b5b5b", "pipeswitch": "#e08a1e"}
_SHADES = {
    "pipeload": ("#9ecae9", "#4a94cf", "#12589c", "#08305c"),
    "budget": ("#c9eabf", "#a8dba0", "#7cc47b", "#4fae54", "#2f8f41", "#176d2c", "#0a3d17"),
}


def heading(name: str, limit: str, result: Figures) -> str:
    compute = result["compute"]
    further = f", and {compute['per_token_s']:.3f} s for each further token" if "per_token_s" in compute else ""
    overlapped = ""
    if "overlapped_s" in result:
        overlapped = f"; plain reads and inference beside each other take {result['overlapped_s']:.2f} s"
    if "overlapped_token_s" in result:
        overlapped += f", and {result['overlapped_token_s']:.3f} s for each further token"
    return (
        f"{name}, {limit}: {format_bytes(result['weight_bytes'])} in {result['dtype']}; the disk gives "
        f"{format_bytes(round(result['disk_bytes_per_s']))}/s, so reading takes {result['read_s']:.2f} s; computing "
        f"takes {compute['latency_s']:.2f} s{further}{overlapped}; ceiling of load + compute over max(load, compute): "
        f"{result['ceiling']:.2f}"
    )


def _deserialising(result: Figures) -> str:
    loader = result["deserialising"]
    return (
        f"PipeSwitch's own loader, which deserialises, takes {loader['load_s']:.2f} s for all layers: with it, "
        f"overlapping can win {loader['ceiling']:.2f} at the most over loading first"
    )


def lines(name: str, limit: str, result: Figures) -> list[str]:
    head = [heading(name, limit, result)]
    if "deserialising" in result:
        head.append(f"  {_deserialising(result)}")
    return [*head, *(_line(mode, figures) for mode, figures in result["modes"].items())]


def _line(mode: str, figures: Figures) -> str:
    if "refused" in figures:
        return f"  {mode:13} refused: {figures['refused']}"
    parts = [f"{figures['latency_s']:7.2f} s ({figures['share_of_limit']:.2f} of the limit"]
    if "times_pipeswitch" in figures:
        parts.append(f", {figures['times_pipeswitch']:.2f} times pipeswitch's speed")
    if figures.get("prompt_sweeps", 1) > 1:
        parts.append(f", the prompt in {figures['prompt_sweeps']:.0f} sweeps")
    parts.append(")")
    if "by_loader" in figures:
        parts.append(f"; {_parts(figures)}")
    if "token_limit_s" in figures:
        parts.append(f", {figures['per_token_s']:.3f} s a token ({figures['token_share_of_limit']:.2f} of its limit")
        if "token_ratio_expected" in figures:
            parts.append(f"; {_ratio(figures)}")
        parts.append(")")
    if "per_pass_s" in figures:
        parts.append(f"; opening {figures['open_s']:.2f} s of it, and a further pass {figures['per_pass_s']:.2f} s ")
        parts.append(f"({figures['pass_share_of_limit']:.2f} of its limit)")
    parts.append(f"; weights and buffers {format_bytes(round(figures['memory_bytes']))}")
    if "memory_less" in figures:
        parts.append(f" ({_less(figures)})")
    parts.append(f", RSS {format_bytes(round(figures['rss_bytes']))} more; output {_output(figures)}")
    return f"  {mode:13} {''.join(parts)}"


def _ratio(figures: Figures) -> str:
    return f"{figures['token_ratio_measured']:.2f} of pipeload-2's, expected {figures['token_ratio_expected']:.2f}"


def _parts(figures: Figures) -> str:
    return (
        f"{figures['times_pipeswitch']:.2f} = {figures['by_overlap']:.2f} by overlapping better x "
        f"{figures['by_loader']:.2f} by the loader x {figures['limit_s'] / figures['latency_s']:.2f} of the limit"
    )


def _less(figures: Figures) -> str:
    return f"{abs(figures['memory_less']):.1%} {'less' if figures['memory_less'] >= 0 else 'more'}"


def _output(figures: Figures) -> str:
    return "equal" if figures["same_output"] else "DIFFERS"


# --- Markdown ---

_COLUMNS: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "latency": ("latency_s", lambda figures: f"{figures['latency_s']:.2f} s"),
    "of the limit": ("share_of_limit", lambda figures: f"{figures['share_of_limit']:.2f}"),
    "of both beside each other": ("share_of_overlapped", lambda figures: f"{figures['share_of_overlapped']:.2f}"),
    "times pipeswitch": ("times_pipeswitch", lambda figures: f"{figures['times_pipeswitch']:.2f}"),
    "opening": ("open_s", lambda figures: f"{figures['open_s']:.2f} s"),
    "a further pass": ("per_pass_s", lambda figures: f"{figures['per_pass_s']:.2f} s"),
    "of the pass's limit": ("pass_share_of_limit", lambda figures: f"{figures['pass_share_of_limit']:.2f}"),
    "a token": ("per_token_s", lambda figures: f"{figures['per_token_s']:.3f} s"),
    "of its limit": ("token_share_of_limit", lambda figures: f"{figures['token_share_of_limit']:.2f}"),
    "of both": ("token_share_of_overlapped", lambda figures: f"{figures['token_share_of_overlapped']:.2f}"),
    "weights and buffers": ("memory_bytes", lambda figures: format_bytes(round(figures["memory_bytes"]))),
    "less than pipeswitch": ("memory_less", lambda figures: f"{figures['memory_less']:.1%}"),
    "RSS": ("rss_bytes", lambda figures: format_bytes(round(figures["rss_bytes"]))),
    "output": ("same_output", _output),
}
"""Of a title: the figure that it needs, and its text."""


def markdown(results: dict[str, dict[str, Figures]]) -> str:
    sections = [_section(name, limit, result) for name, by in results.items() for limit, result in by.items()]
    return "\n\n".join(sections) + "\n"


def _section(name: str, limit: str, result: Figures) -> str:
    measured = {mode: figures for mode, figures in result["modes"].items() if "refused" not in figures}
    columns = {title: of for title, of in _COLUMNS.items() if any(of[0] in figures for figures in measured.values())}
    rows = [f"| mode | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for mode, figures in measured.items():
        cells = [text(figures) if key in figures else "" for key, text in columns.values()]
        rows.append(f"| {mode} | {' | '.join(cells)} |")
    notes = [f"- {_deserialising(result)}."] if "deserialising" in result else []
    beside = {mode: figures for mode, figures in measured.items() if "by_loader" in figures}
    if beside:
        fastest = max(beside, key=lambda mode: beside[mode]["times_pipeswitch"])
        notes.append(f"- {fastest}: speed beside PipeSwitch {_parts(beside[fastest])}.")
    notes += [
        f"- {mode}: a token takes {_ratio(figures)}."
        for mode, figures in measured.items()
        if "token_ratio_expected" in figures
    ]
    notes += [
        f"- {mode}: the prompt takes {figures['prompt_sweeps']:.0f} sweeps, each of which reads what is not resident."
        for mode, figures in measured.items()
        if figures.get("prompt_sweeps", 1) > 1
    ]
    notes += [f"- {mode}: {fig['refused']}" for mode, fig in result["modes"].items() if "refused" in fig]
    text = heading(name, limit, result).partition(": ")[2]
    parts = [f"### {name}, {limit}", text[0].upper() + text[1:] + ".", "\n".join(rows), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


# --- plots ---


def draw(results: dict[str, dict[str, Figures]], folder: Path) -> None:
    """Draws a PNG for each limit: latency beside the physical limit, and memory beside pipeswitch's."""
    pyplot = plots.pyplot()
    if pyplot is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    limits = list(dict.fromkeys(limit for by_limit in results.values() for limit in by_limit))
    for limit in limits:
        file = folder / f"paper-{limit.replace('/', '').replace(' ', '-')}.png"
        _draw_limit(pyplot, limit, {name: by[limit] for name, by in results.items() if limit in by}, file)
        print(f"  plot: {file}")


def _draw_limit(pyplot: Any, limit: str, by_model: dict[str, Figures], file: Path) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    modes = list(dict.fromkeys(mode for result in by_model.values() for mode in result["modes"]))
    modes.sort(key=lambda mode: (mode.startswith("budget-"), mode if mode.startswith("budget-") else ""))
    colors = _colors(modes)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    step = 0.82 / len(modes)
    for position, result in enumerate(by_model.values()):
        switch = result["modes"].get("pipeswitch", {}).get("memory_bytes")
        for idx, mode in enumerate(modes):
            figures = result["modes"].get(mode, {"refused": ""})
            if "refused" in figures:
                continue
            x = position + (idx - (len(modes) - 1) / 2) * step
            style = {"width": step * 0.88, "color": colors[mode]}
            height = figures["latency_s"] / result["limit_s"]
            left.bar(x, min(height, _HIGHEST), **style)
            if height > _HIGHEST:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                font = {"rotation": 90, "ha": "center", "va": "top", "fontsize": 8}
                left.text(x, _HIGHEST * 0.98, f"{height:.1f}", bbox=box, **font)
            share = figures["limit_s"] / result["limit_s"]
            left.plot([x - step / 2, x + step / 2], [share, share], "k-", linewidth=1.6, solid_capstyle="butt")
            if switch is not None:
                right.bar(x, figures["memory_bytes"] / switch, **style)
    right.axhline(1, color="k", linestyle="--", linewidth=1)
    generate = any("per_token_s" in result["compute"] for result in by_model.values())
    left.set_title("load + inference" + (" (GPT: to the first token)" if generate else ""))
    left.set_ylabel("times max(read all weights, compute)")
    right.set_title("weights and buffers in memory")
    right.set_ylabel("share of pipeswitch's")
    times = [f"{name}\nlimit {result['limit_s']:.2f} s" for name, result in by_model.items()]
    sizes = [f"{name}\n{format_bytes(result['weight_bytes'])}" for name, result in by_model.items()]
    for axes, labels in ((left, times), (right, sizes)):
        axes.set_xticks(range(len(by_model)), labels)
        axes.set_xlim(-0.55, len(by_model) - 0.45)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
    figure.suptitle(f"disk {limit}" if limit == "unthrottled" else f"disk held at {limit}")
    handles: list[Any] = [Patch(color=colors[mode], label=mode) for mode in modes]
    handles.append(Line2D([], [], color="k", linewidth=1.6, label="limit: max(what the mode reads, compute)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _colors(modes: list[str]) -> dict[str, str]:
    colors = dict(_FAMILIES)
    for family, shades in _SHADES.items():
        members = [mode for mode in modes if mode.startswith(f"{family}-")]
        colors |= {mode: shades[min(idx, len(shades) - 1)] for idx, mode in enumerate(members)}
    return colors
