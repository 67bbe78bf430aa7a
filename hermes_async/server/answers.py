"""Answers of the engine as they come: several at once for one request, for streams and for whole answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import Request

from hermes_async import Chunk, Completion, SamplingParams
from hermes_async.errors import HermesError
from hermes_async.foreign_errors import ungrouped
from hermes_async.server.errors import error_in_stream
from hermes_async.server.model_server import Conversation, ModelServer
from hermes_async.server.streams import DONE, Events, EventStream, event, unless_left


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that the engine has accepted.

    Attributes:
        index: Its place among the request's choices.
        prompt_ids: The prompt's tokens.
        chunks: Comes from the engine.
    """

    index: int
    prompt_ids: Sequence[int]
    chunks: AsyncIterator[Chunk]


async def open_answers(
    server: ModelServer,
    stack: AsyncExitStack,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    answer_id: str,
    *,
    with_images: Conversation | None = None,
) -> list[Answer]:
    """Begins an answer for each of `params` to each prompt; all end when `stack` is closed.

    Args:
        prompts: Token ids.
        with_images: The conversation whose token ids the only prompt is, if it has images, which token ids do not have.

    Raises:
        RequestError: As `Engine.stream` on entering. The answers that were begun end with `stack`.
    """
    answers: list[Answer] = []
    for prompt_ids in prompts:
        for each in params:
            index = len(answers)
            request_id = answer_id if len(prompts) * len(params) == 1 else f"{answer_id}-{index}"
            chunks = await server.open_answer(stack, with_images or prompt_ids, each, request_id)
            answers.append(Answer(index, prompt_ids, chunks))
    return answers


async def each_at_once(answers: Sequence[Answer], take: Callable[[Answer], Coroutine[Any, Any, None]]) -> None:
    """Takes all answers at the same time.

    Raises:
        HermesError: The first error of an answer; the others are cancelled.
    """
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            for answer in answers:
                tasks.start_soon(take, answer)


async def collect(server: ModelServer, request: Request, answers: Sequence[Answer]) -> list[Completion]:
    """The whole answers, in their order.

    Raises:
        HermesError: One of them ended with an error.
        ClientDisconnect: The client went away.
    """
    completions: dict[int, Completion] = {}

    async def take(answer: Answer) -> None:
        completion = await Completion.collect(answer.chunks)
        server.metrics.count_answer(completion)
        completions[answer.index] = completion

    await unless_left(request, lambda: each_at_once(answers, take))
    return [completions[answer.index] for answer in answers]


def stream(server: ModelServer, produce: Callable[[Events], Awaitable[None]], *, done: bytes = DONE) -> EventStream:
    """An event stream. An error of the engine becomes its last event before `done`."""

    async def produce_or_tell(events: Events) -> None:
        try:
            await produce(events)
        except HermesError as error:
            await events.send(event(error_in_stream(error)))
        if done:
            await events.send(done)

    return EventStream(
        produce_or_tell, keep_alive_s=server.settings.keep_alive_s, send_timeout_s=server.settings.send_timeout_s
    )
