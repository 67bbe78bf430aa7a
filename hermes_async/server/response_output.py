"""Output items of a `/v1/responses` answer, made of the deltas of a message, and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from hermes_async.server.responses_fields import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputReasoningText,
    OutputText,
)

OutputEvent = tuple[str, dict[str, Any]]
"""The type of an event, and its other fields without `sequence_number`."""


class ResponseOutput:
    """Makes the output items of an answer. Each method returns the events that tell a client what it did.

    Args:
        parallel_calls: Several function calls may be in one answer. Otherwise those after the first are left out.
    """

    def __init__(self, *, parallel_calls: bool) -> None:
        self._parallel_calls = parallel_calls
        # All mutable state: the items that have ended, the one that is under way, and the pieces of its text.
        self.items: list[OutputItem] = []
        self._item: OutputItem | None = None
        self._pieces: list[str] = []

    def add(self, delta: dict[str, Any]) -> list[OutputEvent]:
        """Adds a delta, as `MessageReader.read` gives it."""
        events: list[OutputEvent] = []
        if text := delta.get("reasoning_content"):
            if not isinstance(self._item, OutputReasoning):
                events += self._begin(OutputReasoning(id=_new_id("rs"), status="in_progress", content=[]))
            events.append(self._piece("response.reasoning_text.delta", text, content_index=0))
        if text := delta.get("content"):
            if not isinstance(self._item, OutputMessage):
                events += self._begin(OutputMessage(id=_new_id("msg"), status="in_progress", content=[]))
            events.append(self._piece("response.output_text.delta", text, content_index=0, logprobs=[]))
        for call in delta.get("tool_calls", ()):
            events += self._add_call(call)
        return events

    def end(self, *, complete: bool) -> list[OutputEvent]:
        """Ends the answer. One without items gets an empty message."""
        events: list[OutputEvent] = []
        if self._item is None and not self.items:
            events = self._begin(OutputMessage(id=_new_id("msg"), status="in_progress", content=[]))
        return events + self._end_item("completed" if complete else "incomplete")

    def items_so_far(self) -> Sequence[OutputItem]:
        """All items, the last one as incomplete if it has not ended."""
        return self.items if self._item is None else [*self.items, self._whole(self._item, "incomplete")]

    def _add_call(self, call: dict[str, Any]) -> list[OutputEvent]:
        if call["index"] > 0 and not self._parallel_calls:
            return []
        events, function = [], call["function"]
        if "id" in call:  # otherwise it goes on
            item = OutputCall(
                id=_new_id("fc"), status="in_progress", call_id=call["id"], name=function["name"], arguments=""
            )
            events = self._begin(item)
        if function["arguments"]:
            events.append(self._piece("response.function_call_arguments.delta", function["arguments"]))
        return events

    def _begin(self, item: OutputItem) -> list[OutputEvent]:
        """Begins an item, after the one before has ended."""
        events = self._end_item("completed")
        self._item = item
        events.append(("response.output_item.added", {**self._output_index, "item": item.model_dump()}))
        part = _part(item, "")
        if part is not None:
            events.append(("response.content_part.added", {**self._place, "content_index": 0, "part": part}))
        return events

    def _piece(self, kind: str, text: str, **fields: Any) -> OutputEvent:
        self._pieces.append(text)
        return kind, {**self._place, **fields, "delta": text}

    def _end_item(self, status: Literal["completed", "incomplete"]) -> list[OutputEvent]:
        if self._item is None:
            return []
        item, text = self._whole(self._item, status), "".join(self._pieces)
        events: list[OutputEvent] = []
        if isinstance(item, OutputCall):
            done = {**self._place, "name": item.name, "arguments": text}
            events.append(("response.function_call_arguments.done", done))
        else:
            place = {**self._place, "content_index": 0}
            if isinstance(item, OutputMessage):
                events.append(("response.output_text.done", {**place, "text": text, "logprobs": []}))
            else:
                events.append(("response.reasoning_text.done", {**place, "text": text}))
            events.append(("response.content_part.done", {**place, "part": _part(item, text)}))
        events.append(("response.output_item.done", {**self._output_index, "item": item.model_dump()}))
        self.items.append(item)
        self._item, self._pieces = None, []
        return events

    def _whole(self, item: OutputItem, status: Literal["completed", "incomplete"]) -> OutputItem:
        """The item with the text that came."""
        text = "".join(self._pieces)
        if isinstance(item, OutputCall):
            return item.model_copy(update={"status": status, "arguments": text})
        part = OutputText(text=text) if isinstance(item, OutputMessage) else OutputReasoningText(text=text)
        return item.model_copy(update={"status": status, "content": [part]})

    @property
    def _output_index(self) -> dict[str, Any]:
        return {"output_index": len(self.items)}

    @property
    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item.id, **self._output_index}


def _part(item: OutputItem, text: str) -> dict[str, Any] | None:
    """The part of an item that has its text; a call has none."""
    if isinstance(item, OutputCall):
        return None
    part = OutputText(text=text) if isinstance(item, OutputMessage) else OutputReasoningText(text=text)
    return part.model_dump()


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
