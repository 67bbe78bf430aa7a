"""The part of the engine that prepares a request, submits it, and hands out its chunks."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hermes_async.config import SamplingParams
from hermes_async.engine.prompt import prepare
from hermes_async.engine.tokenizing import Tokenizing
from hermes_async.errors import EngineError, RequestError, SessionClosedError
from hermes_async.results import Chunk, Timings, Usage
from hermes_async.serving.preparations import PreparationAbortedError
from hermes_async.serving.request import EncodedPrompt, Request, check_deadline
from hermes_async.serving.request_log import log_aborted_early, refusals_logged

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.serving.loop import ServingLoop
    from hermes_async.serving.session_kv import SessionKV


class Streaming(Tokenizing):
    """How `Engine` and `Session` run a request."""

    @staticmethod
    def _request_id(request_id: str | None) -> str:
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError(f"request_id must be a text or None, not {type(request_id).__name__}")
        return request_id or uuid.uuid4().hex

    @staticmethod
    async def _generate(stream: AbstractAsyncContextManager[AsyncIterator[Chunk]]) -> AsyncGenerator[Chunk, None]:
        async with stream as chunks:
            async for chunk in chunks:
                yield chunk

    def _open_stream(
        self,
        tokenize: Callable[[OpenedModel], EncodedPrompt],
        params: SamplingParams | None,
        request_id: str,
        deadline: float | None,
        session: SessionKV | None,
    ) -> AbstractAsyncContextManager[AsyncIterator[Chunk]]:
        return _RequestStream(self, tokenize, params, request_id=request_id, deadline=deadline, session=session)

    async def _prepare_request(
        self,
        tokenize: Callable[[OpenedModel], EncodedPrompt],
        params: SamplingParams | None,
        request_id: str,
        deadline: float | None,
        session: SessionKV | None,
    ) -> Request | None:
        """A request that can be submitted; None if it was aborted meanwhile.

        Raises:
            HermesError: As `Engine.generate`, for a request that cannot be accepted.
        """
        serving, opened = self._model(), self._opened_model()
        params = SamplingParams() if params is None else params
        created_at = time.perf_counter()
        prompt = None
        with refusals_logged(request_id), contextlib.suppress(PreparationAbortedError):
            params = self._resolved(params)
            check_deadline(deadline)
            serving.check_new(request_id)
            prompt = await serving.preparations.run(
                lambda: prepare(
                    opened,
                    tokenize(opened),
                    params,
                    prompt_lookup=self._config.prompt_lookup,
                    prior=serving.acceptance,
                ),
                request_id,
                deadline,
            )
        if prompt is None:
            log_aborted_early(request_id, time.perf_counter() - created_at)
            return None
        self._model()  # raises if the engine was closed or failed meanwhile
        if session is not None and session.closed:
            raise SessionClosedError(f"{session.name} was closed")
        return Request(
            request_id,
            prompt,
            params,
            max_buffered=self._config.max_buffered_chunks,
            created_at=created_at,
            session=session,
        )

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        return self._opened_model().skeleton.generation.resolve(params)

    async def _next_chunk(self, serving: ServingLoop, request: Request) -> Chunk | None:
        self._check_loop()
        return await serving.next_chunk(request)

    def _on_own_loop(self, function: Callable[[Request], None], request: Request) -> None:
        """Calls `function` at once, or on the engine's loop if the iterator is closed on another loop or thread."""
        try:
            self._check_loop()
        except EngineError:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(function, request, context=self._context)
        else:
            function(request)


class _RequestStream(AbstractAsyncContextManager[AsyncIterator[Chunk]]):
    """Entering submits a request, and leaving ends it.

    Not a generator: a loop that ends closes all generators at once, and this one would be closed before the user's.
    """

    def __init__(
        self,
        engine: Streaming,
        tokenize: Callable[[OpenedModel], EncodedPrompt],
        params: SamplingParams | None,
        *,
        request_id: str,
        deadline: float | None,
        session: SessionKV | None,
    ) -> None:
        self._engine = engine
        self._tokenize = tokenize
        self._params = params
        self._request_id = request_id
        self._deadline = deadline
        self._session = session
        # All mutable state: what is done on leaving.
        self._exits = contextlib.ExitStack()

    async def __aenter__(self) -> AsyncIterator[Chunk]:
        engine, created_at = self._engine, time.perf_counter()
        with contextlib.ExitStack() as exits:
            exits.enter_context(engine._call())
            request = await engine._prepare_request(
                self._tokenize, self._params, self._request_id, self._deadline, self._session
            )
            if request is None:
                chunks = _Chunks(partial(_only, [_aborted_chunk(self._request_id, created_at)]))
            else:
                serving = engine._model()
                exits.callback(engine._on_own_loop, serving.leave, request)
                serving.submit(request, self._deadline)
                await serving.admission.settle()
                if request.error is not None:
                    raise request.error
                chunks = _Chunks(partial(engine._next_chunk, serving, request))
            self._exits = exits.pop_all()
        return chunks

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exits.__exit__(kind, error, traceback)


class _Chunks:
    """The chunks of a request. Not a generator: one that is left before its end would have to be closed.

    Args:
        take: Waits for the next chunk; None after the last one.
    """

    def __init__(self, take: Callable[[], Awaitable[Chunk | None]]) -> None:
        self._take = take

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self._take()
        if chunk is None:
            raise StopAsyncIteration
        return chunk


async def _only(chunks: list[Chunk]) -> Chunk | None:
    return chunks.pop() if chunks else None


def _aborted_chunk(request_id: str, created_at: float) -> Chunk:
    """The only chunk of a request that was aborted while its prompt was prepared."""
    waited = time.perf_counter() - created_at
    timings = Timings(queued_s=waited, first_token_s=waited, total_s=waited, tokens_per_s=0.0)
    return Chunk("", (), "abort", usage=Usage(0, 0), timings=timings, request_id=request_id)
