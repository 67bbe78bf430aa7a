"""`hermes-async profile`: measures stages, disk and kernels on this machine."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hermes_async.cli import options
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.cli.tables import new_table, print_table
from hermes_async.config import format_bytes
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from rich.table import Table

    from hermes_async.pipeload.trace import Event
    from hermes_async.planning.profile import Profile, StageProfile


_EXPERT_SHARES = (0.05, 0.1, 0.25, 0.5)
_EXPERT_TOKENS = (1, 8)


def profile(
    model: options.Model,
    memory: options.Memory = "auto",
    loading_agents: options.LoadingAgents = None,
    max_resident_layers: options.MaxResidentLayers = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, even where there is a profile.")] = False,
    trace: options.Trace = None,
    log_level: options.LogLevel = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    json_output: options.Json = False,
) -> None:
    """Measure a model's stages, the disk and the processor's kernels. The profile is kept for a month."""
    with errors_in_one_line():
        from hermes_async.engine.trace_file import open_trace_file
        from hermes_async.planning.profile_store import load_profile, profile_file, save_profile
        from hermes_async.profiler.profiler import asked, measure
        from hermes_async.storage.checkpoint import Checkpoint
        from hermes_async.storage.own_file import own_file_errors

        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))
        config = options.engine_config(loading_agents, max_resident_layers)
        file = profile_file(Checkpoint.open(path))
        measured = None if refresh or trace is not None else load_profile(file)
        if measured is None or measured.asked_for != asked(memory, config):
            new = None if trace is None else open_trace_file(trace)  # before measuring, which takes minutes
            taken: list[Profile] = []
            events: list[Event] = []

            async def work(interrupts: Interrupts) -> None:
                taken.append(await measure(path, memory, config, events))

            try:
                run(work)
            except BaseException:
                if new is not None:
                    new.discard()
                raise
            measured = taken[0]
            save_profile(file, measured)
            if trace is not None and new is not None:
                with own_file_errors(trace, "trace file"), new:
                    new.file.write(json.dumps(events).encode())
                print(f"{trace} is the trace", file=sys.stderr)
        if json_output:
            print(json.dumps(asdict(measured)))
            return
        for table in (_stage_table(measured), _disk_table(measured), _kernel_table(measured)):
            print_table(table)
        if measured.expert_uses:
            print_table(_expert_table(measured))


def _stage_table(measured: Profile) -> Table:
    """A row for each kind of stage: the same part of every layer."""
    kinds: dict[str, list[StageProfile]] = defaultdict(list)
    for stage in measured.stages:
        kinds[re.sub(r"\d+", "*", stage.name)].append(stage)
    counts = sorted({tokens for stage in measured.stages for tokens in stage.compute_s})
    table = new_table(title=f"stages, {measured.dtype}, in {format_bytes(measured.memory_budget)}")
    table.add_column("stages")
    for name in ("number", "resident", "each", "load, ms", *(f"compute {count}, ms" for count in counts)):
        table.add_column(name, justify="right")
    for name, stages in kinds.items():
        times = [
            _milliseconds([stage.compute_s[count] for stage in stages if count in stage.compute_s]) for count in counts
        ]
        table.add_row(
            name,
            str(len(stages)),
            str(sum(stage.resident for stage in stages)),
            format_bytes(round(statistics.median(stage.nbytes for stage in stages))),
            _milliseconds([stage.load_s for stage in stages]),
            *times,
        )
    return table


def _disk_table(measured: Profile) -> Table:
    sizes = sorted({disk.read_bytes for disk in measured.disk})
    table = new_table(title="disk, bytes a second")
    table.add_column("agents")
    for size in sizes:
        table.add_column(f"{format_bytes(size)} at once", justify="right")
    rates = {(disk.num_agents, disk.read_bytes): disk.bytes_per_s for disk in measured.disk}
    for agents in sorted({disk.num_agents for disk in measured.disk}):
        known = [rates.get((agents, size)) for size in sizes]
        table.add_row(str(agents), *("" if rate is None else format_bytes(round(rate)) for rate in known))
    return table


def _kernel_table(measured: Profile) -> Table:
    counts = sorted({tokens for kernel in measured.kernels for tokens in kernel.flops})
    table = new_table(title="kernels, GFLOP/s by tokens; * is the fastest")
    table.add_column("dtype")
    table.add_column("kernel")
    best = {count: max(kernel.flops[count] for kernel in measured.kernels) for count in counts}
    for count in counts:
        table.add_column(str(count), justify="right")
    for kernel in measured.kernels:
        rates = [
            f"{kernel.flops[count] / 1e9:.1f}{'*' if kernel.flops[count] == best[count] else ' '}" for count in counts
        ]
        table.add_row(kernel.dtype, kernel.kernel, *rates)
    return table


def _expert_table(measured: Profile) -> Table:
    from hermes_async.planning.expert_use import expected_use

    table = new_table(title="hit rate of the expert cache, expected from a text")
    for name in ("tokens a sweep", *(f"{share:.0%} in memory" for share in _EXPERT_SHARES)):
        table.add_column(name, justify="right")
    for count in _EXPERT_TOKENS:
        uses = [
            expected_use(measured.expert_uses, count, share * len(measured.expert_uses)) for share in _EXPERT_SHARES
        ]
        table.add_row(str(count), *(f"{one.num_hits / one.num_used:.0%}" for one in uses))
    return table


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f}" if seconds else ""
