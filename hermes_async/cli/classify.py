"""`hermes-async classify`: prints the labels of a text or an image file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hermes_async.cli import options
from hermes_async.cli.progress import EngineProgress, with_progress
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from hermes_async import Label


def classify(
    model: options.Model,
    item: Annotated[str, typer.Argument(help="A text, or the path of an image if the model takes images.")],
    memory: options.Memory = "auto",
    top: Annotated[int, typer.Option(help="How many labels to print.", min=1)] = 5,
    truncate: options.Truncate = False,
    trace: options.Trace = None,
    log_level: options.LogLevel = None,
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

            engine = Engine(path, memory_budget=memory, trace=trace)

            async def classify_item(_: EngineProgress) -> tuple[Sequence[Label], dict[str, Any], dict[str, Any]]:
                async with engine:
                    labels = await engine.classify(item, truncate=truncate)
                    return labels[:top], engine.plan.as_dict(), engine.statistics().as_dict()

            labels, plan, statistics = await with_progress(engine, classify_item)
            if json_output:
                print(
                    json.dumps({"labels": [asdict(label) for label in labels], "plan": plan, "statistics": statistics})
                )
                return
            for label in labels:
                print(f"{label.score:.4f}  {label.label}")

        run(work)
