"""`/v1/responses`: answers and events as OpenAI's, read by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hermes_async import Chunk, MessageDelta, ReadError, Timings, ToolCall, Usage
from hermes_async.server.chat_message import ForcedCall, MessageReader
from hermes_async.server.response_output import ResponseOutput
from hermes_async.server.responses_fields import ResponseRequest
from tests.server.running import MODEL, RunningServer

TEXT = "Speak, good friends, and say what you have to tell."
MESSAGES = [{"role": "user", "content": TEXT}]
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Corioli"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(num_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": TEXT, "max_output_tokens": num_tokens, "temperature": 0, **fields}


# --- whole answers ---


def test_an_answer_is_the_engines_own(server: RunningServer, client: openai.OpenAI) -> None:
    own = server.complete(MESSAGES, max_tokens=12, temperature=0)
    answer = client.responses.create(**asked(metadata={"a": "b"}, user="somebody"))
    assert answer.output_text == own.text
    assert (answer.status, answer.object, answer.model, answer.error) == ("incomplete", "response", MODEL, None)
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (own.usage.prompt_tokens, 12)
    assert answer.usage.total_tokens == own.usage.prompt_tokens + 12
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert (answer.metadata, answer.user, answer.temperature, answer.top_p) == ({"a": "b"}, "somebody", 0, 1)
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_the_async_client(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.responses.create(**asked())
        pieces = [
            event.delta
            async for event in await client.responses.create(stream=True, **asked())
            if event.type == "response.output_text.delta"
        ]
        async with client.responses.stream(**asked()) as stream:
            kinds = [event.type async for event in stream]
    assert "".join(pieces) == whole.output_text
    assert kinds[-1] == "response.incomplete"


def test_a_conversation_goes_through_the_chat_template(server: RunningServer, client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": "We have nothing."},
        {"role": "user", "content": "Then go."},
    ]
    own = server.complete(messages, max_tokens=12, temperature=0)
    first = client.responses.create(**asked())
    answer = client.responses.create(
        **asked(
            instructions="Be brief.",
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": TEXT}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "We have nothing.", "annotations": []}],
                },
                {"type": "message", "role": "user", "content": "Then go."},
            ],
        )
    )
    assert answer.output_text == own.text
    again: Any = [*MESSAGES, *first.output, {"role": "user", "content": "Then go."}]
    assert client.responses.create(**asked(input=again)).status == "incomplete"


def test_items_become_messages() -> None:
    request = ResponseRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "r"}],
                },
                {"type": "message", "role": "assistant", "content": "c"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "x"},
                {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
                {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
                {"type": "message", "role": "assistant", "content": "d"},
                {"type": "message", "role": "assistant", "content": "e"},
            ],
        }
    )

    def call(call_id: str, name: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert [message.for_template() for message in request.chat.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "reasoning_content": "r",
            "content": "c",
            "tool_calls": [call("1", "f"), call("2", "g")],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": "", "reasoning_content": "s", "tool_calls": [call("3", "f")]},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    for stream in (False, True):
        fields = asked(300, tools=[TOOL], tool_choice=choice)
        if stream:
            with client.responses.stream(**fields) as streamed:
                answer: Any = streamed.get_final_response()
        else:
            answer = client.responses.create(**fields)
        (call,) = answer.output
        assert (call.type, call.name, call.status, answer.status) == (
            "function_call", "weather", "completed", "completed",
        )  # fmt: skip
        assert json.loads(call.arguments)["city"] in ("Rome", "Corioli")
        assert answer.tools[0].name == "weather" and answer.tool_choice.name == "weather"
        again: Any = [*MESSAGES, call, {"role": "user", "content": "And then?"}]
        assert client.responses.create(**asked(input=again, tools=[TOOL])).status == "incomplete"


def test_text_that_follows_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "place", "schema": TOOL["parameters"], "strict": True}}
    answer = client.responses.create(**asked(300, text=form))
    assert json.loads(answer.output_text)["city"] in ("Rome", "Corioli")
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"
    assert answer.text.format.schema_ == TOOL["parameters"]


# --- events ---


def test_events_are_numbered_and_whole(client: openai.OpenAI) -> None:
    whole = client.responses.create(**asked())
    events = list(client.responses.create(stream=True, **asked()))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == whole.output_text == last.response.output_text
    first: Any = events[0]
    assert (first.response.status, first.response.output, first.response.id) == ("in_progress", [], last.response.id)
    assert last.response.usage.output_tokens == 12


def test_the_bytes_of_a_stream(server: RunningServer) -> None:
    with httpx.stream("POST", f"{server.url}/v1/responses", json=asked(3, stream=True)) as answer:
        text = answer.read().decode()
    assert "[DONE]" not in text
    events = [part.split("\n") for part in text.removesuffix("\n\n").split("\n\n") if not part.startswith(":")]
    for name, data in events:
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert events[-1][0] == "event: response.incomplete"


class Parser:
    """Finds what it is told, as a checkpoint's parser would."""

    def __init__(self, deltas: list[Any]) -> None:
        self._deltas = deltas

    def push(self, text: str) -> list[Any]:
        return []

    def finish(self) -> list[Any]:
        return self._deltas


