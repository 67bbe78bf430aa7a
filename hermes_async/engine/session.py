"""A session: a conversation that keeps its keys and values, so that a turn computes only new tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hermes_async.config import SamplingParams, check_text
from hermes_async.engine.chat_messages import checked_messages
from hermes_async.engine.prompt import (
    Prompt,
    check_no_template_input,
    continue_text,
    encode,
    has_chat_template,
)
from hermes_async.errors import RequestError, SessionClosedError
from hermes_async.foreign_errors import one_request
from hermes_async.results import Chunk, Completion
from hermes_async.serving.request import EncodedPrompt

if TYPE_CHECKING:
    from hermes_async.engine.engine import Engine
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.serving.session_kv import SessionKV


class Session:
    """One conversation; made by `Engine.session`.

        async with engine.session() as chat:
            async for chunk in chat.generate("Hello"):
                print(chunk.text, end="", flush=True)

    If the checkpoint has a chat template, a text is a message of the user, and the history is `messages`. Otherwise,
    and for token ids, a turn continues `token_ids`. The history gets the part of an answer that the user has read, and
    stays as it was if the user has read no token. An image stays in `messages` as it was given: a file is read again
    in each turn.

    Answers equal those to the whole conversation without a session. While KV memory is short, the session's KV is
    parked on disk.
    """

    def __init__(
        self, engine: Engine, kv: SessionKV, messages: Sequence[Mapping[str, Any]] = (), token_ids: Sequence[int] = ()
    ) -> None:
        self._engine = engine
        self._kv = kv
        # All mutable state: the history (`_messages` is empty if turns continue token ids), and the id of the turn
        # under way.
        self._messages = [dict(message) for message in messages]
        self._token_ids = list(token_ids)
        self._turn: str | None = None

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """The conversation so far; empty if turns continue token ids."""
        self._engine._check_loop()
        return tuple(dict(message) for message in self._messages)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The last turn's prompt, and the part of its answer that was read."""
        self._engine._check_loop()
        return tuple(self._token_ids)

    def edit(
        self, messages: Sequence[Mapping[str, Any]] | None = None, *, token_ids: Sequence[int] | None = None
    ) -> None:
        """Replaces the history. Its common beginning with the old one is not computed again.

        Raises:
            SessionClosedError: The session was closed.
            RequestError: A turn is under way, `messages` or `token_ids` is not valid, or not exactly one is given.
        """
        self._check_idle()
        if (messages is None) == (token_ids is None):
            raise RequestError("edit takes either messages or token_ids")
        with one_request("the reading of the history"):
            new_messages = [] if messages is None else checked_messages(messages)
            new_token_ids = [] if token_ids is None else [index(token_id) for token_id in token_ids]
        self._messages, self._token_ids = new_messages, new_token_ids

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Takes a turn: as `Engine.generate`, with the history before `prompt`.

        Raises:
            SessionClosedError: The session was closed.
            RequestError: Another turn is under way, or the prompt does not continue this kind of history.
        """
        self._check_idle()
        asked: list[dict[str, Any]] = []
        prompt_ids: list[int] = []
        taken: list[Chunk] = []

        def tokenize(opened: OpenedModel) -> EncodedPrompt:
            nonlocal asked
            asked = self._asked(opened, prompt)
            if asked:
                encoded = encode(opened, asked, tools=tools, chat_template_kwargs=chat_template_kwargs)
            else:
                check_no_template_input(tools, chat_template_kwargs)
                encoded = EncodedPrompt(self._continued(opened, prompt))
            prompt_ids[:] = encoded.token_ids
            return encoded

        self._turn = request_id = self._engine._request_id(request_id)
        try:
            async with self._engine._open_stream(tokenize, params, request_id, deadline, self._kv) as chunks:
                async for chunk in chunks:
                    taken.append(chunk)
                    yield chunk
        finally:
            self._turn = None
            answer = [token_id for chunk in taken for token_id in chunk.token_ids]
            if answer:
                self._token_ids = [*prompt_ids, *answer]
                if asked:
                    text = "".join(chunk.text for chunk in taken)
                    self._messages = [*asked, {"role": "assistant", "content": text}]

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> Completion:
        """As `generate`, but returns the whole answer at its end."""
        chunks = self.generate(
            prompt,
            params,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            request_id=request_id,
            deadline=deadline,
        )
        async with aclosing(chunks):
            return await Completion.collect(chunks)

    def fork(self) -> Session:
        """Another session with the same history, which must be closed too.

        Both share the memory of full KV blocks.

        Raises:
            SessionClosedError: The session was closed.
            RequestError: A turn is under way.
        """
        self._check_idle()
        return self._engine._open_session(self._kv, self._messages, self._token_ids)

    async def aclose(self) -> None:
        """Frees the session's KV, and aborts a turn under way. A second call does nothing."""
        self._engine._check_loop()
        if not self._kv.closed:
            self._engine._close_session(self._kv)
            if self._turn is not None:
                await self._engine.abort(self._turn)

    def _asked(self, opened: OpenedModel, prompt: Prompt) -> list[dict[str, Any]]:
        """The conversation with the new messages; empty if the turn continues token ids."""
        new: list[dict[str, Any]] = []
        if isinstance(prompt, str) and has_chat_template(opened):
            if not prompt:
                raise RequestError("the prompt is empty; a turn takes a text or messages")
            check_text("the prompt", prompt)
            new = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, Sequence):
            new = [dict(message) for message in prompt if isinstance(message, Mapping)]
        if not new or (len(new) < len(prompt) and not isinstance(prompt, str)):
            if self._messages:
                raise RequestError("this session has a history of messages, and does not take token ids")
            return []
        if self._token_ids and not self._messages:
            raise RequestError("this session continues token ids, and does not take messages")
        return [*self._messages, *checked_messages(new)]

    def _continued(self, opened: OpenedModel, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and self._token_ids:
            return [*self._token_ids, *continue_text(opened, prompt)]
        return [*self._token_ids, *encode(opened, prompt).token_ids]

    def _check_open(self) -> None:
        self._engine._check_loop()
        if self._kv.closed:
            self._engine._model()  # raises if the engine was closed or failed
            raise SessionClosedError(f"{self._kv.name} was closed")

    def _check_idle(self) -> None:
        self._check_open()
        if self._turn is not None:
            raise RequestError(f"{self._kv.name} has a turn under way; a session takes one turn after another")
