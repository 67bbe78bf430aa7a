"""Measures how the time of a sweep and of opening grows with the model and with what runs in it.

    python -m benchmarks.growth [--quick] [--axes size,layers,context,sessions,vocabulary] [--rounds 3] [--limit MIB]
                                [--folder DIR] [--json FILE]

One table for each axis: the bytes of a model (0.5 to 12 GiB), its layers (8 to 80), the tokens before a decode step
(128 to 8k), the sessions that decode together (1 to 64), and the vocabulary (32k to 256k). Reading, multiplying and
attending set how fast a figure has to grow. Scheduling, planning, binding and sampling must not add anything that
grows faster. So under each column are two fits: the exponent p of seconds ~ x^p, a least-squares line through the
logarithms of the upper half of the points, and the least-squares line a + b x through all points. A figure grows no
faster than it must if p is at most what is expected, and a little for noise.

Checkpoints are made on the spot, in bf16, and deleted afterwards. Models of several sizes share one checkpoint's files.
Sweeps read with direct I/O, past the page cache. On the axis of the size, the same run measures plain direct reads of
the same extents. Rounds visit the points of an axis in turn, and medians of the rounds count.

A full run takes about ten minutes on two cores, and writes up to 12 GiB. `--quick` takes about two, and writes 3 GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from benchmarks.checks import Check, figures_of, print_checks
from benchmarks.disk import limited_disk
from benchmarks.growth_axes import AXES, Axis, Figure, Settings

MIB = 2**20

_FITTED = 4  # points of the upper half, at least
_NOISE = 0.1  # that an exponent may be above the expected one


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points, in about two minutes")
    parser.add_argument("--axes", default=",".join(AXES), help=f"of {', '.join(AXES)} (default all)")
    parser.add_argument("--rounds", type=int, default=None, help="visits to each point (default 3; 2 with --quick)")
    parser.add_argument("--limit", type=int, default=0, help="MiB/s that the disk is held at (default: not held)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints: the disk to measure")
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file, too, after each axis")
    args = parser.parse_args()
    names = args.axes.split(",")
    if unknown := set(names) - AXES.keys():
        parser.error(f"unknown axes: {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    rounds = args.rounds or (2 if args.quick else 3)
    if rounds < 1 or args.limit < 0:
        parser.error("at least one round is needed, and no negative limit")
    settings = Settings(args.folder, quick=args.quick)
    result: dict[str, Any] = {"rounds": rounds, "limit_mib_per_s": args.limit, "axes": {}}
    checks: dict[str, Check] = {}
    place = args.folder or Path(tempfile.gettempdir())
    with limited_disk(place, args.limit * MIB or None) as error:
        if args.limit and error is not None:
            print(f"the disk is not held: {error}", flush=True)
        result["limit_error"] = error if args.limit else None
        for name in names:
            axis = AXES[name]
            xs, columns = anyio.run(measure, axis, settings, rounds, backend_options={"use_uvloop": True})
            fits = {figure.name: fit(xs, columns[figure.name]) for figure in axis.figures}
            print("\n".join(table(axis, xs, columns, fits)), flush=True)
            checks |= {
                f"{name}: {figure.name}": (fits[figure.name]["exponent"], figure.exponent + _NOISE, "at most")
                for figure in axis.figures
            }
            result["axes"][name] = {"unit": axis.unit, "points": xs, "seconds": columns, "fits": fits}
            result["checks"] = figures_of(checks)
            if args.json is not None:
                args.json.write_text(json.dumps(result))
    print_checks(checks)
    print(json.dumps(result))


async def measure(axis: Axis, settings: Settings, rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """The points of an axis, and each figure at each of them: the median of all rounds."""
    print(f"\n{axis.title}: {axis.about}", flush=True)
    async with axis.points(settings) as points:
        seen: list[list[Mapping[str, float]]] = [[] for _ in points]
        for idx in range(rounds):
            for position in range(len(points))[:: -1 if idx % 2 else 1]:
                x, visit = points[position]
                seen[position].append(await visit())
                told = ", ".join(f"{name} {seconds:.4f}" for name, seconds in seen[position][-1].items())
                print(f"  {axis.shown(x)} {axis.unit}: {told}", flush=True)
    columns = {
        figure.name: [statistics.median(one[figure.name] for one in visits) for visits in seen]
        for figure in axis.figures
    }
    return [x for x, _ in points], columns


def fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """The exponent of a power law over the upper half of the points, and the line through all."""
    first = min(len(xs) // 2, max(0, len(xs) - _FITTED))
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs[first:], ys[first:], strict=True)]
    line = statistics.linear_regression(xs, ys)
    return {
        "exponent": statistics.linear_regression(*zip(*logs, strict=True)).slope,
        "intercept": line.intercept,
        "slope": line.slope,
    }


def table(
    axis: Axis, xs: Sequence[float], columns: Mapping[str, Sequence[float]], fits: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The lines of an axis's table, with the fits and what was expected under each column."""

    def cells(figure: Figure) -> list[str]:
        found = fits[figure.name]
        return [
            figure.name,
            *(f"{y:.4f}" for y in columns[figure.name]),
            f"{found['exponent']:.2f}",
            f"{figure.exponent:g}",
            f"{found['intercept']:.4f}",
            f"{found['slope']:.3g}",
        ]

    head = [axis.unit, *map(axis.shown, xs), "exponent p", "at most", "a of a + b x", "b"]
    rows = list(zip(head, *map(cells, axis.figures), strict=True))
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    return [
        "",
        *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        *(f"  {figure.name} grows with {figure.why}" for figure in axis.figures),
    ]


if __name__ == "__main__":
    main()
