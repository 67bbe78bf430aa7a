"""`/v1/responses`: OpenAI's newer interface for conversations, without anything that the server would have to keep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from hermes_async import Usage
from hermes_async.errors import HermesError
from hermes_async.server.answers import Answer, collect, open_answers, stream
from hermes_async.server.chat import chat_params, message_readers, prompt_ids_of, tools_for_template
from hermes_async.server.chat_message import MessageReader
from hermes_async.server.errors import ERRORS, error_in_stream
from hermes_async.server.fields import ClientId, new_id
from hermes_async.server.model_server import Conversation, ModelServer, Server, Stack
from hermes_async.server.response_output import ResponseOutput
from hermes_async.server.responses_fields import (
    IncompleteDetails,
    InputTokensDetails,
    OutputItem,
    OutputReasoning,
    OutputTokensDetails,
    ResponseBody,
    ResponseErrorBody,
    ResponseRequest,
    ResponseUsage,
)
from hermes_async.server.streams import Events, event

router = APIRouter(responses=ERRORS)


@router.post(
    "/v1/responses",
    response_model=ResponseBody,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def responses(
    body: ResponseRequest, request: Request, server: Server, stack: Stack, client_id: ClientId = None
) -> Response | ResponseBody:
    """An answer to a text or a conversation, streamed or whole. Nothing is stored."""
    server.check_model(body.model)
    response = _begun(server, body, new_id("resp", client_id))
    tools = tools_for_template(body.chat)
    asked = Conversation([message.for_template() for message in body.chat.messages], tools)
    prompt_ids = await prompt_ids_of(server, asked)
    [reader] = await message_readers(server, body.chat, prompt_ids, tools)
    params = chat_params(server, body.chat, len(prompt_ids), keeps_special_tokens=reader.parses)
    images = asked if body.chat.has_images else None
    answers = await open_answers(server, stack, [prompt_ids], [params], response.id, with_images=images)
    output = ResponseOutput(parallel_calls=body.parallel_tool_calls is not False)
    if body.stream:
        response_stream = _ResponseStream(server, response, output)
        return stream(server, lambda events: response_stream.send_all(events, answers[0], reader), done=b"")
    (completion,) = await collect(server, request, answers)
    for delta in reader.read(completion.text, completion.finish_reason):
        output.add(delta)
    output.end(complete=completion.finish_reason == "stop")
    usage = await _usage(server, completion.usage, output.items)
    return _ended(response, output.items, completion.finish_reason, usage)


# --- the answer around its output ---


def _begun(server: ModelServer, body: ResponseRequest, response_id: str) -> ResponseBody:
    """An answer without output, with the request's fields."""
    defaults = server.default_sampling()
    choice, text_format = body.tool_choice, None if body.text is None else body.text.format
    return ResponseBody(
        id=response_id,
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=server.model_name,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        text={
            "format": {"type": "text"} if text_format is None else text_format.model_dump(by_alias=True),
            "verbosity": "medium",
        },
        tool_choice="auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        user=body.user,
        metadata=body.metadata or {},
    )


def _ended(
    response: ResponseBody, items: Sequence[OutputItem], finish_reason: str, usage: ResponseUsage
) -> ResponseBody:
    ended: dict[str, Any] = {"output": list(items), "usage": usage, "completed_at": int(time.time())}
    if finish_reason == "stop":
        ended |= {"status": "completed"}
    elif finish_reason == "length":
        ended |= {"status": "incomplete", "incomplete_details": IncompleteDetails(reason="max_output_tokens")}
    else:
        ended |= {"status": "failed", "error": ResponseErrorBody(code="server_error", message="the server stops")}
    return response.model_copy(update=ended)


async def _usage(server: ModelServer, usage: Usage, items: Sequence[OutputItem]) -> ResponseUsage:
    """Token counts. Those of the reasoning are counted in its text, which does not have its delimiters."""
    reasoning = "".join(part.text for item in items if isinstance(item, OutputReasoning) for part in item.content)
    num_reasoning = len(await server.engine.tokenize(reasoning, add_special_tokens=False)) if reasoning else 0
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=min(num_reasoning, usage.completion_tokens)),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


# --- streams ---


class _ResponseStream:
    """Sends an answer as OpenAI's events, numbered from 0 without gaps."""

    def __init__(self, server: ModelServer, response: ResponseBody, output: ResponseOutput) -> None:
        self._server = server
        self._response = response
        self._output = output
        # All mutable state: the number of the next event.
        self._next = 0

    async def send_all(self, events: Events, answer: Answer, reader: MessageReader) -> None:
        """Sends the whole answer; the last event says how it ended."""
        for kind in ("response.created", "response.in_progress"):
            await self._send(events, kind, {"response": self._response.model_dump()})
        try:
            ended = await self._send_output(events, answer, reader)
        except HermesError as error:
            detail = error_in_stream(error)["error"]
            failure = ResponseErrorBody(code=detail["code"] or "server_error", message=detail["message"])
            items = self._output.items_so_far()
            ended = self._response.model_copy(update={"status": "failed", "error": failure, "output": items})
        await self._send(events, f"response.{ended.status}", {"response": ended.model_dump()})

    async def _send_output(self, events: Events, answer: Answer, reader: MessageReader) -> ResponseBody:
        """Sends the output items, and returns the whole answer."""
        async for chunk in answer.chunks:
            for delta in reader.read(chunk.text, chunk.finish_reason):
                for kind, fields in self._output.add(delta):
                    await self._send(events, kind, fields)
        self._server.metrics.count_answer(chunk)
        assert chunk.finish_reason is not None and chunk.usage is not None
        for kind, fields in self._output.end(complete=chunk.finish_reason == "stop"):
            await self._send(events, kind, fields)
        items = self._output.items
        return _ended(self._response, items, chunk.finish_reason, await _usage(self._server, chunk.usage, items))

    async def _send(self, events: Events, kind: str, fields: dict[str, Any]) -> None:
        numbered = {"type": kind, "sequence_number": self._next, **fields}
        self._next += 1
        await events.send(event(numbered, kind))
