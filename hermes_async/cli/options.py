"""Arguments and options that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hermes_async.cli import logs
from hermes_async.config import MODEL_FIELDS, EngineConfig, SamplingParams, format_sampling
from hermes_async.errors import ConfigError

Model = Annotated[
    str,
    typer.Argument(help="A checkpoint's directory, a GGUF file, or an id on the Hugging Face hub.", show_default=False),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="The budget for weights, buffers, KV caches and workspace: 3GiB, 512MiB, or auto.",
    ),
]
OptionalMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The budget, such as 6MiB; by default, one that is smaller than the weights.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="The most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token; higher values vary more.", show_default="0.0")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the likeliest tokens whose probabilities sum to this.", show_default="1.0"),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from the K likeliest tokens; 0 takes all.", metavar="K", show_default="0")
]
FromModel = Annotated[
    bool,
    typer.Option(
        "--from-model",
        help="Sample as the checkpoint's generation_config.json says, where no option says otherwise.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="The same seed samples the same tokens.", show_default=False),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A small model with the same tokenizer, which drafts tokens.",
        show_default=False,
    ),
]
LoadingAgents = Annotated[
    int | None,
    typer.Option(help="Stages that are read at once; by default, the planner chooses.", show_default=False),
]
MaxResidentLayers = Annotated[
    int | None,
    typer.Option(help="The most layers in memory at once; by default, the budget decides.", show_default=False),
]
ContextLength = Annotated[
    int | None,
    typer.Option(help="The most tokens of prompt and answer; by default, the model's own limit.", show_default=False),
]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        help="transformers computes as transformers does; auto does, too, but for one token in bfloat16; fastest uses "
        "the kernels that `profile` found to be faster, which round differently.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="What the model computes in: float32, bfloat16, float16, or auto, which the checkpoint names.",
    ),
]
LockMemory = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        help="Lock weights and buffers in memory, so that no swap takes them: on, off, or auto, if the system "
        "allows it.",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write a trace of all agents to FILE, for Perfetto and `timeline`.", show_default=False
    ),
]
Truncate = Annotated[bool, typer.Option("--truncate", help="Truncate texts that are longer than the model's context.")]
LogLevel = Annotated[
    logs.Level | None,
    typer.Option(
        envvar="HERMES_ASYNC_LOG_LEVEL",
        case_sensitive=False,
        callback=logs.use_level,
        help="Print log lines from this level on; info has a line for each request.",
    ),
]
"""Takes effect when the command line is read, so commands need not use it."""
Revision = Annotated[
    str | None,
    typer.Option(help="A branch, tag or commit of a model on the hub.", show_default=False),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="The hub's token, instead of the one that is logged in; HF_TOKEN does the same, and fewer can see it.",
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="The folder for downloads; by default, the hub's cache.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, and no text.")]


def checked_text(text: str) -> str:
    """Decodes a text of the command line as UTF-8, for any locale.

    Raises:
        BadParameter: Its bytes are not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # it has bytes that the locale's encoding lacks
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise typer.BadParameter(f"{text!a} is not UTF-8") from None


def sampling_params(from_model: bool, **options: Any) -> SamplingParams:
    """The parameters of a command's requests: greedy by default, or with the checkpoint's own values.

    Args:
        options: Fields of `SamplingParams`; None for an option that was not given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return SamplingParams.from_model(**given) if from_model else SamplingParams(**{"temperature": 0.0, **given})


def print_taken(params: SamplingParams, resolved: SamplingParams) -> None:
    """Says which values come from the checkpoint, if any do."""
    taken = [name for name in MODEL_FIELDS if getattr(params, name) is None]
    if taken:
        print(f"from generation_config.json: {format_sampling(resolved, taken)}", file=sys.stderr, flush=True)


def engine_config(
    loading_agents: int | None,
    max_resident_layers: int | None,
    *,
    kv_budget: int | None = None,
    kernels: str = "auto",
    dtype: str = "auto",
    lock_memory: str = "auto",
    context_length: int | None = None,
    max_waiting: int | None = 1024,
    read_timeout: float | None = None,
) -> EngineConfig:
    """The engine's options, from the command's.

    Raises:
        ConfigError: A value is out of its range; the message names it.
    """
    locks: dict[str, bool | Literal["auto"]] = {"on": True, "off": False, "auto": "auto"}
    if lock_memory not in locks:
        raise ConfigError(f"--lock-memory must be on, off or auto, not {lock_memory!r}")
    return EngineConfig(
        max_waiting=max_waiting,
        num_loading_agents=loading_agents,
        max_resident_layers=max_resident_layers,
        kv_budget=kv_budget,
        kernels=kernels,
        dtype=dtype,
        lock_memory=locks[lock_memory],
        context_length=context_length,
        read_timeout=read_timeout,
    )
