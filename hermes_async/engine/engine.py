"""The engine: the class that users open and call."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hermes_async.config import Pooling, SamplingParams, parse_bytes
from hermes_async.engine.chat_messages import checked_messages
from hermes_async.engine.lifetime import EngineLifetime
from hermes_async.engine.prompt import Prompt, encode, prepare
from hermes_async.engine.session import Session
from hermes_async.errors import EngineClosedError, EngineError, RequestError, SessionClosedError
from hermes_async.foreign_errors import one_request
from hermes_async.planning.plan import Plan
from hermes_async.results import Chunk, Completion, EngineStatistics, aborted_chunk
from hermes_async.serving.preparations import PreparationAbortedError
from hermes_async.serving.request import Request, check_deadline

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    import numpy as np
    import numpy.typing as npt

    from hermes_async.engine.opening import OpenedModel
    from hermes_async.results import Label
    from hermes_async.serving.session_kv import SessionKV

T = TypeVar("T")


class Engine(EngineLifetime):
    """Runs one causal language model in a memory budget, for any number of requests at once.

        async with Engine("path or hub id", memory_budget="3GiB") as engine:
            async for chunk in engine.generate("Once upon a time"):
                print(chunk.text, end="", flush=True)

    Entering opens the checkpoint and begins to load it; the first sweep computes each stage as soon as it is loaded.
    Leaving ends every request: an iterator that is still in use raises `EngineClosedError`. Use an engine from one
    event loop (asyncio or uvloop); it is not thread-safe.

    Args:
        source: A checkpoint's directory, or an id on the Hugging Face hub.
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

    Raises (on entering):
        ConfigError: An option is not valid.
        CheckpointError: The checkpoint cannot be used.
        UnsupportedModelError: The results of this architecture would be wrong.
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ReadError: A file of weights could not be opened, or the draft model could not be read.
    """

    # --- what users call ---

    @property
    def plan(self) -> Plan:
        """How the budget is divided; `print` it."""
        with self._call():
            return self._model().loaded.planned.plan

    def statistics(self) -> EngineStatistics:
        """Counts since the engine opened, also after it was closed."""
        self._check_loop()
        if self._serving is None:
            raise EngineClosedError("the engine was never entered")
        from hermes_async.serving.statistics import engine_statistics

        return engine_statistics(self._serving)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
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
            request_id: For `abort`. No other request may use it. None makes one.
            deadline: When the request must have ended, on the event loop's clock (`anyio.current_time() + seconds`).

        Raises:
            RequestError: The prompt or a parameter cannot be used.
            ContextLengthError: The prompt leaves no room in the context.
            MemoryBudgetError: The request needs more than all memory for KV caches.
            QueueFullError: `EngineConfig.max_waiting` requests wait already.
            DeadlineExceededError: The deadline has passed. Chunks from before it were yielded.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: leaving the iteration, or cancelling its task, ends the request within one stage and frees its
        memory. After `break`, a request ends when its iterator is closed: use `contextlib.aclosing`.
        """
        request_id = self._request_id(request_id)
        return self._stream(lambda opened: encode(opened, prompt), params, request_id, deadline, None)

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> Completion:
        """As `generate`, but returns the whole answer at its end."""
        chunks = self.generate(prompt, params, request_id=request_id, deadline=deadline)
        async with contextlib.aclosing(chunks):
            return await Completion.collect(chunks)

    async def forward(self, **inputs: Any) -> Any:
        """Runs the model's own `forward`, and returns transformers' output object.

        Forward passes that wait at the same time share a sweep, if there is memory for their activations. Each is
        computed as if it were alone.

        Args:
            inputs: Arguments of the model's class: tensors, arrays or lists, such as `input_ids=[[1, 2]]` or
                `pixel_values=` [images, channels, height, width]; flags such as `output_hidden_states=True`.

        Raises:
            RequestError: The model's forward does not take an input, or does not run on it.
            ContextLengthError: More tokens than the model has positions.
            MemoryBudgetError: The activations may take more memory than the plan's workspace.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: the pass ends before its next stage.
        """
        from hermes_async.serving.forward_passes import prepare_forward

        with self._call():
            job = await self._prepare(lambda opened: prepare_forward(opened, inputs))
            return await self._model().forward(job)

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        truncate: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Sentence vectors, float32 [texts, out], or [out] for one text. They equal those of sentence-transformers.

        `out` is the hidden size, or the size after the checkpoint's Dense layers.
        Texts of similar length share a forward pass, and passes share sweeps, also with other calls.

        Args:
            pooling: "mean", "cls", "max", "last", "weightedmean" or "mean_sqrt_len". None takes that of the checkpoint
                (sentence-transformers' files), else "last" for a causal language model, else "mean".
            normalize: Scale vectors to length 1. None takes the checkpoint's setting if `pooling` is None too.
            truncate: Cut texts that are longer than the checkpoint allows, or refuse them. None cuts them if the
                checkpoint has sentence-transformers' files.
            prompt_name: One of the checkpoint's prompts, put before each text; None takes its default, if any.
            prompt: A text to put before each text.
            truncate_dim: The length to which each vector is cut; None takes the checkpoint's setting.

        Raises:
            RequestError: An item is not a text, or the model does not take texts, or has no hidden states.
            ContextLengthError: A text is too long.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.embedding import EmbeddingOptions, embed_batches, prepare_embedding

        with one_request("the reading of the texts"):
            several = [texts] if isinstance(texts, str) else list(texts)
        options = EmbeddingOptions(
            pooling=pooling,
            normalize=normalize,
            truncate=truncate,
            prompt_name=prompt_name,
            prompt=prompt,
            truncate_dim=truncate_dim,
        )
        with self._call():
            batches = await self._prepare(lambda opened: prepare_embedding(opened, several, options))
            vectors = await embed_batches(self._model(), batches)
        return vectors[0] if isinstance(texts, str) else vectors

    async def classify(
        self, item: str | os.PathLike[str] | Sequence[str], *, truncate: bool = False
    ) -> Sequence[Label]:
        """All labels of a text, or of an image file if the model takes images, the most likely first.

        A pair of texts works too, for cross-encoders: `classify((query, document))`.

        Raises:
            RequestError: The model does not classify texts or images, or the file is not an image.
            ContextLengthError: The text is too long; `truncate` cuts it.
            CheckpointError: The checkpoint does not say how images are prepared.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.classification import prepare_classification

        with self._call():
            job = await self._prepare(lambda opened: prepare_classification(opened, item, truncate=truncate))
            labels: Sequence[Label] = await self._model().forward(job)
        return labels

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """A conversation that keeps its keys and values between turns. Use it with `async with`.

        Args:
            messages: The first messages, such as a system message.

        Raises:
            RequestError: A message has no role or no content.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.
        """
        with one_request("the reading of the messages"):
            checked = checked_messages(messages)
        return self._open_session(None, checked, ())

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its iterator yields a last chunk with `finish_reason` "abort".

        Returns when the request's memory is free; False if no such request is under way.
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
            await self._model().resize(budget)
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
            return Session(self, self._model().admission.open_session(parent), messages, token_ids)

    def _close_session(self, kv: SessionKV) -> None:
        if self._serving is not None and not self._closed:  # a closed engine has closed all sessions
            self._serving.admission.close_session(kv)
        kv.closed = True

    # --- requests: prepare, submit, take chunks ---

    @staticmethod
    def _request_id(request_id: str | None) -> str:
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError(f"request_id must be a text or None, not {type(request_id).__name__}")
        return request_id or uuid.uuid4().hex

    async def _stream(
        self,
        tokenize: Callable[[OpenedModel], list[int]],
        params: SamplingParams | None,
        request_id: str,
        deadline: float | None,
        session: SessionKV | None,
    ) -> AsyncGenerator[Chunk, None]:
        with self._call():
            serving = self._model()
            params = SamplingParams() if params is None else params
            if not isinstance(params, SamplingParams):
                raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
            check_deadline(deadline)
            created_at = time.perf_counter()
            serving.check_new(request_id)
            prompt, opened = None, self._opened_model()
            with contextlib.suppress(PreparationAbortedError):
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
                yield aborted_chunk(request_id, created_at)
                return
            self._model()  # raises if the engine was closed or failed meanwhile
            if session is not None and session.closed:
                raise SessionClosedError(f"{session.name} was closed")
            request = Request(
                request_id,
                prompt,
                params,
                max_buffered=self._config.max_buffered_chunks,
                created_at=created_at,
                session=session,
            )
            try:
                serving.submit(request, deadline)
                while (chunk := await serving.next_chunk(request)) is not None:
                    yield chunk
                    self._check_loop()
            finally:
                self._on_own_loop(serving.leave, request)

    def _on_own_loop(self, function: Callable[[Request], None], request: Request) -> None:
        """Calls `function` at once, or on the engine's loop if the iterator is closed on another loop or thread."""
        try:
            self._check_loop()
        except EngineError:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(function, request)
        else:
            function(request)

    async def _prepare(self, check: Callable[[OpenedModel], T]) -> T:
        """As `Preparations.run`, for calls that do not generate."""
        serving = self._model()
        opened = self._opened_model()
        return await serving.preparations.run(lambda: check(opened))
