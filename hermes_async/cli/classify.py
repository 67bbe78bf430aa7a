"""`hermes-async classify`: prints the labels of a text or an image file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from hermes_async.cli import options
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.storage.hub import HubOptions


def classify(
    model: options.Model,
    item: Annotated[str, typer.Argument(help="A text, or the path of an image if the model takes images.")],
    memory: options.Memory = "auto",
    top: Annotated[int, typer.Option(help="How many labels to print.", min=1)] = 5,
    truncate: options.Truncate = False,
    trace: options.Trace = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    json_output: options.Json = False,
) -> None:
    """Classify a text or an image: print the likeliest labels with their probabilities."""
    with errors_in_one_line():
        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))

        async def work(interrupts: Interrupts) -> None:
            from hermes_async import Engine

            async with Engine(path, memory_budget=memory, trace=trace) as engine:
                labels = (await engine.classify(item, truncate=truncate))[:top]
                plan, statistics = engine.plan.as_dict(), engine.statistics().as_dict()
            if json_output:
                print(
                    json.dumps({"labels": [asdict(label) for label in labels], "plan": plan, "statistics": statistics})
                )
                return
            for label in labels:
                print(f"{label.score:.4f}  {label.label}")

        run(work)
