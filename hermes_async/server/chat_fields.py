"""The body of a chat request, and of its answers, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from hermes_async.server.fields import (
    MAX_MESSAGES,
    MAX_TOKENS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    Body,
    JsonSchema,
    Model,
    SamplingFields,
    StreamOptions,
    StructuredOutputsBody,
    Text,
    UsageBody,
    User,
)

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    """An image as a data URL. `detail` has no effect: the checkpoint's own processor decides."""

    url: Annotated[str, StringConstraints(max_length=2**26)]
    detail: Literal["auto", "low", "high"] | None = None

    @field_validator("url")
    @classmethod
    def _only_data(cls, url: str) -> str:
        if not url.startswith("data:image/"):
            raise ValueError("images are not fetched; give a data URL, which begins with data:image/")
        return url


class ImagePart(Body):
    """An image in a message's content."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=1024)]


def _kind_of_content(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


Content = Annotated[Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_kind_of_content)]


class FunctionCall(Body):
    """A call of a function, with its arguments as JSON text."""

    name: FunctionName
    arguments: Text


class ToolCallBody(Body):
    """A tool call of an earlier answer."""

    id: Annotated[str, StringConstraints(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class ChatMessage(Body):
    """One message. Fields that OpenAI's clients send back with an answer may be there, if they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCallBody], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known_parts(cls, message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image_url") and isinstance(kind, str):
                raise ValueError(f"a part of type {kind[:40]!r} is not supported; parts are of type text or image_url")
            if kind == "image_url" and message.get("role") != "user":
                raise ValueError("only messages of role 'user' may have images")
        return message

    @property
    def has_images(self) -> bool:
        """Whether an image is among its parts."""
        return isinstance(self.content, list) and any(isinstance(part, ImagePart) for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it. A developer's message is a system message there."""
        message = self.model_dump(exclude_none=True, exclude={"annotations"})
        if self.role == "developer":
            message["role"] = "system"
        if self.content is None:  # many templates put it into the text, whatever else there is
            message["content"] = ""
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
        return message


class FunctionTool(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: Text | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """The function that must be called."""

    name: FunctionName


class NamedTool(Body):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Body):
    """A JSON schema for the answer."""

    name: Annotated[str, StringConstraints(max_length=128)]
    schema_: JsonSchema | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextFormat(Body):
    """An answer in any form."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(SamplingFields):
    """A request for the next message of a conversation."""

    model: Model | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    user: User | None = None
    store: Literal[False] | None = None

    @property
    def has_images(self) -> bool:
        """Whether a message has an image."""
        return any(message.has_images for message in self.messages)

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens to report; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("structured_outputs and response_format exclude each other")
        forced = isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"
        if forced and not self.tools:
            raise ValueError("tool_choice needs tools")
        if forced and self.response_structure() is not None:
            raise ValueError("a tool_choice that forces a call excludes structured answers")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError("tool_choice names a function that is not among the tools")
        return self

    def response_structure(self) -> StructuredOutputsBody | None:
        """What the answer's text must be, from `structured_outputs` or `response_format`."""
        if isinstance(self.response_format, JsonObjectFormat):
            return StructuredOutputsBody.model_validate({"json_object": True})
        if isinstance(self.response_format, JsonSchemaFormat):
            return StructuredOutputsBody.model_validate({"json": self.response_format.json_schema.schema_ or {}})
        return self.structured_outputs


# --- answers ---


class TopLogprob(BaseModel):
    """A token that could have come, and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The message that the model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    """The answers to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
