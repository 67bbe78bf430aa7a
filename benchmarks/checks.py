"""The figures of a benchmark beside their targets, which several benchmarks print in the same way."""

from __future__ import annotations

from collections.abc import Mapping

Check = tuple[float, float, str] | str
"""Figure, target and sense ("at least" or "at most"); or why there is none."""


def print_checks(checks: Mapping[str, Check]) -> None:
    """Prints a line for each check: its figure, its target, and whether the target was met."""
    width = max(map(len, checks), default=0)
    print()
    for name, check in checks.items():
        if isinstance(check, str):
            print(f"  {name:{width}} not measured: {check}")
            continue
        figure, target, sense = check
        met = figure >= target if sense == "at least" else figure <= target
        print(f"  {name:{width}} {figure:7.3f}  ({sense} {target:g}: {'met' if met else 'MISSED'})")


def figures_of(checks: Mapping[str, Check]) -> dict[str, float | None]:
    """The figures alone, for JSON; None where there is none."""
    return {name: None if isinstance(check, str) else check[0] for name, check in checks.items()}
