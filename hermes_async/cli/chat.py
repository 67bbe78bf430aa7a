"""`hermes-async chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from hermes_async.cli import options
from hermes_async.cli.answer import Answer, stream_answer
from hermes_async.cli.lines import LineReader
from hermes_async.cli.progress import EngineProgress, with_progress
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, print_error, run
from hermes_async.config import SamplingParams
from hermes_async.errors import ContextLengthError, MemoryBudgetError
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from hermes_async import Engine, Session

_HELP = (
    "/reset forgets the conversation, /exit ends it. Ctrl-C stops an answer; at the prompt, it ends the conversation"
)


def chat(
    model: options.Model,
    memory: options.Memory = "auto",
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    from_model: options.FromModel = False,
    draft_model: options.DraftModel = None,
    loading_agents: options.LoadingAgents = None,
    max_resident_layers: options.MaxResidentLayers = None,
    kernels: options.Kernels = "auto",
    dtype: options.Dtype = "auto",
    lock_memory: options.LockMemory = "auto",
    context_length: options.ContextLength = None,
    trace: options.Trace = None,
    log_level: options.LogLevel = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /reset forgets the conversation, /exit ends it."""
    with errors_in_one_line():
        params = options.sampling_params(
            from_model, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        config = options.engine_config(
            loading_agents,
            max_resident_layers,
            kernels=kernels,
            dtype=dtype,
            lock_memory=lock_memory,
            context_length=context_length,
        )
        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))
        draft = None if draft_model is None else find_checkpoint(draft_model, HubOptions(None, token, cache_dir))

        async def work(interrupts: Interrupts) -> None:
            from hermes_async import Engine

            engine = Engine(path, memory_budget=memory, config=config, draft_model=draft, trace=trace)
            await with_progress(engine, lambda progress: _converse(engine, params, interrupts, progress))

        run(work)


async def _converse(engine: Engine, params: SamplingParams, interrupts: Interrupts, progress: EngineProgress) -> None:
    from rich.console import Console

    at_terminal = sys.stdin.isatty()
    console = Console(highlight=False)
    lines = LineReader(sys.stdin.fileno())
    answered, failed = False, False
    async with engine, engine.session() as chat:
        progress.hide()
        options.print_taken(params, engine.resolve_sampling_params(params))
        if at_terminal:
            console.print(_HELP, style="dim")
        while True:
            if at_terminal:
                console.print("[bold]>[/] ", end="")
            line: str | None = None
            with interrupts.scope():
                line = await lines.read()
            if line is None and at_terminal:
                console.print()
            if line is None or line.strip() == "/exit":
                break
            if line.strip() == "/reset":
                chat.edit(messages=[])
            elif line.strip():
                turn = _take_turn(chat, line, params, interrupts, progress=progress, at_terminal=at_terminal)
                done = await turn
                answered, failed = answered or done, failed or not done
    if failed and not answered:
        raise typer.Exit(1)


async def _take_turn(
    chat: Session,
    line: str,
    params: SamplingParams,
    interrupts: Interrupts,
    *,
    progress: EngineProgress,
    at_terminal: bool,
) -> bool:
    """Sends a line and prints the answer. Both become part of the conversation, even if the answer was stopped.

    Returns:
        Whether there was an answer.
    """
    message = {"role": "user", "content": line}

    def write(text: str) -> None:
        progress.hide()
        print(text, end="", flush=True)

    progress.show()
    try:
        answer: Answer = await stream_answer(chat, [message], params, interrupts, write)
        progress.hide()
    except (ContextLengthError, MemoryBudgetError) as error:
        progress.hide()
        print_error(error)
        if chat.messages or chat.token_ids:
            print("/reset forgets the conversation and frees its memory", file=sys.stderr)
        elif isinstance(error, ContextLengthError):
            print("The conversation is empty: only a shorter message fits", file=sys.stderr)
        else:
            print(
                "The conversation is empty: give a shorter message, a smaller --max-tokens or a larger --memory",
                file=sys.stderr,
            )
        return False
    print(flush=True)
    if at_terminal:
        print(answer, file=sys.stderr)
    return True
