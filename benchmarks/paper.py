"""Repeats the paper's evaluation: BERT-Large, ViT-Large, GPT-2 and GPT-J, loaded and run in several modes.

    python -m benchmarks.paper [--models bert,vit,gpt2,gptj] [--small] [--modes baseline,pipeload-2] [--runs 5]
        [--limit 0,500] [--folder DIR] [--json FILE] [--plot FOLDER] [--markdown FILE]
    python -m benchmarks.paper --from-json FILE [FILE] [--plot FOLDER] [--markdown FILE]

Each run is a process of its own and begins with an empty page cache. Its latency is the time from the first byte read
to the output, or to the first token of a model that generates: loading and inference together. No mode can take less
than max(bytes read over the disk's rate, compute). Loading that overlaps with computing turns load + compute into
max(load, compute) at best. That ratio is the ceiling of all ratios here, and is printed first. The modes:

    transformers  from_pretrained, then forward
    baseline      every layer is deserialised with torch.load and copied in, then forward (the paper's baseline)
    pipeswitch    the same loader on a thread of its own, while layers that have arrived compute; nothing is freed
    pipeload-N    N loading agents, N + 1 layers in memory, every layer freed after its computation
    budget-X      this library's planner, given X of the weights' bytes

Weights are in float32, and GPT-J's 6 billion in bfloat16: 12 GB, which need about as much memory and twice as much
disk. In bfloat16, a token may differ if two are about equally likely, because each mode computes in chunks of its
own.

A further token reads only weights that are not resident. So a token in a budget takes max(bytes of a sweep over the
disk's rate, compute), and pipeload-2's takes the same of all layers. The expected ratio of the two is printed beside
the measured one.

Source: Hermes (arXiv 2409.04249), section V; PipeSwitch (Bai et al., OSDI 2020).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import paper_modes, paper_report
from benchmarks.paper_checkpoints import MODELS, checkpoint
from benchmarks.paper_modes import weight_bytes
from benchmarks.processes import preload, run_alone

_MODES = (
    *("transformers", "baseline", "pipeswitch"),
    *("pipeload-2", "pipeload-4", "pipeload-6"),
    *("budget-0.1", "budget-0.15", "budget-0.25", "budget-0.5"),
)
_MODE = re.compile(r"transformers|baseline|pipeswitch|pipeload-[1-9]\d*|budget-\d*\.?\d+")

Results = dict[str, dict[str, dict[str, Any]]]
"""Model, limit, figures."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="which models (default all)")
    parser.add_argument("--small", action="store_true", help="leave GPT-J (12 GB in bfloat16) out")
    parser.add_argument("--modes", default=",".join(_MODES), help="which modes (default all), N and X freely chosen")
    parser.add_argument("--runs", type=int, default=5, help="runs of each mode; medians count (default 5)")
    parser.add_argument("--new-tokens", type=int, default=8, help="that GPT generates, 2 at the least (default 8)")
    parser.add_argument("--limit", default="0", help="MiB/s that the disk is held at, one or several; 0: not held")
    parser.add_argument("--folder", type=Path, default=None, help="where to make checkpoints: the disk to measure")
    parser.add_argument("--json", type=Path, default=None, help="write the results into this file too")
    parser.add_argument("--markdown", type=Path, default=None, help="write tables into this file")
    parser.add_argument("--plot", type=Path, default=None, help="draw a PNG of each limit there (needs matplotlib)")
    parser.add_argument("--from-json", type=Path, nargs="+", help="measure nothing, take the results from these files")
    args = parser.parse_args()
    names = [name for name in args.models.split(",") if not (args.small and name == "gptj")]
    modes, limits = args.modes.split(","), [int(limit) for limit in args.limit.split(",")]
    if unknown := set(names) - MODELS.keys():
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    if unknown := {mode for mode in modes if not _MODE.fullmatch(mode)}:
        parser.error(f"unknown modes: {', '.join(sorted(unknown))}")
    if args.new_tokens < 2:
        parser.error("a token's time is that between two: --new-tokens must be at least 2")
    if args.from_json is None:
        preload("benchmarks.paper_modes")
        results: Results = {}
        for name in names:
            with checkpoint(name, args.folder) as path:
                for limit in limits:
                    result = evaluate(name, path, limit, modes, args.runs, args.new_tokens)
                    results.setdefault(name, {})[limit_name(limit)] = result
                    _save(results, args)
    else:
        results = _read(args.from_json)
        for name, by_limit in results.items():
            for held, result in by_limit.items():
                print("\n" + "\n".join(paper_report.lines(name, held, result)))
        _save(results, args)
    print(json.dumps(results))


