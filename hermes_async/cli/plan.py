"""`hermes-async plan`: how a budget would be divided, and what that would give, without reading weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hermes_async.cli import options
from hermes_async.cli.pictures import pyplot, save
from hermes_async.cli.run import errors_in_one_line
from hermes_async.cli.tables import print_table
from hermes_async.config import format_bytes, format_count
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from rich.table import Table

    from hermes_async import Plan, Prediction

_SESSIONS = (1, 8, 64)
_TEXTS = (1, 4)  # of a model that does not generate
_BUDGETS = 12


def plan(
    model: options.Model,
    memory: options.Memory = "auto",
    loading_agents: options.LoadingAgents = None,
    max_resident_layers: options.MaxResidentLayers = None,
    kernels: options.Kernels = "auto",
    dtype: options.Dtype = "auto",
    lock_memory: options.LockMemory = "auto",
    context_length: options.ContextLength = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Plan for many budgets, from the smallest that works; ignores --memory.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --sweep, draw speed against memory.", show_default=False),
    ] = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    json_output: options.Json = False,
) -> None:
    """Show how a budget would be divided and what that would give, without loading or downloading weights."""
    if plot is not None and not sweep:
        raise typer.BadParameter("--plot needs --sweep")
    with errors_in_one_line():
        config = options.engine_config(
            loading_agents,
            max_resident_layers,
            kernels=kernels,
            dtype=dtype,
            lock_memory=lock_memory,
            context_length=context_length,
        )
        from hermes_async.engine.opening import open_model, plans_by_budget
        from hermes_async.storage.hub import without_weights

        with without_weights(model, HubOptions(revision, token, cache_dir)) as source:
            if sweep:
                plans = plans_by_budget(source, config, _BUDGETS)
            else:
                opened = open_model(source, memory, config)
                opened.close()
                plans = [opened.plan]
        predictions = [predictions_of(chosen) for chosen in plans]
        if json_output:
            records = [
                chosen.as_dict() | {"predictions": [asdict(one) for one in predicted]}
                for chosen, predicted in zip(plans, predictions, strict=True)
            ]
            print(json.dumps(records if sweep else records[0]))
        elif sweep:
            print_table(_budgets_table(plans, predictions))
        else:
            print(plans[0])
            print_table(_sessions_table(plans[0], predictions[0]))
        if plot is not None:
            draw(plans, predictions, plot)
            print(f"{plot} shows speed against memory", file=sys.stderr)


def predictions_of(chosen: Plan) -> list[Prediction]:
    """For one session, and for more sessions up to what KV memory allows."""
    from hermes_async import predict

    predicted = [predict(chosen, num_sessions=count) for count in (_SESSIONS if chosen.generates else _TEXTS)]
    return list({prediction.num_sessions: prediction for prediction in predicted}.values())


def _sessions_table(chosen: Plan, predicted: Sequence[Prediction]) -> Table:
    from rich.table import Table

    table = Table(title=f"predicted; speeds {chosen.machine.source}", title_justify="left")
    what = "token" if chosen.generates else "text"
    names = ["sessions" if chosen.generates else "at once", "s a sweep", "reading", "computing"]
    if chosen.experts:
        names += ["reads", "hits"]
    for name in (*names, f"{what}s/s", f"first {what if what == 'token' else 'output'}, s", "memory"):
        table.add_column(name, justify="right")
    for prediction in predicted:
        seconds = (
            prediction.sweep_seconds,
            prediction.read_seconds,
            prediction.compute_seconds,
            prediction.tokens_per_second,
            prediction.first_token_seconds,
        )
        numbers = [f"{value:.3g}" for value in seconds]
        if prediction.expert_hit_rate is not None:
            numbers[3:3] = [format_bytes(prediction.bytes_per_sweep), f"{prediction.expert_hit_rate:.0%}"]
        table.add_row(str(prediction.num_sessions), *numbers, format_bytes(prediction.peak_bytes))
    return table


def _budgets_table(plans: Sequence[Plan], predictions: Sequence[Sequence[Prediction]]) -> Table:
    """A row for each budget; the first is the smallest that works."""
    from rich import box
    from rich.table import Table

    first = plans[0]
    table = Table(
        title=f"{format_bytes(first.weight_bytes)} of weights; the smallest budget that works is "
        f"{format_bytes(first.minimum_budget)} ({first.minimum_budget} bytes)\nspeeds {first.machine.source}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    what = "tokens" if first.generates else "texts"
    has_experts = any(chosen.experts for chosen in plans)
    for name in (
        "budget",
        "hits" if has_experts else "resident",
        "reads",
        "s/sweep",
        "first, s",
        f"{what}/s",
        "most at once",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for chosen, predicted in zip(plans, predictions, strict=True):
        one, most = predicted[0], predicted[-1]
        table.add_row(
            format_bytes(chosen.memory_budget),
            f"{chosen.expert_hit_rate(1):.0%}" if has_experts else format_bytes(chosen.resident_bytes),
            format_bytes(one.bytes_per_sweep),
            f"{one.sweep_seconds:.3g}",
            f"{one.first_token_seconds:.3g}",
            f"{one.tokens_per_second:.3g}",
            f"{most.num_sessions}: {most.tokens_per_second:.3g}/s",
        )
    return table


def draw(plans: Sequence[Plan], predictions: Sequence[Sequence[Prediction]], output: Path) -> None:
    """Draws tokens a second against memory, a line for each number of sessions.

    Raises:
        ConfigError: matplotlib is not installed, or the picture cannot be written.
    """
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(8, 5), layout="constrained")
    what = "tokens" if plans[0].generates else "texts"
    lines: dict[int, list[tuple[float, float]]] = {}
    most = _SESSIONS if plans[0].generates else _TEXTS
    for chosen, predicted in zip(plans, predictions, strict=True):
        for count in most:
            # Where there is memory for fewer sessions, what those give.
            prediction = max((one for one in predicted if one.num_sessions <= count), key=lambda one: one.num_sessions)
            point = (chosen.memory_budget / 2**20, prediction.tokens_per_second)
            lines.setdefault(count, []).append(point)
    for count, points in lines.items():
        label = format_count(count, "session" if what == "tokens" else "text")
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)
    smallest, weights = plans[0].minimum_budget / 2**20, plans[0].weight_bytes / 2**20
    axes.axvline(
        smallest, color="gray", linestyle=":", label=f"smallest budget, {format_bytes(plans[0].minimum_budget)}"
    )
    axes.axvline(weights, color="gray", linestyle="--", label=f"weights, {format_bytes(plans[0].weight_bytes)}")
    axes.set(xlabel="memory budget, MiB", ylabel=f"{what} a second, predicted", xscale="log", yscale="log")
    axes.set_title(f"speeds {plans[0].machine.source}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save(figure, output)
