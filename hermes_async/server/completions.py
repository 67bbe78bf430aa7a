"""`/v1/completions`: text that continues a prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, StringConstraints, model_validator

from hermes_async import Chunk, SampledToken, Usage
from hermes_async.server.answers import Answer, collect, each_at_once, open_answers, stream
from hermes_async.server.errors import ERRORS
from hermes_async.server.fields import (
    MAX_PROMPTS,
    MAX_TOKENS,
    ClientId,
    Model,
    SamplingFields,
    StreamOptions,
    Text,
    TokenIds,
    UsageBody,
    User,
    json_logprob,
    new_id,
    of_choice,
)
from hermes_async.server.model_server import ModelServer, Server, Stack, usage_of
from hermes_async.server.streams import Events, event

router = APIRouter(responses=ERRORS)

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this route."""

PromptText = Annotated[Text, StringConstraints(min_length=1)]


class CompletionRequest(SamplingFields):
    """A request to continue one or more prompts."""

    model: Model | None = None
    prompt: (
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    user: User | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, and where their texts begin in the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(BaseModel):
    """The answers to a request."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def completions(
    body: CompletionRequest, request: Request, server: Server, stack: Stack, client_id: ClientId = None
) -> Response | TextCompletion:
    """Texts that continue the prompts, streamed or whole."""
    server.check_model(body.model)
    prompts = body.prompts()
    server.check_choices(len(prompts), body.n or 1)
    answer_id, created = new_id("cmpl", client_id), int(time.time())
    prompt_ids = [prompt if isinstance(prompt, list) else await server.engine.tokenize(prompt) for prompt in prompts]
    params = body.sampling_params(server.default_sampling(), body.max_tokens or _DEFAULT_MAX_TOKENS, body.logprobs)
    choices = [of_choice(params, choice) for choice in range(body.n or 1)]
    answers = await open_answers(server, stack, prompt_ids, choices, answer_id)
    num_prompt_tokens = sum(map(len, prompt_ids))
    if body.stream:
        completion_stream = _CompletionStream(server, body, answer_id, created)
        return stream(server, lambda events: completion_stream.send_all(events, answers, num_prompt_tokens))
    result = []
    answered = await collect(server, request, answers)
    for index, completion in enumerate(answered):
        logprobs = await _logprobs(server, body, completion.logprobs, 0)
        result.append(
            CompletionChoice(
                index=index, text=completion.text, logprobs=logprobs, finish_reason=completion.finish_reason
            )
        )
    usage = usage_of([completion.usage for completion in answered], num_prompt_tokens)
    return TextCompletion(id=answer_id, created=created, model=server.model_name, choices=result, usage=usage)


class _CompletionStream:
    """Sends one request's answers as OpenAI's chunks."""

    def __init__(self, server: ModelServer, body: CompletionRequest, answer_id: str, created: int) -> None:
        self._server = server
        self._body = body
        self._fields = {
            "id": answer_id,
            "object": "text_completion",
            "created": created,
            "model": server.model_name,
        }
        self._include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        # All mutable state: token counts of the answers that have ended, and the length of each answer's text.
        self._usages: list[Usage] = []
        self._offsets: dict[int, int] = {}

    async def send_all(self, events: Events, answers: Sequence[Answer], num_prompt_tokens: int) -> None:
        """Sends all answers at the same time, then the token counts."""

        async def take(answer: Answer) -> None:
            async for chunk in answer.chunks:
                await self._send(events, answer.index, chunk)

        await each_at_once(answers, take)
        if self._include_usage:
            usage = usage_of(self._usages, num_prompt_tokens).model_dump(exclude={"prompt_tokens_details"})
            await events.send(event({**self._fields, "choices": [], "usage": usage}))

    async def _send(self, events: Events, index: int, chunk: Chunk) -> None:
        offset = self._offsets.get(index, 0)
        logprobs = await _logprobs(self._server, self._body, chunk.logprobs, offset)
        self._offsets[index] = offset + sum(map(len, logprobs.tokens)) if logprobs else 0
        if chunk.finish_reason is not None:
            assert chunk.usage is not None
            self._server.metrics.count_answer(chunk)
            self._usages.append(chunk.usage)
        elif not chunk.text and not logprobs:
            return
        choice = {
            "index": index,
            "text": chunk.text,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": chunk.finish_reason,
        }
        usage = {"usage": None} if self._include_usage else {}
        await events.send(event({**self._fields, "choices": [choice], **usage}))


async def _logprobs(
    server: ModelServer, body: CompletionRequest, sampled: Sequence[SampledToken], offset: int
) -> CompletionLogprobs | None:
    if body.logprobs is None or not sampled:
        return None
    texts = await server.token_texts(sampled)
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in sampled:
        text = texts[token.token_id]
        top = {texts[token_id]: json_logprob(value) for token_id, value in (token.top_logprobs or {}).items()}
        result["tokens"].append(text)
        result["token_logprobs"].append(json_logprob(token.logprob))
        result["top_logprobs"].append(top)
        result["text_offset"].append(offset)
        offset += len(text)
    return CompletionLogprobs(**result)
