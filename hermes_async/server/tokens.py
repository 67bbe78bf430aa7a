"""`/tokenize` and `/detokenize`, with vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from hermes_async.server.chat_fields import ChatMessage, Tool
from hermes_async.server.errors import ERRORS
from hermes_async.server.fields import MAX_MESSAGES, MAX_TOKENS, MAX_TOOLS, Body, Model, Text, TokenId
from hermes_async.server.model_server import Server

router = APIRouter(responses=ERRORS)

_FOR_MESSAGES = ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs")


class TokenizeRequest(Body):
    """A text or chat messages to tokenize.

    Attributes:
        add_special_tokens: Puts the tokenizer's special tokens around a text; by default True. A chat template has its
            own, so that it may only be False for messages.
        add_generation_prompt: Ends messages with the beginning of an answer; by default True.
        return_token_strs: Also returns the vocabulary's own string of each token.
    """

    model: Model | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: Literal[False] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is for a prompt; the chat template has the special tokens of messages")
        for name in _FOR_MESSAGES:
            if self.messages is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is for messages, not for a prompt")
        return self


class Tokenized(BaseModel):
    """Token ids, their number, and the most that the model takes."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids to turn into a text."""

    model: Model | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, server: Server) -> Tokenized:
    """The token ids of a text or of chat messages, as the other routes use them."""
    server.check_model(body.model)
    engine = server.engine

    async def work() -> Tokenized:
        if body.messages is None:
            token_ids = await engine.tokenize(
                body.prompt or "", add_special_tokens=body.add_special_tokens is not False
            )
        else:
            token_ids = await engine.tokenize(
                [message.for_template() for message in body.messages],
                tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None,
                chat_template_kwargs=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        strings = await engine.token_strings(token_ids) if body.return_token_strs else None
        return Tokenized(
            count=len(token_ids), max_model_len=engine.plan.context_length, tokens=token_ids, token_strs=strings
        )

    return await server.run(request, work)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, server: Server) -> Detokenized:
    """The text of token ids, special tokens included."""
    server.check_model(body.model)
    return Detokenized(prompt=await server.run(request, lambda: server.engine.detokenize(body.tokens)))
