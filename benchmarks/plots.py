"""matplotlib for the plots of benchmarks, which do without it where it is not installed."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any | None:
    """`matplotlib.pyplot`, which draws into files; None, and a line says so, if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("  no plot: matplotlib is not installed; it comes with the extra `bench`")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