def _save(results: Results, args: argparse.Namespace) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps(results))
    if args.markdown is not None:
        args.markdown.write_text(paper_report.markdown(results))
    if args.plot is not None:
        paper_report.draw(results, args.plot)


def _read(files: list[Path]) -> Results:
    """Reads results from several files, and joins the limits of each model."""
    results: Results = {}
    for file in files:
        for name, by_limit in json.loads(file.read_text()).items():
            results.setdefault(name, {}).update(by_limit)
    return results


# --- alternates the modes, and compares ---


def evaluate(name: str, path: Path, limit: int, modes: list[str], num_runs: int, new_tokens: int) -> dict[str, Any]:
    """Every mode's figures, with the disk held at `limit` MiB/s.

    The disk is measured between any two runs, and inference alone between the rounds; on a free disk also what plain
    reads and inference take together. A run's limit uses the rates just before and just after it, because a shared disk
    changes by a fifth within minutes.
    """

    def measured(mode: str, limit: int) -> dict[str, Any]:
        return run_alone(paper_modes.run, mode, path, limit, new_tokens)

    dtype = str(MODELS[name][1]).removeprefix("torch.")
    result: dict[str, Any] = {"dtype": dtype, "weight_bytes": weight_bytes(path)}
    alone, rates = [measured("compute", 0)], [measured("disk", limit)["bytes_per_s"]]
    _add_limits(result, alone, rates)
    overlapped: list[dict[str, Any]] = []
    print("\n" + paper_report.heading(name, limit_name(limit), result), flush=True)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for _ in range(num_runs):
        for mode in modes:
            if any("refused" in run for run in runs[mode]):
                continue
            run = measured(mode, limit)
            rates.append(measured("disk", limit)["bytes_per_s"])
            runs[mode].append(run | {"disk_bytes_per_s": statistics.mean(rates[-2:])})
        alone.append(measured("compute", 0))
        if not limit:
            overlapped.append(measured("overlapped", 0))
    _add_limits(result, alone, rates)
    if overlapped:
        result["overlapped_s"] = statistics.median(run["latency_s"] for run in overlapped)
    if overlapped and "per_token_s" in overlapped[0]:
        result["overlapped_token_s"] = statistics.median(run["per_token_s"] for run in overlapped)
    result["modes"] = _compare(runs, result)
    load_s = result["modes"].get("baseline", {}).get("load_s")
    if load_s is not None:
        compute_s = result["compute"]["latency_s"]
        result["deserialising"] = {"load_s": load_s, "ceiling": (load_s + compute_s) / max(load_s, compute_s)}
    print("\n".join(paper_report.lines(name, limit_name(limit), result)), flush=True)
    return result


def limit_name(limit: int) -> str:
    return f"{limit} MiB/s" if limit else "unthrottled"


def _add_limits(result: dict[str, Any], alone: list[dict[str, Any]], rates: list[float]) -> None:
    """Adds medians of inference alone and of the disk's rate, and the limits that follow from them."""
    timed = [key for key in ("latency_s", "per_token_s") if key in alone[0]]
    compute = alone[0] | {key: statistics.median(run[key] for run in alone) for key in timed}
    rate = statistics.median(rates)
    read_s, compute_s = result["weight_bytes"] / rate, compute["latency_s"]
    limit_s = _limit_s(result["weight_bytes"], rate, compute_s)
    result |= {
        "compute": compute,
        "disk_bytes_per_s": rate,
        "read_s": read_s,
        "limit_s": limit_s,
        "ceiling": (read_s + compute_s) / limit_s,
    }


