"""How the text of an answer becomes OpenAI's message."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hermes_async import MessageDelta, ToolCall
from hermes_async.server.chat_message import ForcedCall, MessageReader


class Parser:
    """Finds reasoning in lower case, content in upper case, and a call at each "!"."""

    def __init__(self) -> None:
        self.num_calls = 0

    def push(self, text: str) -> list[MessageDelta]:
        return [self._delta(letter) for letter in text]

    def finish(self) -> list[MessageDelta]:
        return [MessageDelta(content="END")]

    def _delta(self, letter: str) -> MessageDelta:
        if letter == "!":
            self.num_calls += 1
            return MessageDelta(tool_call=ToolCall(self.num_calls - 1, "call", '{"a": 1}'))
        return MessageDelta(content=letter) if letter.isupper() else MessageDelta(reasoning=letter)


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of deltas."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}}
    for delta in deltas:
        message["content"] += delta.get("content", "")
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            name, arguments = message["calls"].get(call["index"], (call["function"].get("name"), ""))
            message["calls"][call["index"]] = (name, arguments + call["function"]["arguments"])
    return message


def test_text_without_a_parser_is_content() -> None:
    message, reason = MessageReader(None, None).read_all("a <think> b", "stop")
    assert (message.content, message.reasoning_content, message.tool_calls, reason) == (
        "a <think> b",
        None,
        None,
        "stop",
    )
    assert MessageReader(None, None).read_all("", "length")[0].content == ""


def test_parts_are_the_same_whole_and_streamed() -> None:
    text = "abAB!c!"
    message, reason = MessageReader(Parser(), None).read_all(text, "stop")  # type: ignore[arg-type]
    assert (message.content, message.reasoning_content, reason) == ("ABEND", "abc", "tool_calls")
    assert [call.function.name for call in message.tool_calls or ()] == ["call", "call"]
    reader = MessageReader(Parser(), None)  # type: ignore[arg-type]
    deltas = [delta for letter in text for delta in reader.read(letter, None)] + reader.read("", "stop")
    streamed = joined(deltas)
    assert (streamed["content"], streamed["reasoning_content"]) == ("ABEND", "abc")
    assert streamed["calls"] == {0: ("call", '{"a": 1}'), 1: ("call", '{"a": 1}')}
    assert reader.finish_reason("stop") == "tool_calls"
    assert reader.finish_reason("length") == "length"


def test_a_named_call_streams_its_arguments() -> None:
    reader = MessageReader(None, ForcedCall("weather", {}))
    deltas = reader.read("", None) + reader.read('{"city":', None) + reader.read(' "Ulm"}', "stop")
    assert joined(deltas)["calls"] == {0: ("weather", '{"city": "Ulm"}')}
    assert len({call["id"] for delta in deltas for call in delta["tool_calls"] if "id" in call}) == 1
    assert reader.finish_reason("stop") == "stop"


@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_required_call_comes_whole(num_parts: int) -> None:
    text = json.dumps({"name": "weather", "arguments": {"city": "Ulm"}})
    reader = MessageReader(None, ForcedCall(None, {}))
    parts = [text] if num_parts == 1 else [text[:5], text[5:9], text[9:]]
    deltas = [delta for part in parts for delta in reader.read(part, None)]
    assert deltas == []
    assert joined(reader.read("", "stop"))["calls"] == {0: ("weather", '{"city": "Ulm"}')}
    assert reader.finish_reason("stop") == "tool_calls"


def test_a_required_call_that_was_cut_off_is_content() -> None:
    message, reason = MessageReader(None, ForcedCall(None, {})).read_all('{"name": "wea', "length")
    assert (message.content, message.tool_calls, reason) == ('{"name": "wea', None, "length")