FOUND = [
    MessageDelta(reasoning="Let me "),
    MessageDelta(reasoning="think."),
    MessageDelta(content="I ask."),
    MessageDelta(tool_call=ToolCall(0, "f", '{"a": 1}')),
    MessageDelta(tool_call=ToolCall(1, "g", "{}")),
]


def answers_with(
    server: RunningServer, chunks: Callable[[], AsyncIterator[Chunk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From now on, the engine's answers are `chunks`."""

    @asynccontextmanager
    async def stream(*args: Any, **options: Any) -> AsyncIterator[AsyncIterator[Chunk]]:
        yield chunks()

    monkeypatch.setattr(server.engine, "stream", stream)


def test_the_client_reads_reasoning_text_and_calls(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk("", (5,))
        yield Chunk("", (6,), "stop", usage=Usage(7, 99, 2), timings=Timings(0.0, 0.1, 0.2, 5.0))

    async def response_stream(*args: Any, **options: Any) -> Any:
        return Parser(FOUND)

    answers_with(server, chunks, monkeypatch)
    monkeypatch.setattr(server.engine, "response_stream", response_stream)
    whole: Any = client.responses.create(**asked(tools=[TOOL]))
    with client.responses.stream(**asked(tools=[TOOL])) as stream:
        kinds = [event.type for event in stream]
        streamed: Any = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    for answer in (whole, streamed):
        reasoning, message, first, second = answer.output
        assert reasoning.content[0].text == "Let me think."
        assert (message.content[0].text, answer.output_text) == ("I ask.", "I ask.")
        assert [(call.name, json.loads(call.arguments)) for call in (first, second)] == [("f", {"a": 1}), ("g", {})]
        assert first.call_id != second.call_id
        assert answer.usage.input_tokens_details.cached_tokens == 2
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens < 99
    again: Any = [*MESSAGES, *streamed.output, *MESSAGES]
    assert client.responses.create(**asked(input=again)).status == "completed"


def test_answers_to_one_prompt_are_read_apart_and_prepared_once(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_prepared = 0

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk("", (5,), "stop", usage=Usage(7, 1, 0), timings=Timings(0.0, 0.1, 0.2, 5.0))

    class Once(Parser):
        def finish(self) -> list[Any]:
            deltas, self._deltas = self._deltas, []
            return deltas

    async def response_stream(*args: Any, **options: Any) -> Any:
        nonlocal num_prepared
        num_prepared += 1
        return Once(FOUND)

    answers_with(server, chunks, monkeypatch)
    monkeypatch.setattr(server.engine, "response_stream", response_stream)
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, n=3)
    assert [choice.message.content for choice in answer.choices] == ["I ask."] * 3
    assert num_prepared == 1


@pytest.mark.parametrize("parallel_calls", [True, False])
def test_reasoning_text_and_calls_are_items_of_their_own(parallel_calls: bool) -> None:
    reader = MessageReader(Parser(FOUND), None)  # type: ignore[arg-type]
    output = ResponseOutput(parallel_calls=parallel_calls)
    events = [event for delta in reader.read("", "stop") for event in output.add(delta)]
    events += output.end(complete=True)
    kinds = [kind.removeprefix("response.") for kind, _ in events]
    call = [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert kinds == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        *call * (2 if parallel_calls else 1),
    ]  # fmt: skip
    assert [item.type for item in output.items] == ["reasoning", "message", "function_call", "function_call"][
        : 4 if parallel_calls else 3
    ]
    for kind, fields in events:
        if kind == "response.output_item.done":
            assert fields["item"] == output.items[fields["output_index"]].model_dump()
            assert fields["item"]["status"] == "completed"
    assert output.items[0].model_dump()["content"] == [{"type": "reasoning_text", "text": "Let me think."}]


def test_arguments_that_come_in_pieces() -> None:
    reader, output = MessageReader(None, ForcedCall("f", {})), ResponseOutput(parallel_calls=True)
    for text, reason in (('{"a"', None), (": 1}", None), ("", "stop")):
        for delta in reader.read(text, reason):
            output.add(delta)
    output.end(complete=True)
    (call,) = output.items
    assert (call.type, call.arguments) == ("function_call", '{"a": 1}')  # type: ignore[union-attr]


def test_an_answer_without_text_has_an_empty_message() -> None:
    output = ResponseOutput(parallel_calls=True)
    kinds = [kind.removeprefix("response.") for kind, _ in output.end(complete=True)]
    assert kinds == [
        "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip
    assert [item.type for item in output.items] == ["message"]


# --- what is refused, and what ends early ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 2**30}, "max_output_tokens"),
        ({"metadata": {str(idx): "" for idx in range(17)}}, "metadata"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.image_url"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input.0.role"),
        ({"input": 3}, "input"),
        ({"nobody": 3}, "nobody"),
        ({"tool_choice": "required"}, None),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, None),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"a": "\ud800"}}]}, None),
        ({"stream_options": {"include_obfuscation": False}}, None),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(server: RunningServer, fields: dict[str, Any], param: str | None) -> None:
    body, headers = json.dumps(asked(**fields)), {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/responses", content=body, headers=headers)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param is None or param in error["message"]


def test_a_prompt_that_is_too_long(server: RunningServer) -> None:
    answer = httpx.post(f"{server.url}/v1/responses", json=asked(input="word " * 5000, stream=True))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert httpx.post(f"{server.url}/v1/responses", json=asked(model="other")).status_code == 404


def test_values_that_ask_for_nothing_are_taken(server: RunningServer) -> None:
    neutral: dict[str, Any] = {
        "store": False, "background": False, "include": [], "truncation": "disabled", "reasoning": None,
        "previous_response_id": None, "conversation": None, "service_tier": "auto", "tools": [], "tool_choice": "auto",
        "parallel_tool_calls": True, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "top_logprobs": 0,
    }  # fmt: skip
    assert httpx.post(f"{server.url}/v1/responses", json=asked(2, **neutral)).status_code == 200


def test_a_client_that_goes_away_ends_its_answer(server: RunningServer) -> None:
    with httpx.stream("POST", f"{server.url}/v1/responses", json=asked(400, stream=True)) as answer:
        next(answer.iter_lines())
    server.until(lambda now: now.num_running + now.num_waiting == 0)


def test_an_answer_that_is_ended_by_the_server_has_failed(server: RunningServer, client: openai.OpenAI) -> None:
    events: list[Any] = []
    for event in client.responses.create(stream=True, **asked(400)):
        events.append(event)
        if len(events) == 5:
            assert server.portal.call(server.engine.abort, events[0].response.id)
    assert [event.type for event in events].count("response.output_item.done") == 1
    assert (events[-1].type, events[-1].response.error.code) == ("response.failed", "server_error")


def test_an_answer_that_cannot_go_on_says_so_as_its_last_event(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk("Some text", (5,))
        raise ReadError("/secret/model.safetensors cannot be read", path=Path("/secret/model.safetensors"), offset=7)

    answers_with(server, chunks, monkeypatch)
    events: list[Any] = list(client.responses.create(stream=True, **asked()))
    last = events[-1].response
    assert (events[-1].type, last.status, last.error.code) == ("response.failed", "failed", "read_failed")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (last.output[0].status, last.output_text) == ("incomplete", "Some text")
    assert "secret" not in events[-1].to_json()
    assert httpx.post(f"{server.url}/v1/responses", json=asked()).status_code == 503
