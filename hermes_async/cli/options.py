"""Arguments and options that several commands have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hermes_async.config import EngineConfig

Model = Annotated[
    str,
    typer.Argument(help="A checkpoint's directory, or an id on the Hugging Face hub.", show_default=False),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Budget for weights, buffers, KV caches and workspace together: 3GiB, 512MiB, or auto.",
    ),
]
OptionalMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Budget, such as 6MiB; without it, one that is smaller than the weights.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; more is more varied.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")]
Seed = Annotated[
    int | None,
    typer.Option(help="The same seed samples the same tokens again.", show_default=False),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A small model with the same tokenizer, to draft tokens.",
        show_default=False,
    ),
]
LoadingAgents = Annotated[
    int | None,
    typer.Option(help="Stages that are read at once; chosen if not given.", show_default=False),
]
MaxResidentLayers = Annotated[
    int | None,
    typer.Option(help="Most layers in memory at once; the budget decides if not given.", show_default=False),
]
ContextLength = Annotated[
    int | None,
    typer.Option(help="Most tokens of a prompt and its answer; the model's own if not given.", show_default=False),
]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        help="default computes as transformers does; fastest takes what `profile` found to be faster, and rounds "
        "otherwise.",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write what the agents do to FILE, for Perfetto and `timeline`.", show_default=False
    ),
]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are longer than the model's context.")]
Revision = Annotated[
    str | None,
    typer.Option(help="A branch, tag or commit of a model on the hub.", show_default=False),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="For the hub, instead of the one that is logged in; HF_TOKEN does the same and is seen by fewer.",
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where what comes from the hub is kept; the hub's cache if not given.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the last line, and no text.")]


def checked_text(text: str) -> str:
    """A text of the command line, which is UTF-8 whatever the locale says.

    Raises:
        BadParameter: Its bytes are not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # it has bytes that the locale's encoding does not have
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise typer.BadParameter(f"{text!a} is not UTF-8") from None


def engine_config(
    loading_agents: int | None,
    max_resident_layers: int | None,
    *,
    kv_budget: int | None = None,
    kernels: str = "default",
    context_length: int | None = None,
) -> EngineConfig:
    """The engine's options, from those of the command."""
    return EngineConfig(
        num_loading_agents=loading_agents,
        max_resident_layers=max_resident_layers,
        kv_budget=kv_budget,
        kernels=kernels,
        context_length=context_length,
    )
