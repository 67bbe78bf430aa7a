"""`hermes-async transcribe`: prints what is said in an audio file, as the text comes."""

from __future__ import annotations

import json
import sys
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hermes_async.cli import options
from hermes_async.cli.answer import statistics_line
from hermes_async.cli.progress import EngineProgress, with_progress
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from hermes_async import EngineStatistics, TranscriptSegment


def transcribe(
    model: options.Model,
    file: Annotated[str, typer.Argument(help="An audio file.", show_default=False)],
    memory: options.Memory = "auto",
    language: Annotated[
        str | None, typer.Option(help="Such as german, or de; by default, the model finds out.", show_default=False)
    ] = None,
    task: Annotated[
        Literal["transcribe", "translate"], typer.Option(help="Write down what is said, or translate it into English.")
    ] = "transcribe",
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Print the times of each segment, one segment a line.")
    ] = False,
    trace: options.Trace = None,
    log_level: options.LogLevel = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    json_output: options.Json = False,
) -> None:
    """Write down what is said in an audio file, with a model such as Whisper."""
    with errors_in_one_line():
        file = options.checked_text(file)
        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))

        async def work(interrupts: Interrupts) -> None:
            from hermes_async import Engine

            engine = Engine(path, memory_budget=memory, trace=trace)
            segments: list[TranscriptSegment] = []

            async def take(progress: EngineProgress) -> tuple[dict[str, Any], EngineStatistics]:
                async with engine:
                    chunks = engine.transcribe_stream(file, language=language, task=task, timestamps=timestamps)
                    async with aclosing(chunks):
                        async for segment in chunks:
                            segments.append(segment)
                            if not json_output:
                                progress.hide()
                                print(_shown(segment) if timestamps else segment.text, end="", flush=True)
                    return engine.plan.as_dict(), engine.statistics()

            plan, statistics = await with_progress(engine, take)
            if json_output:
                record = {
                    "text": "".join(segment.text for segment in segments),
                    "segments": [asdict(segment) for segment in segments],
                    "plan": plan,
                    "statistics": statistics.as_dict(),
                }
                print(json.dumps(record), flush=True)
                return
            if not timestamps:
                print(flush=True)
            print(statistics_line(statistics), file=sys.stderr)

        run(work)


def _shown(segment: TranscriptSegment) -> str:
    return f"[{segment.start_s or 0.0:8.2f} - {segment.end_s or 0.0:8.2f}] {segment.text.strip()}\n"
