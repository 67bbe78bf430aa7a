"""Reads the text of an answer into OpenAI's message: content, reasoning and tool calls, whole or as deltas."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hermes_async.server.chat_fields import AnswerMessage, FunctionCall, ToolCallBody

if TYPE_CHECKING:
    from hermes_async import MessageDelta, ResponseStream


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """A tool call that `tool_choice` asks for; the whole text of the answer is JSON.

    Attributes:
        name: The function, whose arguments the text is. If None, the text is an object with a name and arguments.
        schema: The JSON schema of the text.
    """

    name: str | None
    schema: dict[str, Any]


class MessageReader:
    """Reads one answer. Use either `read` for each part of the text, or `read_all`.

    Args:
        parser: Finds reasoning and tool calls in the text; without one, all text is content.
        forced: The text is a tool call.
        parallel_calls: Several tool calls may be in one answer. Otherwise those after the first are left out.
    """

    def __init__(
        self, parser: ResponseStream | None, forced: ForcedCall | None, *, parallel_calls: bool = True
    ) -> None:
        self._parser = parser
        self._parallel_calls = parallel_calls
        self._forced = forced
        # All mutable state: the text of a forced call, and the number of tool calls so far.
        self._text = ""
        self._num_calls = 0

    @property
    def parses(self) -> bool:
        """Whether the text must have the special tokens."""
        return self._parser is not None

    def finish_reason(self, reason: str) -> str:
        """OpenAI's finish reason, from the engine's. Call it at the end."""
        named = self._forced is not None and self._forced.name is not None
        return "tool_calls" if reason == "stop" and self._num_calls and not named else reason

    def read(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        """The deltas of a part of the text; the last part has a finish reason."""
        if self._forced is not None:
            return self._read_forced(self._forced, text, finish_reason)
        if self._parser is None:
            return [{"content": text}] if text else []
        found = self._parser.push(text)
        if finish_reason is not None:
            found = [*found, *self._parser.finish()]
        return [delta for each in found for delta in self._deltas(each)]

    def _deltas(self, found: MessageDelta) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if found.reasoning:
            deltas.append({"reasoning_content": found.reasoning})
        if found.content:
            deltas.append({"content": found.content})
        if found.tool_call is not None and (self._parallel_calls or not self._num_calls):
            deltas.append(self._begin_call(found.tool_call.name, found.tool_call.arguments))
        return deltas

    def _read_forced(self, forced: ForcedCall, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        if forced.name is not None:
            if not text:
                return []
            if self._num_calls == 0:
                return [self._begin_call(forced.name, text)]
            return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}]
        self._text += text
        if finish_reason is None or not self._text:
            return []
        try:
            call = json.loads(self._text)
            return [self._begin_call(str(call["name"]), json.dumps(call["arguments"], ensure_ascii=False))]
        except (ValueError, KeyError, TypeError):  # the answer was cut off
            return [{"content": self._text}]

    def _begin_call(self, name: str, arguments: str) -> dict[str, Any]:
        call = {
            "index": self._num_calls,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self._num_calls += 1
        return {"tool_calls": [call]}

    def read_all(self, text: str, finish_reason: str) -> tuple[AnswerMessage, str]:
        """The whole message, and OpenAI's finish reason."""
        content, reasoning, calls = "", "", []
        for delta in self.read(text, finish_reason):
            content += delta.get("content", "")
            reasoning += delta.get("reasoning_content", "")
            calls += [
                ToolCallBody(id=call["id"], function=FunctionCall(**call["function"]))
                for call in delta.get("tool_calls", ())
            ]
        message = AnswerMessage(
            content=content if content or not calls else None,
            reasoning_content=reasoning or None,
            tool_calls=calls or None,
        )
        return message, self.finish_reason(finish_reason)
