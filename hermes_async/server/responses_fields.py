"""The body of a `/v1/responses` request, and of its answer, as OpenAI's API has them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from hermes_async.server.chat_fields import (
    ChatMessage,
    ChatRequest,
    FunctionCall,
    FunctionName,
    FunctionTool,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedFunction,
    NamedSchema,
    NamedTool,
    TextFormat,
    TextPart,
    Tool,
    ToolCallBody,
)
from hermes_async.server.fields import MAX_MESSAGES, MAX_TOKENS, MAX_TOOLS, Body, JsonSchema, Model, Text, User

_MAX_PARTS = 1024
_Id = Annotated[str, StringConstraints(max_length=256)]
_Empty = Annotated[list[Any], Field(max_length=0)]
_Choice = Literal["none", "auto", "required"]
_ItemStatus = Literal["in_progress", "completed", "incomplete"]


# --- items of the input ---


class InputText(Body):
    """A part of a message's content; an answer's own part may be sent back, if it has no annotations."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: _Empty | None = None
    logprobs: _Empty | None = None


Parts = Annotated[list[InputText], Field(min_length=1, max_length=_MAX_PARTS)]


def _kind_of_content(content: Any) -> str:
    return "text" if isinstance(content, str) else "parts"


Content = Annotated[Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_kind_of_content)]


class MessageItem(Body):
    """A message of anybody."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: _Id | None = None
    status: _ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Body):
    """A function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: _Id
    name: FunctionName
    arguments: Text
    id: _Id | None = None
    status: _ItemStatus | None = None


class CallOutputItem(Body):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: Content
    id: _Id | None = None
    status: _ItemStatus | None = None


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
    status: _ItemStatus | None = None

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


def _kind_of_input(value: Any) -> str:
    return "text" if isinstance(value, str) else "items"


# --- the request ---


class ResponseTool(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class NamedResponseTool(Body):
    """A choice of one tool."""

    type: Literal["function"]
    name: FunctionName


class ResponseSchemaFormat(NamedSchema):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")


class TextOptions(Body):
    """The form of the answer's text."""

    format: Annotated[TextFormat | JsonObjectFormat | ResponseSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Body):
    """OpenAI's `stream_options` of this route: what the server does anyway."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Body):
    """A request for an answer. The server keeps nothing, so each request brings the whole conversation.

    Fields of OpenAI's API that ask for something this server does not do may be there with the value that asks for
    nothing.
    """

    model: Model | None = None
    input: Annotated[Annotated[Text, Tag("text")] | Annotated[Items, Tag("items")], Discriminator(_kind_of_input)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: _Choice | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    user: User | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: _Empty | None = None
    reasoning: None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    service_tier: Literal["auto", "default"] | None = None
    top_logprobs: Literal[0] | None = None

    _chat: ChatRequest = PrivateAttr()

    @model_validator(mode="after")
    def _consistent(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        _check_can_be_sent(self)
        try:
            self._chat = self._as_chat()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def chat(self) -> ChatRequest:
        """The same request, as one for the next message of a conversation."""
        return self._chat

    def _as_chat(self) -> ChatRequest:
        return ChatRequest(
            messages=self._messages(),
            tools=None if self.tools is None else [_chat_tool(tool) for tool in self.tools],
            tool_choice=_chat_choice(self.tool_choice),
            response_format=_chat_format(self.text),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def _messages(self) -> list[ChatMessage]:
        first = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*first, ChatMessage(role="user", content=self.input)]
        return first + _messages_of(self.input)


def _check_can_be_sent(request: ResponseRequest) -> None:
    """Refuses JSON schemas that no answer could repeat. pydantic has checked all other values."""
    given = [tool.parameters for tool in request.tools or ()]
    if request.text is not None and isinstance(request.text.format, ResponseSchemaFormat):
        given.append(request.text.format.schema_)
    try:
        json.dumps(given, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError(
            "a JSON schema has a lone surrogate, a number that is not finite, or too many levels"
        ) from None


def _chat_tool(tool: ResponseTool) -> Tool:
    return Tool(type="function", function=FunctionTool(**tool.model_dump(exclude={"type"})))


def _chat_choice(choice: _Choice | NamedResponseTool | None) -> _Choice | NamedTool | None:
    if isinstance(choice, NamedResponseTool):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice


def _chat_format(text: TextOptions | None) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
    asked = None if text is None else text.format
    if isinstance(asked, ResponseSchemaFormat):
        return JsonSchemaFormat(type="json_schema", json_schema=NamedSchema(**asked.model_dump(exclude={"type"})))
    return asked


def _messages_of(items: list[MessageItem | CallItem | CallOutputItem | ReasoningItem]) -> list[ChatMessage]:
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


def _chat_content(content: str | list[InputText]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0].text
    return [TextPart(type="text", text=part.text) for part in content]


# --- the answer ---


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """A message that the model wrote."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: _ItemStatus
    content: list[OutputText]


class OutputCall(BaseModel):
    """A function call that the model wrote; `arguments` is JSON."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: _ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoningText(BaseModel):
    """The text of a reasoning item."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    """The reasoning before a message or a call."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: _ItemStatus
    summary: list[Any] = []
    content: list[OutputReasoningText]


OutputItem = OutputMessage | OutputCall | OutputReasoning


class InputTokensDetails(BaseModel):
    """Where the prompt's keys and values came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """What the answer's tokens were for."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts of an answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseErrorBody(BaseModel):
    """Why an answer failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class ResponseBody(BaseModel):
    """An answer, with the request's fields."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseErrorBody | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Literal[0] = 0
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
