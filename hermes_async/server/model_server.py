"""What all routes share: the engine with its settings, requests that are under way, and token texts."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Depends, FastAPI, Request

from hermes_async import Chunk, Engine, SampledToken, SamplingParams, Usage
from hermes_async.errors import DeadlineExceededError, EngineClosedError
from hermes_async.server.errors import FieldError
from hermes_async.server.fields import UsageBody, new_id
from hermes_async.server.metrics import RequestMetrics
from hermes_async.server.settings import ServerSettings
from hermes_async.server.streams import unless_left

T = TypeVar("T")

_MAX_TOKEN_TEXTS = 65_536


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and what their chat template gets beside them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


class ModelServer:
    """One engine behind the routes.

    Args:
        engine: May be opened after this was made.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: RequestMetrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.model_name = settings.served_model_name or engine.model_name
        self.created = int(time.time())
        # All mutable state: ids of all requests that are under way, scopes of those that run forward passes, whether
        # new ones are refused, and texts of tokens that were decoded for log-probabilities.
        self._request_ids: set[str] = set()
        self._runs: set[anyio.CancelScope] = set()
        self._idle = anyio.Event()
        self._stopping = False
        self._token_texts: dict[int, str] = {}

    # --- requests ---

    def check_model(self, model: str | None) -> None:
        """Refuses a request for another model.

        Raises:
            FieldError: With status 404.
        """
        if model is not None and model != self.model_name:
            raise FieldError(
                f"the model does not exist; this server has {self.model_name!r}",
                param="model",
                status=404,
                code="model_not_found",
            )

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Refuses a request for more answers than the settings allow.

        Raises:
            FieldError: With status 422.
        """
        if num_prompts * n > self.settings.max_choices:
            raise FieldError(
                f"n: {num_prompts * n} answers were asked for; at most {self.settings.max_choices} are allowed",
                param="n",
            )

    def default_sampling(self) -> SamplingParams:
        """The values of fields of sampling that a request leaves out."""
        return self.engine.resolve_sampling_params() if self.settings.from_model else SamplingParams()

    def default_max_tokens(self, num_prompt_tokens: int) -> int:
        """The most tokens of an answer whose request does not say: what the settings say, and KV memory allows."""
        plan, most = self.engine.plan, self.settings.default_max_tokens
        if plan.kv_bytes_per_token:
            affordable = (plan.kv_bytes - plan.kv_bytes_per_sequence) // plan.kv_bytes_per_token - num_prompt_tokens
            most = min(most, max(1, affordable - affordable % 16 - 16))
        return most

    def deadline(self) -> float | None:
        """When a request that begins now must have ended."""
        timeout_s = self.settings.request_timeout_s
        return None if timeout_s is None else anyio.current_time() + timeout_s

    async def open_answer(
        self,
        stack: AsyncExitStack,
        prompt: Sequence[int] | Conversation,
        params: SamplingParams,
        request_id: str,
    ) -> AsyncIterator[Chunk]:
        """Begins one answer; it ends when `stack` is closed.

        Raises:
            FieldError: Another request with this id has not ended.
            RequestError: As `Engine.stream` on entering.
            EngineError: The server stops, or the engine has stopped.
        """
        if self._stopping:
            raise EngineClosedError("the server stops")
        if request_id in self._request_ids:
            raise FieldError(
                "a request with this id has not ended", param="x-request-id", status=409, code="duplicate_request_id"
            )
        options: dict[str, Any] = {"request_id": request_id, "deadline": self.deadline()}
        if isinstance(prompt, Conversation):
            options |= {"tools": prompt.tools, "chat_template_kwargs": prompt.chat_template_kwargs}
        stream = self.engine.stream(prompt.messages if isinstance(prompt, Conversation) else prompt, params, **options)
        stack.callback(self._forget, request_id)
        self._request_ids.add(request_id)
        return await stack.enter_async_context(stream)

    async def run(self, request: Request, work: Callable[[], Awaitable[T]]) -> T:
        """Runs the forward passes of a request; they end when its client leaves, or its time is over.

        Raises:
            ClientDisconnect: The client went away.
            DeadlineExceededError: The request did not end in time.
            EngineClosedError: The server stops.
        """
        if self._stopping:
            raise EngineClosedError("the server stops")
        deadline, run_id = self.deadline(), new_id("run")
        scope = anyio.CancelScope(deadline=math.inf if deadline is None else deadline)
        self._request_ids.add(run_id)
        self._runs.add(scope)
        try:
            with scope:
                return await unless_left(request, work)
        finally:
            self._runs.discard(scope)
            self._forget(run_id)
        if self._stopping:
            raise EngineClosedError("the server stops")
        raise DeadlineExceededError("the request did not end in time")

    def _forget(self, request_id: str) -> None:
        self._request_ids.discard(request_id)
        if not self._request_ids:
            self._idle.set()

    # --- the end ---

    async def stop(self, within_s: float) -> None:
        """Refuses new requests, and returns when those that run have ended; after `within_s` seconds it aborts them."""
        self._stopping = True
        if not self._request_ids:
            return
        self._idle = anyio.Event()
        with anyio.move_on_after(within_s):
            await self._idle.wait()
        await self.abort_all()

    async def abort_all(self) -> None:
        """Ends all requests; answers end with the finish reason "abort", and forward passes with an error."""
        for scope in tuple(self._runs):
            scope.cancel()
        for request_id in tuple(self._request_ids):
            await self.engine.abort(request_id)

    @property
    def is_open(self) -> bool:
        """Whether the engine takes requests."""
        return self.engine.is_open

    @property
    def num_requests(self) -> int:
        """Requests of the engine that are under way."""
        return len(self._request_ids)

    @property
    def stopping(self) -> bool:
        return self._stopping

    # --- texts of tokens ---

    async def token_texts(self, sampled: Sequence[SampledToken]) -> dict[int, str]:
        """The text of each token by itself, of the chosen ones and of the likeliest."""
        texts: dict[int, str] = {}
        for token_id in {token_id for token in sampled for token_id in (token.token_id, *(token.top_logprobs or ()))}:
            text = self._token_texts.get(token_id)
            if text is None:
                text = await self.engine.detokenize([token_id])
                if len(self._token_texts) >= _MAX_TOKEN_TEXTS:
                    self._token_texts.clear()
                self._token_texts[token_id] = text
            texts[token_id] = text
        return texts


def usage_of(usages: Sequence[Usage], num_prompt_tokens: int) -> UsageBody:
    """Token counts of several answers, in which each prompt counts once."""
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    cached = min((usage.cached_tokens for usage in usages), default=0)
    return UsageBody(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=num_prompt_tokens + completion_tokens,
        prompt_tokens_details={"cached_tokens": cached},
    )


def model_server_of(app: FastAPI) -> ModelServer:
    """The server of an application that `create_app` made."""
    server: ModelServer = app.state.model_server
    return server


def model_server(request: Request) -> ModelServer:
    """The application's server; a dependency of the routes."""
    return model_server_of(request.app)


async def exit_stack() -> AsyncIterator[AsyncExitStack]:
    """What a request holds until its answer was sent; a dependency of the routes."""
    async with AsyncExitStack() as stack:
        yield stack


Server = Annotated[ModelServer, Depends(model_server)]
Stack = Annotated[AsyncExitStack, Depends(exit_stack)]
