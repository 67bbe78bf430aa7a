"""`/v1/chat/completions`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from hermes_async import Chunk, SampledToken, SamplingParams, StructuredOutputs, Usage
from hermes_async.server.answers import Answer, collect, each_at_once, open_answers, stream
from hermes_async.server.chat_fields import (
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    NamedTool,
    TokenLogprob,
    TopLogprob,
)
from hermes_async.server.chat_message import ForcedCall, MessageReader
from hermes_async.server.errors import ERRORS
from hermes_async.server.fields import ClientId, json_logprob, new_id, of_choice
from hermes_async.server.model_server import Conversation, ModelServer, Server, Stack, usage_of
from hermes_async.server.streams import Events, event

router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def chat_completions(
    body: ChatRequest, request: Request, server: Server, stack: Stack, client_id: ClientId = None
) -> Response | ChatCompletion:
    """The next message of a conversation, streamed or whole."""
    server.check_model(body.model)
    server.check_choices(1, body.n or 1)
    answer_id, created = new_id("chatcmpl", client_id), int(time.time())
    tools = tools_for_template(body)
    asked = Conversation([message.for_template() for message in body.messages], tools, body.chat_template_kwargs)
    prompt_ids = await prompt_ids_of(server, asked)
    readers = await message_readers(server, body, prompt_ids, tools)
    params = chat_params(server, body, len(prompt_ids), keeps_special_tokens=readers[0].parses)
    choices = [of_choice(params, index) for index in range(body.n or 1)]
    images = asked if body.has_images else None
    answers = await open_answers(server, stack, [prompt_ids], choices, answer_id, with_images=images)
    if body.stream:
        chat_stream = _ChatStream(server, body, answer_id, created)
        return stream(server, lambda events: chat_stream.send_all(events, answers, readers))
    completions = await collect(server, request, answers)
    result = []
    for index, (completion, reader) in enumerate(zip(completions, readers, strict=True)):
        message, reason = reader.read_all(completion.text, completion.finish_reason)
        logprobs = await _logprobs(server, body, completion.logprobs) if body.logprobs else None
        result.append(ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason))
    usage = usage_of([completion.usage for completion in completions], len(prompt_ids))
    return ChatCompletion(id=answer_id, created=created, model=server.model_name, choices=result, usage=usage)


# --- what the engine is asked for ---


async def prompt_ids_of(server: ModelServer, asked: Conversation) -> list[int]:
    """The token ids of a conversation; an image is as many of them as it becomes in the model."""
    return await server.engine.tokenize(
        asked.messages, tools=asked.tools, chat_template_kwargs=asked.chat_template_kwargs
    )


def tools_for_template(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the chat template shows to the model."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def _forced_call(body: ChatRequest) -> ForcedCall | None:
    """The call that `tool_choice` asks for, with the JSON schema of its text."""
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        schema = next(tool.function.parameters for tool in body.tools or () if tool.function.name == name)
        return ForcedCall(name, schema or {"type": "object"})
    if body.tool_choice == "required":
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": tool.function.parameters or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in body.tools or ()
        ]
        return ForcedCall(None, {"anyOf": calls})
    return None


async def message_readers(
    server: ModelServer, body: ChatRequest, prompt_ids: Sequence[int], tools: list[dict[str, Any]] | None
) -> list[MessageReader]:
    """What reads each of the answers to the prompt."""
    forced = _forced_call(body)
    structured = forced is not None or body.response_structure() is not None
    parser = None if structured else await server.engine.response_stream(prompt_ids, tools)
    parallel_calls = body.parallel_tool_calls is not False
    return [MessageReader(copy.deepcopy(parser), forced, parallel_calls=parallel_calls) for _ in range(body.n or 1)]


def chat_params(
    server: ModelServer, body: ChatRequest, num_prompt_tokens: int, *, keeps_special_tokens: bool
) -> SamplingParams:
    """The engine's parameters for each answer."""
    max_tokens = body.max_completion_tokens or body.max_tokens or server.default_max_tokens(num_prompt_tokens)
    forced = _forced_call(body)
    changes: dict[str, Any] = {"structured_outputs": body.response_structure()}
    if keeps_special_tokens:  # the parser needs them
        changes["skip_special_tokens"] = False
    params = body.model_copy(update=changes).sampling_params(server.default_sampling(), max_tokens, body.num_logprobs)
    return params if forced is None else replace(params, structured_outputs=StructuredOutputs(json=forced.schema))


# --- streams ---


class _ChatStream:
    """Sends one request's answers as OpenAI's chunks."""

    def __init__(self, server: ModelServer, body: ChatRequest, answer_id: str, created: int) -> None:
        self._server = server
        self._body = body
        self._fields = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": server.model_name,
        }
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        # All mutable state: token counts of the answers that have ended.
        self._usages: list[Usage] = []

    async def send_all(self, events: Events, answers: Sequence[Answer], readers: Sequence[MessageReader]) -> None:
        """Sends all answers at the same time, then the token counts."""
        for answer in answers:
            await events.send(self._event(answer.index, {"role": "assistant", "content": ""}))

        async def take(answer: Answer) -> None:
            async for chunk in answer.chunks:
                await self._send(events, answer.index, readers[answer.index], chunk)

        await each_at_once(answers, take)
        if self._include_usage:
            usage = usage_of(self._usages, len(answers[0].prompt_ids))
            await events.send(event({**self._fields, "choices": [], "usage": usage.model_dump()}))

    async def _send(self, events: Events, index: int, reader: MessageReader, chunk: Chunk) -> None:
        deltas = reader.read(chunk.text, chunk.finish_reason)
        logprobs = None
        if chunk.logprobs and self._body.logprobs:
            logprobs = (await _logprobs(self._server, self._body, chunk.logprobs)).model_dump()
            deltas = deltas or [{"content": ""}]
        for delta in deltas:
            await events.send(self._event(index, delta, logprobs))
            logprobs = None
        if chunk.finish_reason is not None:
            assert chunk.usage is not None
            self._server.metrics.count_answer(chunk)
            self._usages.append(chunk.usage)
            await events.send(self._event(index, {}, reason=reader.finish_reason(chunk.finish_reason)))

    def _event(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._fields, "choices": [choice], **usage})


# --- log-probabilities ---


async def _logprobs(server: ModelServer, body: ChatRequest, sampled: Sequence[SampledToken]) -> ChoiceLogprobs:
    texts = await server.token_texts(sampled)
    most = body.top_logprobs or 0
    return ChoiceLogprobs(content=[_token_logprob(token, texts.__getitem__, most) for token in sampled])


def _token_logprob(token: SampledToken, text_of: Callable[[int], str], most: int) -> TokenLogprob:
    def top(token_id: int, logprob: float | None) -> TopLogprob:
        text = text_of(token_id)
        return TopLogprob(token=text, logprob=json_logprob(logprob), bytes=list(text.encode()))

    own = top(token.token_id, token.logprob)
    likeliest = [top(token_id, logprob) for token_id, logprob in [*(token.top_logprobs or {}).items()][:most]]
    return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=likeliest)
