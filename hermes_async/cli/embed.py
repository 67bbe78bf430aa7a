"""`hermes-async embed`: prints the sentence vectors of texts."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hermes_async.cli import options
from hermes_async.cli.progress import EngineProgress, with_progress
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.config import Pooling
from hermes_async.storage.hub import HubOptions


def embed(
    model: options.Model,
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    memory: options.Memory = "auto",
    pooling: Annotated[
        Pooling | None,
        typer.Option(help="How to make one vector of the tokens; by default, the checkpoint's way."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize", help="Scale vectors to length 1; by default, the checkpoint's setting."
        ),
    ] = None,
    truncate: Annotated[
        bool | None,
        typer.Option(
            "--truncate/--no-truncate",
            help="Truncate long texts, or refuse them; by default, as sentence-transformers does.",
        ),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(help="One of the checkpoint's prompts, put before each text.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A text put before each text.", show_default=False)] = None,
    truncate_dim: Annotated[
        int | None, typer.Option(help="Keep only the first N numbers of each vector.", metavar="N", show_default=False)
    ] = None,
    trace: options.Trace = None,
    log_level: options.LogLevel = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    json_output: options.Json = False,
) -> None:
    """Embed texts: print each text's vector. With --json, also print the plan and statistics."""
    with errors_in_one_line():
        texts = [options.checked_text(text) for text in texts]
        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))

        async def work(interrupts: Interrupts) -> None:
            from hermes_async import Engine

            engine = Engine(path, memory_budget=memory, trace=trace)

            async def embed_all(_: EngineProgress) -> tuple[Any, dict[str, Any], dict[str, Any]]:
                async with engine:
                    vectors = await engine.embed(
                        texts,
                        pooling=pooling,
                        normalize=normalize,
                        truncate=truncate,
                        prompt_name=prompt_name,
                        prompt=prompt,
                        truncate_dim=truncate_dim,
                    )
                    return vectors, engine.plan.as_dict(), engine.statistics().as_dict()

            vectors, plan, statistics = await with_progress(engine, embed_all)
            if json_output:
                print(json.dumps({"vectors": vectors.tolist(), "plan": plan, "statistics": statistics}))
                return
            for vector in vectors:
                print(" ".join(f"{number:.6g}" for number in vector))

        run(work)
