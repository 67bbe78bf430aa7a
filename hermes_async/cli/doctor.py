"""`hermes-async doctor`: what of this machine matters to an engine, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hermes_async import __version__
from hermes_async.cli import options
from hermes_async.cli.run import errors_in_one_line

_MARKS = {"ok": "ok", "advice": "advice", "problem": "PROBLEM"}


def doctor(
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The folder that models are read from; by default, the hub's cache. A temporary file is written there "
            "and read.",
            show_default=False,
        ),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Show what of this machine matters to an engine, with a line of advice each. Exits with 1 if none can run."""
    with errors_in_one_line():
        from hermes_async.profiler.findings import examine, is_usable

        findings = examine(_models_folder() if folder is None else folder)
        usable = is_usable(findings)
        if json_output:
            record = {"version": __version__, "usable": usable, "findings": [finding.as_dict() for finding in findings]}
            print(json.dumps(record))
        else:
            print(f"hermes-async {__version__}")
            for finding in findings:
                print(f"{_MARKS[finding.status]:>7}  {finding.name}: {finding.found}\n{'':>7}  {finding.advice}")
            print("An engine can run here." if usable else "No engine can run here: see PROBLEM above.")
    if not usable:
        raise typer.Exit(1)


def _models_folder() -> Path:
    """Where the hub's downloads lie."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
