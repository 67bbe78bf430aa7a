"""`hermes-async generate`: continues one prompt, and prints the text as it arrives."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hermes_async.cli import INTERRUPTED, options
from hermes_async.cli.answer import Answer, statistics_line, stream_answer
from hermes_async.cli.progress import EngineProgress, with_progress
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.config import MODEL_FIELDS, SamplingParams
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from hermes_async import Completion, Engine, EngineStatistics
    from hermes_async.engine.prompt import Prompt

_REQUEST_ID = "generate"


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    memory: options.Memory = "auto",
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    from_model: options.FromModel = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop before this text; may be given more than once.", show_default=False),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after end-of-sequence tokens.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send PROMPT as a chat message, with the checkpoint's chat template.")
    ] = False,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="PROMPT is a list of token ids, separated by commas or spaces.")
    ] = False,
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
    json_output: options.Json = False,
) -> None:
    """Generate text from a prompt. Ctrl-C stops, and keeps the text so far."""
    if chat and token_ids:
        raise typer.BadParameter("--chat and --token-ids exclude each other")
    with errors_in_one_line():
        parsed_prompt = _read_prompt(prompt, chat=chat, token_ids=token_ids)
        params = options.sampling_params(
            from_model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(options.checked_text(text) for text in stop or ()),
            ignore_eos=ignore_eos,
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

            command = _to_json if json_output else _to_terminal
            engine = Engine(path, memory_budget=memory, config=config, draft_model=draft, trace=trace)
            await command(engine, parsed_prompt, params, interrupts)

        run(work)


def _read_prompt(prompt: str, *, chat: bool, token_ids: bool) -> Prompt:
    if prompt == "-":
        try:
            prompt = typer.get_binary_stream("stdin").read().decode()
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"standard input is not UTF-8: {error}", param_hint="PROMPT") from None
    prompt = options.checked_text(prompt)
    if chat:
        return [{"role": "user", "content": prompt}]
    if not token_ids:
        return prompt
    try:
        return [int(token_id) for token_id in re.split(r"[,\s]+", prompt.strip(", \t\r\n")) if token_id]
    except ValueError as error:
        raise typer.BadParameter(f"not a token id: {error}", param_hint="PROMPT") from None


async def _to_terminal(
    engine: Engine,
    prompt: Prompt,
    params: SamplingParams,
    interrupts: Interrupts,
) -> None:
    async def work(progress: EngineProgress) -> tuple[Answer, EngineStatistics]:
        def write(text: str) -> None:
            progress.hide()
            print(text, end="", flush=True)

        async with engine:
            options.print_taken(params, engine.resolve_sampling_params(params))
            answer = await stream_answer(engine, prompt, params, interrupts, write)
            return answer, engine.statistics()

    answer, statistics = await with_progress(engine, work)
    # Without a tokenizer there is no text; then the token ids are the answer.
    print("" if answer.text else " ".join(map(str, answer.token_ids)), flush=True)
    print(f"{answer}; {statistics_line(statistics)}", file=sys.stderr)
    if answer.finish_reason == "abort":
        raise typer.Exit(INTERRUPTED)


async def _to_json(
    engine: Engine,
    prompt: Prompt,
    params: SamplingParams,
    interrupts: Interrupts,
) -> None:
    async def work(_: EngineProgress) -> tuple[Completion, SamplingParams, dict[str, Any], dict[str, Any]]:
        async with engine:
            completion = await _complete(engine, prompt, params, interrupts)
            resolved = engine.resolve_sampling_params(params)
            return completion, resolved, engine.plan.as_dict(), engine.statistics().as_dict()

    completion, resolved, plan, statistics = await with_progress(engine, work)
    record: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": asdict(completion.usage),
        "timings": asdict(completion.timings),
        "sampling": {name: getattr(resolved, name) for name in MODEL_FIELDS},
        "plan": plan,
        "statistics": statistics,
    }
    print(json.dumps(record), flush=True)
    if completion.finish_reason == "abort":
        raise typer.Exit(INTERRUPTED)


async def _complete(engine: Engine, prompt: Prompt, params: SamplingParams, interrupts: Interrupts) -> Completion:
    """Ctrl-C aborts the request, which then completes with the text so far."""
    from hermes_async import Completion, Timings, Usage

    completion = Completion(
        request_id=_REQUEST_ID,
        text="",
        token_ids=(),
        finish_reason="abort",
        usage=Usage(0, 0),
        timings=Timings(0.0, 0.0, 0.0, 0.0),
    )
    with interrupts.scope() as scope:

        async def stop() -> None:
            if not await engine.abort(_REQUEST_ID):  # it is still being tokenized
                scope.cancel()

        with interrupts.calling(stop):
            completion = await engine.complete(prompt, params, request_id=_REQUEST_ID)
    return completion
