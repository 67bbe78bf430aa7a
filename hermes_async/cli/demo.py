"""`hermes-async demo`: runs the model that ships with the package in less memory than its weights take."""

from __future__ import annotations

import json
import sys
from contextlib import aclosing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from hermes_async.cli import INTERRUPTED, options
from hermes_async.cli.run import Interrupts, errors_in_one_line, run
from hermes_async.cli.tables import print_table
from hermes_async.config import EngineConfig, SamplingParams, format_bytes, format_count
from hermes_async.demo import MODEL_PATH
from hermes_async.errors import HermesError

if TYPE_CHECKING:
    from hermes_async import Engine
    from hermes_async.demo.show import Story

_PROMPTS = (
    "First Citizen:\n",
    "KING RICHARD III:\n",
    "JULIET:\n",
    "MENENIUS:\n",
    "ROMEO:\nO, ",
    "QUEEN MARGARET:\n",
    "PROSPERO:\nNow ",
    "All:\n",
)
_TEMPERATURE = 0.8


def demo(
    memory: options.OptionalMemory = None,
    sessions: Annotated[int, typer.Option(min=1, max=256, help="The number of texts to write at the same time.")] = 4,
    max_tokens: options.MaxTokens = 120,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same texts.")] = 0,
    loading_agents: options.LoadingAgents = None,
    max_resident_layers: options.MaxResidentLayers = None,
    trace: options.Trace = None,
    log_level: options.LogLevel = None,
    json_output: options.Json = False,
    model: Annotated[Path, typer.Option(hidden=True)] = MODEL_PATH,
) -> None:
    """Run the model that ships with the package in less memory than its weights take. Nothing is downloaded."""
    with errors_in_one_line():
        from hermes_async import Engine
        from hermes_async.demo.show import Story

        stories = [Story(_PROMPTS[idx % len(_PROMPTS)]) for idx in range(sessions)]
        params = [
            SamplingParams(max_tokens=max_tokens, temperature=_TEMPERATURE, seed=seed + idx) for idx in range(sessions)
        ]
        if memory is None:
            budget, kv_budget = _choose_budget(model, stories, max_tokens)
            config = options.engine_config(loading_agents, max_resident_layers, kv_budget=kv_budget)
            engine = Engine(model, memory_budget=budget, config=config, trace=trace)
        else:
            config = options.engine_config(loading_agents, max_resident_layers)
            engine = Engine(model, memory_budget=memory, config=config, trace=trace)

        async def work(interrupts: Interrupts) -> None:
            await _run_stories(engine, stories, params, interrupts, json_output=json_output)

        run(work)


def _choose_budget(model: Path, stories: list[Story], max_tokens: int) -> tuple[int, int]:
    """The budget, four fifths of the weights if that works, and its part for KV caches.

    Some layers then stay in memory, and the others stream through the ring. KV caches get at most a quarter of the
    weights' bytes. Sessions that do not fit wait until another one has ended.
    """
    from hermes_async.engine.opening import open_model
    from hermes_async.engine.prompt import encode

    opened = open_model(model, "1TiB", EngineConfig())
    try:
        num_tokens = max(len(encode(opened, story.prompt).token_ids) for story in stories) + max_tokens
        session_bytes = opened.probe.cache.nbytes(min(num_tokens, opened.skeleton.context_length or num_tokens))
    finally:
        opened.close()
    weight_bytes = opened.plan.weight_bytes
    kv_budget = max(session_bytes, min(len(stories) * session_bytes, weight_bytes // 4))
    return max(weight_bytes * 4 // 5, opened.plan.minimum_budget + kv_budget), kv_budget


async def _run_stories(
    engine: Engine,
    stories: list[Story],
    params: list[SamplingParams],
    interrupts: Interrupts,
    *,
    json_output: bool,
) -> None:
    from rich.console import Console
    from rich.live import Live

    from hermes_async.demo.show import SideBySide, print_stories, statistics_table

    console = Console(force_terminal=sys.stdout.isatty(), quiet=json_output)
    live = console.is_interactive and not json_output
    async with engine:
        plan = engine.plan
        console.print(
            f"{format_count(len(stories), 'session')} over {format_bytes(plan.weight_bytes)} of weights "
            f"in {format_bytes(plan.memory_budget)} of memory\n",
            highlight=False,
        )
        console.print(f"{plan}\n", markup=False, highlight=False, soft_wrap=True)
        with (
            Live(SideBySide(stories), console=console, refresh_per_second=12) if live else nullcontext(),
            interrupts.scope() as writing,
        ):
            await _write_all(engine, stories, params)
        statistics = engine.statistics()
    for story in stories:
        story.finish_reason = story.finish_reason or "abort"
    if json_output:
        record = {
            "sessions": [asdict(story) for story in stories],
            "plan": plan.as_dict(),
            "statistics": statistics.as_dict(),
        }
        print(json.dumps(record), flush=True)
    else:
        if not live:
            print_stories(console, stories)
        print_table(statistics_table(statistics, plan.weight_bytes), console)
    if writing.cancel_called:
        raise typer.Exit(INTERRUPTED)


async def _write_all(engine: Engine, stories: list[Story], params: list[SamplingParams]) -> None:
    errors: list[HermesError] = []

    async def write(story: Story, story_params: SamplingParams) -> None:
        try:
            async with aclosing(engine.generate(story.prompt, story_params)) as chunks:
                async for chunk in chunks:
                    story.add(chunk)
        except HermesError as error:
            errors.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for story, story_params in zip(stories, params, strict=True):
            tasks.start_soon(write, story, story_params)
    if errors:
        raise errors[0]