def _limit_s(nbytes: int, bytes_per_s: float, compute_s: float) -> float:
    """The least seconds of a run that reads so many bytes and computes for so long."""
    return max(nbytes / bytes_per_s, compute_s)


def _add_shares(run: dict[str, Any], weight_bytes: int, compute: dict[str, Any]) -> None:
    """Adds a run's time as a share of its physical limit: of the disk's rate around it, or of inference alone."""
    rate = run["disk_bytes_per_s"]
    run["limit_s"] = _limit_s(run.get("bytes_read", weight_bytes), rate, compute["latency_s"])
    run["share_of_limit"] = run["latency_s"] / run["limit_s"]
    if "per_token_s" in compute:
        run["token_limit_s"] = _limit_s(run.get("bytes_per_sweep", 0), rate, compute["per_token_s"])
        run["token_share_of_limit"] = run["per_token_s"] / run["token_limit_s"]
    if "per_pass_s" in run:
        run["pass_share_of_limit"] = run["per_pass_s"] / _limit_s(run["bytes_per_sweep"], rate, compute["latency_s"])


def _compare(runs: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compares each mode's medians with the physical limit, pipeswitch and pipeload-2."""
    compute = result["compute"]
    modes: dict[str, dict[str, Any]] = {}
    for mode, records in runs.items():
        first = records[0]
        if "refused" in first:
            modes[mode] = {"refused": first["refused"]}
            continue
        for run in records:
            _add_shares(run, result["weight_bytes"], compute)
        numbers = [key for key, value in first.items() if isinstance(value, (int, float))]
        figures: dict[str, Any] = {key: statistics.median(run[key] for run in records) for key in numbers}
        figures["same_output"] = all(_same(run["output"], compute["output"]) for run in records)
        figures["latencies_s"] = [run["latency_s"] for run in records]
        if "overlapped_s" in result:
            figures["share_of_overlapped"] = figures["latency_s"] / result["overlapped_s"]
        if "overlapped_token_s" in result and first.get("bytes_per_sweep"):
            # Computing a token adds as much to plain reads, however much is read.
            added_s = max(0, result["overlapped_token_s"] - result["read_s"])
            read_s = figures["bytes_per_sweep"] / figures["disk_bytes_per_s"]
            both_s = max(read_s + added_s, compute["per_token_s"])
            figures["token_share_of_overlapped"] = figures["per_token_s"] / both_s
        modes[mode] = figures
    measured = {mode: figures for mode, figures in modes.items() if "refused" not in figures}
    switch, pipeload = measured.get("pipeswitch"), measured.get("pipeload-2")
    for mode, figures in measured.items():
        if switch is not None:
            figures["times_pipeswitch"] = switch["latency_s"] / figures["latency_s"]
            figures["memory_less"] = 1 - figures["memory_bytes"] / switch["memory_bytes"]
            if "baseline" in measured and mode.startswith(("pipeload-", "budget-")):
                # What its speed is made of: the product of the three is `times_pipeswitch`.
                at_best_s = max(measured["baseline"]["load_s"], compute["latency_s"])
                figures["by_overlap"] = switch["latency_s"] / at_best_s
                figures["by_loader"] = at_best_s / figures["limit_s"]
        if pipeload is not None and mode.startswith("budget-") and "token_limit_s" in figures:
            own_s, all_freed_s = (
                _limit_s(one["bytes_per_sweep"], result["disk_bytes_per_s"], compute["per_token_s"])
                for one in (figures, pipeload)
            )
            figures["token_ratio_expected"] = own_s / all_freed_s
            figures["token_ratio_measured"] = figures["per_token_s"] / pipeload["per_token_s"]
    return modes


def _same(output: list[float], expected: list[float]) -> bool:
    return len(output) == len(expected) and all(
        abs(one - other) <= 1e-3 * max(1, abs(other)) for one, other in zip(output, expected, strict=True)
    )


if __name__ == "__main__":
    main()
