"""Reports what `benchmarks.peers` measured: rows, lines of a table, checks of the targets, and a PNG for each limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.checks import Check

MIB = 2**20

Record = dict[str, Any]

_RATIOS: dict[str, dict[float, float]] = {
    "llama.cpp": {0.3: 1.5, 0.5: 2.2, 0.8: 4.0, 0.0: 0.95},
    "accelerate": {0.3: 3.0, 0.5: 4.0, 0.8: 8.0},
    "airllm": {0.3: 6.0, 0.5: 9.0, 0.8: 18.0},
    "transformers": {0.0: 1.3},
}
"""By side and share of the weights in memory: how many times its tokens a second the engine has with one session."""

_RATIO_OF_MANY = {0.0: 0.9}
"""The same for several sessions beside llama.cpp, where it differs from one session's."""

_FIRST_TOKEN = 1.25
_LONG_PROMPT, _LONG_PROMPT_RATE = 2048, 0.9
_SHORT_PROMPT = 8
_COLORS = ("#12589c", "#e08a1e", "#f2c48d", "#4fae54", "#9a9a9a", "#8b5fbf", "#5b5b5b")


def rows(case: Record, runs: dict[str, list[Record]], weight_bytes: int) -> list[Record]:
    """A row for each side: medians of its runs, and its error."""
    made = [_row(case, name, records) for name, records in runs.items()]
    engine = next((row for row in made if row["side"] == "engine"), None)
    for row in made:
        both = engine is not None and engine["tokens_per_s"] and row["tokens_per_s"]
        row["ratio"] = engine["tokens_per_s"] / row["tokens_per_s"] if engine is not None and both else None
        row["of_disk"] = None
        if row["tokens_per_s"] and (most := _most(case, weight_bytes)):
            row["of_disk"] = row["tokens_per_s"] / most
    expected = _tokens(runs.get("engine", []))
    for row in made:
        row["same_tokens"] = _same(_tokens(runs[row["side"]]), expected)
        for run in row["runs"]:
            for point in run["points"]:
                point.pop("tokens", None)
    return made


def _row(case: Record, name: str, records: list[Record]) -> Record:
    first = [run["points"][0] for run in records if run["points"]]
    prompts = [(point["prompt_tokens"], point["first_token_s"]) for run in records for point in run["points"]]
    limit_errors = [run["limit_error"] for run in records if run.get("limit_error")]
    return {
        "side": name,
        "limit": case["limit"],
        "share": case["share"],
        "sessions": case["sessions"],
        "error": next((run["error"] for run in records if run["error"] is not None), None),
        "limit_error": limit_errors[0] if limit_errors else None,
        "tokens_per_s": _median(point["decode_tokens_per_s"] for point in first),
        "read_bytes_per_token": _median(point["read_bytes_per_token"] for point in first),
        "opening_s": _median(run.get("opening_s") for run in records),
        "first_token_s": {
            number: _median(seconds for other, seconds in prompts if other == number)
            for number in dict.fromkeys(number for number, _ in prompts)
        },
        "peak_bytes": max((run.get("peak_bytes") or run.get("peak_used_bytes") or 0 for run in records), default=0),
        "offload_share": records[-1].get("offload_share") if records else None,
        "runs": records,
    }


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _tokens(records: Sequence[Record]) -> list[list[int]]:
    found: list[list[int]] = records[0]["points"][0]["tokens"] if records and records[0]["points"] else []
    return found


def _same(tokens: list[list[int]], expected: list[list[int]]) -> float | None:
    """The share of a side's tokens that come before the first one that differs from the engine's."""
    if not tokens or not expected:
        return None
    equal = 0
    for sequence, other in zip(tokens, expected, strict=True):
        pairs = zip(sequence, other, strict=True)
        equal += next((idx for idx, (one, two) in enumerate(pairs) if one != two), len(sequence))
    return equal / sum(map(len, tokens))


def _most(case: Record, weight_bytes: int) -> float | None:
    """Tokens/s if only the disk took time, and all memory held weights; None if the disk is not held or not needed."""
    if not case["limit"] or not case["share"]:
        return None
    return float(case["sessions"] * case["limit"] * MIB / (weight_bytes * (1 - case["share"])))


# --- lines ---


def _memory(share: float) -> str:
    return f"{share:.0%}" if share else "all"


def _disk(limit: int) -> str:
    return f"{limit} MiB/s" if limit else "unthrottled"


def _sessions(number: int) -> str:
    return "1 session" if number == 1 else f"{number} sessions"


