"""The input of a `/v1/responses` request: items, which become chat messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator

from hermes_async.server.chat_fields import (
    ChatMessage,
    FunctionCall,
    FunctionName,
    ImagePart,
    ImageUrl,
    TextPart,
    ToolCallBody,
)
from hermes_async.server.fields import MAX_MESSAGES, MAX_TOOLS, Body, Text

_MAX_PARTS = 1024
_Id = Annotated[str, StringConstraints(max_length=256)]
Empty = Annotated[list[Any], Field(max_length=0)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """A part of a message's content; an answer's own part may be sent back, if it has no annotations."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Empty | None = None
    logprobs: Empty | None = None


class InputImage(Body):
    """An image in a message's content, as a data URL."""

    type: Literal["input_image"]
    image_url: Annotated[str, StringConstraints(max_length=2**26)]
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("image_url")
    @classmethod
    def _only_data(cls, url: str) -> str:
        return ImageUrl(url=url).url


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]
Parts = Annotated[list[InputPart], Field(min_length=1, max_length=_MAX_PARTS)]


def _kind_of_content(content: Any) -> str:
    return "text" if isinstance(content, str) else "parts"


Content = Annotated[Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_kind_of_content)]


class MessageItem(Body):
    """A message of anybody."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: _Id | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Body):
    """A function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: _Id
    name: FunctionName
    arguments: Text
    id: _Id | None = None
    status: ItemStatus | None = None


class CallOutputItem(Body):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: Content
    id: _Id | None = None
    status: ItemStatus | None = None


class SummaryText(Body):
    """A part of a reasoning item's summary."""

    type: Literal["summary_text"] = "summary_text"
    text: Text


class ReasoningText(Body):
    """A part of a reasoning item."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: Text


class ReasoningItem(Body):
    """The reasoning of an earlier answer, or of this one."""

    type: Literal["reasoning"] = "reasoning"
    id: _Id | None = None
    summary: Annotated[list[SummaryText], Field(max_length=_MAX_PARTS)]
    content: Annotated[list[ReasoningText], Field(max_length=_MAX_PARTS)] | None = None
    encrypted_content: None = None
    status: ItemStatus | None = None

    @property
    def text(self) -> str:
        """The reasoning itself, or its summary."""
        return "\n".join(part.text for part in self.content or self.summary)


def _kind_of_item(item: Any) -> str | None:
    """The name of an item's type; None for what is no item. A message may leave it out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item_type",
        custom_error_message="an item is a message, function_call, function_call_output or reasoning",
    ),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES - 1)]


def messages_of_items(items: list[MessageItem | CallItem | CallOutputItem | ReasoningItem]) -> list[ChatMessage]:
    """Chat messages. Reasoning, text and calls that follow each other are one message of the assistant."""
    messages: list[ChatMessage] = []
    for item in items:
        last = messages[-1] if messages and messages[-1].role == "assistant" else None
        if isinstance(item, ReasoningItem):
            messages.append(ChatMessage(role="assistant", reasoning_content=item.text))
        elif isinstance(item, CallItem):
            call = ToolCallBody(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            if last is None or len(last.tool_calls or ()) == MAX_TOOLS:
                last = ChatMessage(role="assistant")
                messages.append(last)
            last.tool_calls = [*(last.tool_calls or ()), call]
        elif isinstance(item, CallOutputItem):
            messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=_chat_content(item.output)))
        elif item.role == "assistant" and last is not None and last.content is None and not last.tool_calls:
            last.content = _chat_content(item.content)  # `last` has only reasoning
        else:
            messages.append(ChatMessage(role=item.role, content=_chat_content(item.content)))
    return messages


def _chat_content(content: str | list[InputText | InputImage]) -> str | list[TextPart | ImagePart]:
    if isinstance(content, str):
        return content
    if len(content) == 1 and isinstance(content[0], InputText):
        return content[0].text
    return [
        TextPart(type="text", text=part.text)
        if isinstance(part, InputText)
        else ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url))
        for part in content
    ]
