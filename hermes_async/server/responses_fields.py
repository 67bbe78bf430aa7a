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
    FunctionName,
    FunctionTool,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedFunction,
    NamedSchema,
    NamedTool,
    TextFormat,
    Tool,
)
from hermes_async.server.fields import MAX_TOKENS, MAX_TOOLS, Body, JsonSchema, Model, Text, User
from hermes_async.server.response_items import Empty, Items, ItemStatus, messages_of_items

_Choice = Literal["none", "auto", "required"]


# --- the request ---


def _kind_of_input(value: Any) -> str:
    return "text" if isinstance(value, str) else "items"


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
    include: Empty | None = None
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
        return first + messages_of_items(self.input)


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
    status: ItemStatus
    content: list[OutputText]


class OutputCall(BaseModel):
    """A function call that the model wrote; `arguments` is JSON."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
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
    status: ItemStatus
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
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Literal[0] = 0
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]