def lines(case: Record, measured: Sequence[Record], weight_bytes: int) -> list[str]:
    most = _most(case, weight_bytes)
    ceiling = f"; the disk allows {most:.2f} tokens/s" if most else ""
    head = f"\nmemory {_memory(case['share'])}, disk {_disk(case['limit'])}, {_sessions(case['sessions'])}{ceiling}"
    prompts = list(dict.fromkeys(number for row in measured for number in row["first_token_s"]))
    titles = "".join(f"{f'first {number}':>11}" for number in prompts)
    found = [
        head,
        f"  {'side':16} {'tokens/s':>9} {'ratio':>7} {'of disk':>8} {'MiB/token':>10} {'peak MiB':>9} {'same':>5} "
        f"{'open s':>8}{titles}",
    ]
    for row in measured:
        firsts = "".join(f"{_number(row['first_token_s'].get(number), 11, 2)}" for number in prompts)
        found.append(
            f"  {row['side']:16} {_number(row['tokens_per_s'], 9, 3)} {_number(row['ratio'], 7, 2)} "
            f"{_number(row['of_disk'], 8, 2)} {_number(row['read_bytes_per_token'], 10, 0, MIB)} "
            f"{_number(row['peak_bytes'] or None, 9, 0, MIB)} {_number(row['same_tokens'], 5, 2)} "
            f"{_number(row['opening_s'], 8, 2)}{firsts}"
        )
        notes = [f"FAILS: {row['error']}"] if row["error"] else []
        notes += [f"the disk was not held: {row['limit_error']}"] if row["limit_error"] else []
        notes += sorted({run["cache_error"] for run in row["runs"] if run.get("cache_error")})
        if (row["offload_share"] or 1) < 1:
            notes.append(f"{row['offload_share']:.0%} of the limit hold weights; with more, the kernel ends it")
        found += [f"      {note}" for note in notes]
    return found


def _number(value: float | None, width: int, digits: int, unit: int = 1) -> str:
    return f"{'-' if value is None else f'{value / unit:.{digits}f}':>{width}}"


# --- targets ---


def checks(measured: Sequence[Record]) -> dict[str, Check]:
    """The engine beside the other sides, by disk and memory."""
    found: dict[str, Check] = {}
    by_case = {(row["limit"], row["share"], row["sessions"], row["side"]): row for row in measured}
    for (limit, share, sessions, name), row in by_case.items():
        engine = by_case.get((limit, share, sessions, "engine"))
        target = _RATIOS.get(name, {}).get(share)
        if engine is None or target is None:
            continue
        where = f"{_disk(limit)}, memory {_memory(share)}, {_sessions(sessions)}: "
        wrong = _wrong(engine, row)
        if sessions > 1:
            target = _RATIO_OF_MANY.get(share, target)
        found[f"{where}tokens_per_s_to_{name}"] = wrong or (row["ratio"], target, "at least")
        if name != "llama.cpp" or sessions > 1:
            continue
        first, other = _first_token(engine), _first_token(row)
        if first is not None and other is not None:
            found[f"{where}cold_first_token_to_llama.cpp"] = (first / other, _FIRST_TOKEN, "at most")
        long, other = (one["first_token_s"].get(_LONG_PROMPT) for one in (engine, row))
        if long is not None and other is not None:
            key = f"{where}rate_of_{_LONG_PROMPT}_prompt_tokens_to_llama.cpp"
            found[key] = (other / long, _LONG_PROMPT_RATE, "at least")
    return found


def _first_token(row: Record) -> float | None:
    """Seconds to open and to the first token, with an empty page cache."""
    first = row["first_token_s"].get(_SHORT_PROMPT)
    return None if first is None or row["opening_s"] is None else float(row["opening_s"] + first)


def _wrong(engine: Record, row: Record) -> str | None:
    """Why two rows have no ratio, or one that does not count."""
    for one in (engine, row):
        if one["tokens_per_s"] is None:
            return f"{one['side']} fails: {one['error']}"
        if one["limit_error"]:
            return f"the disk was not held: {one['limit_error']}"
    return None


# --- plots ---


def draw(measured: Sequence[Record], folder: Path) -> None:
    """Draws a PNG for each limit on the disk: tokens a second by memory, for one session and for several."""
    pyplot = plots.pyplot()
    if pyplot is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(row["side"] for row in measured))
    colors = {name: _COLORS[idx % len(_COLORS)] for idx, name in enumerate(names)}
    for limit in dict.fromkeys(row["limit"] for row in measured):
        counts = list(dict.fromkeys(row["sessions"] for row in measured if row["limit"] == limit))
        figure, found = pyplot.subplots(1, len(counts), figsize=(6.5 * len(counts), 5), layout="constrained")
        for axes, sessions in zip([found] if len(counts) == 1 else found, counts, strict=True):
            shown = [row for row in measured if (row["limit"], row["sessions"]) == (limit, sessions)]
            _draw_bars(axes, shown, colors)
            axes.set_title(_sessions(sessions))
        figure.suptitle(f"tokens a second, disk {_disk(limit)}")
        file = folder / f"peers-{_disk(limit).replace('/', '').replace(' ', '-')}.png"
        figure.savefig(file, dpi=100)
        pyplot.close(figure)
        print(f"  plot: {file}")


def _draw_bars(axes: Any, shown: Sequence[Record], colors: dict[str, str]) -> None:
    shares = list(dict.fromkeys(row["share"] for row in shown))
    names = [name for name in colors if any(row["side"] == name for row in shown)]
    step = 0.82 / max(1, len(names))
    for idx, name in enumerate(names):
        bars = [
            (shares.index(row["share"]) + (idx - (len(names) - 1) / 2) * step, row["tokens_per_s"])
            for row in shown
            if row["side"] == name and row["tokens_per_s"]
        ]
        places, heights = [place for place, _ in bars], [height for _, height in bars]
        drawn = axes.bar(places, heights, width=step * 0.9, color=colors[name], label=name)
        axes.bar_label(drawn, fmt="{:.2g}", fontsize=7)
    axes.set_xticks(range(len(shares)), [_memory(share) for share in shares])
    axes.set_xlabel("memory, of the weights")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
