"""The engine: the class that users open and call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes_async.config import SamplingParams, format_bytes, parse_bytes
from hermes_async.engine.chat_messages import checked_messages
from hermes_async.engine.lifetime import EngineState
from hermes_async.engine.prompt import Prompt, encode
from hermes_async.engine.session import Session
from hermes_async.engine.transcribing import Transcribing
from hermes_async.errors import EngineClosedError, RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.planning.plan import Plan
from hermes_async.results import Chunk, Completion, EngineSnapshot, EngineStatistics
from hermes_async.storage.file_kinds import exists, is_dir

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    from hermes_async.serving.session_kv import SessionKV

_log = logging.getLogger("hermes_async")


class Engine(Transcribing):
    """Runs one language model in a memory budget, for any number of requests at once.

        async with Engine("path or hub id", memory_budget="3GiB") as engine:
            async for chunk in engine.generate("Once upon a time"):
                print(chunk.text, end="", flush=True)

    Entering opens the checkpoint and begins to load it. It raises the errors below. The first sweep computes each
    stage as soon as it is loaded. Leaving ends every request: an iterator that is still in use raises
    `EngineClosedError`. Use an engine from one event loop (asyncio or uvloop); it is not thread-safe.

    Args:
        source: A checkpoint's directory, a GGUF file, or an id on the Hugging Face hub: "org/name", or for a GGUF file
            "org/name:Q4_K_M", with the end of its name.
        memory_budget: Bytes, or "3GiB", for weights, buffers, KV caches and workspace together, in addition to the
            baseline of the process. "auto" takes what the machine and its cgroups have free. It gives memory back
            within a sweep when they have less, and takes it again when they have more for a while.
        draft_model: A small model with the same tokenizer, as `source`. It drafts tokens that the model verifies, and
            all of it is resident, in the same budget.
        config: Options.
        on_event: Called on the event loop at each step of each request. It must not block; an error in it ends the
            engine.
        trace: A file for a record of what the agents do, in Chrome's trace event format, for Perfetto and
            `hermes-async timeline`. Only an older trace is overwritten. Or a `Trace`, which you drain yourself.
        revision: Branch, tag or commit of the model on the hub; not of the draft model.
        token: Token for the hub instead of the one that is logged in; False sends none.
        cache_dir: Directory for downloads instead of the hub's cache.

    Raises:
        ConfigError: An option is not valid.
        CheckpointError: The checkpoint cannot be used.
        UnsupportedModelError: The results of this architecture would be wrong.
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ReadError: A file of weights could not be opened, or the draft model could not be read; or `config.read_timeout`
            has passed (`ReadTimeoutError`).
    """

    # --- what users call ---

    @property
    def model_name(self) -> str:
        """The model's id on the hub, or the name of its directory or file."""
        source = Path(self._source)
        if not exists(source):
            return str(self._source)
        return source.resolve().name if is_dir(source) else source.name  # a link's name says more than its file's

    @property
    def is_open(self) -> bool:
        """Whether the engine was entered, and neither left nor stopped by an error."""
        self._check_loop()
        return self._state is EngineState.OPEN

    @property
    def plan(self) -> Plan:
        """How the budget is divided; `print` it."""
        with self._call():
            return self._model().loaded.plan

    @property
    def ready(self) -> bool:
        """Whether the engine is open and has all weights in memory that stay there. It serves requests before, too."""
        self._check_loop()
        return self._state is EngineState.OPEN and self._model().loaded.pipeline.holds_resident

    async def wait_ready(self) -> None:
        """Waits until all weights that stay are in memory. They are loaded without a request, from entering on.

        Weights that could not be read before are read again. The next request does that, too.

        Raises:
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: at once; the loading goes on.
        """
        with self._call():
            pipeline = self._model().loaded.pipeline
            try:
                await pipeline.wait_resident()
            except EngineClosedError:
                self._model()  # raises the failure, if there was one
                raise

    def resolve_sampling_params(self, params: SamplingParams | None = None) -> SamplingParams:
        """The parameters with this checkpoint's own values where `SamplingParams.from_model` left them open.

        Requests do the same, so this is for a look at the values.

        Args:
            params: None for `SamplingParams.from_model()`.

        Raises:
            RequestError: `params` are no `SamplingParams`.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.
        """
        with self._call():
            self._model()
            return self._resolved(SamplingParams.from_model() if params is None else params)

    def statistics(self) -> EngineStatistics:
        """Counts since the engine opened, also after it was closed."""
        self._check_loop()
        if self._serving is None:
            raise EngineClosedError("the engine was never entered")
        from hermes_async.serving.statistics import engine_statistics

        return engine_statistics(self._serving)

    def snapshot(self) -> EngineSnapshot:
        """What the engine does at this moment: stages, memory and requests. Also after it was closed.

        It reads no file and waits for nothing, so it may be called several times a second while sweeps run.
        """
        self._check_loop()
        if self._serving is None:
            raise EngineClosedError("the engine was never entered")
        from hermes_async.serving.snapshot import engine_snapshot

        return engine_snapshot(self._serving, "failed" if self._failure else "closed" if self._closed else "open")

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Generates from a prompt; yields a chunk after each sweep with new tokens. The last has a `finish_reason`.

        A request with `EngineConfig.max_buffered_chunks` unread chunks is paused: it takes part in no sweep until its
        user reads one.

        Args:
            prompt: Text, token ids, or chat messages (`[{"role": "user", "content": "..."}]`), which go through the
                checkpoint's chat template.
            params: How tokens are chosen.
            tools: Functions that the model may call, for the chat template: mappings as in OpenAI's API.
            chat_template_kwargs: Other variables of the chat template, such as `enable_thinking`.
            request_id: For `abort`. No other request may use it. None makes one.
            deadline: When the request must have ended, on the event loop's clock (`anyio.current_time() + seconds`).

        Raises:
            RequestError: The prompt, a tool or a parameter cannot be used.
            ContextLengthError: The prompt leaves no room in the context.
            MemoryBudgetError: The request needs more than all memory for KV caches.
            QueueFullError: `EngineConfig.max_waiting` requests wait already.
            DeadlineExceededError: The deadline has passed. Chunks from before it were yielded.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: leaving the iteration, or cancelling its task, ends the request within one stage and frees its
        memory. After `break`, a request ends when its iterator is closed: use `contextlib.aclosing`.
        """
        return self._generate(
            self.stream(
                prompt,
                params,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                request_id=request_id,
                deadline=deadline,
            )
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncIterator[Chunk]]:
        """As `generate`, but in two steps, for callers that must know first whether a request is accepted.

            async with engine.stream("Once upon a time") as chunks:  # the request is accepted, and waits for its turn
                async for chunk in chunks:
                    print(chunk.text, end="", flush=True)

        Entering prepares the request and puts it into the queue, and raises the errors below. Leaving ends the request
        if it has not ended.

        Raises:
            RequestError: As `generate`, for the prompt, the parameters and a full queue.

        Cancellation: as `generate`.
        """
        request_id = self._request_id(request_id)
        return self._open_stream(
            lambda opened: encode(opened, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs),
            params,
            request_id,
            deadline,
            None,
        )

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
        async with contextlib.aclosing(chunks):
            return await Completion.collect(chunks)

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """A conversation that keeps its keys and values between turns. Use it with `async with`.

        Args:
            messages: The first messages, such as a system message.

        Raises:
            RequestError: A message has no role or no content, or the model is an encoder-decoder.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.
        """
        with one_request("the reading of the messages"):
            checked = checked_messages(messages)
        return self._open_session(None, checked, ())

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its iterator yields a last chunk with `finish_reason` "abort".

        Returns when the request's memory is free, or a disk that brings it back is all that still uses it. False if no
        such request is under way.
        """
        self._check_loop()
        serving = self._serving
        if serving is None or not isinstance(request_id, str):
            return False
        if serving.preparations.abort(request_id):
            return True
        request = serving.requests.get(request_id)
        if request is None:
            return False
        serving.abort(request)
        await request.released.wait()
        return True

    async def resize(self, memory_budget: int | str) -> Plan:
        """Changes the memory budget, between two sweeps. Requests go on, and get the same tokens.

        More or fewer stages are resident afterwards; new ones are loaded while requests go on. Stage sizes, ring and
        workspace stay as they are. KV memory is given back last, and never while it is in use.

        Args:
            memory_budget: Bytes, or "3GiB".

        Returns:
            The new plan.

        Raises:
            ConfigError: Not a byte size.
            MemoryBudgetError: Too small for what the engine cannot free, or the system has no more memory. The error
                has the smallest budget that works. Nothing has changed.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: a resize that has begun goes on.
        """
        budget = parse_bytes(memory_budget)
        with self._call():
            before = self.plan.memory_budget
            await self._model().resize(budget)
            _log.info("the memory budget is %s now, after %s", format_bytes(budget), format_bytes(before))
            return self.plan

    def drop_prefixes(self) -> None:
        """Frees the keys and values that are kept only for future requests with the same first tokens."""
        with self._call():
            self._model().loaded.blocks.drop_unused()

    # --- sessions ---

    def _open_session(
        self, parent: SessionKV | None, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int]
    ) -> Session:
        with self._call():
            serving, skeleton = self._model(), self._opened_model().skeleton
            if skeleton.is_encoder_decoder:
                raise RequestError(
                    f"{type(skeleton.model).__name__} is an encoder-decoder and has no sessions: its encoder computes "
                    "each prompt as a whole; use generate"
                )
            return Session(self, serving.admission.open_session(parent), messages, token_ids)

    def _close_session(self, kv: SessionKV) -> None:
        if self._serving is not None and not self._closed:  # a closed engine has closed all sessions
            self._serving.admission.close_session(kv)
        kv.closed = True
