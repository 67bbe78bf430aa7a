"""The engine: owns every task, buffer and file, takes prompts, and gives tokens through async iterators."""

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
from hermes_async.errors import (
    EngineClosedError,
    EngineError,
    RequestError,
    SessionClosedError,
)
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

    Entering opens the checkpoint, and begins to load; the first sweep goes on with each stage as soon as it is there.
    Leaving ends every request: one that is still iterated over gets `EngineClosedError`. Used from one event loop
    (asyncio or uvloop); not thread-safe.

    Args:
        source: A checkpoint's directory, or an id on the Hugging Face hub.
        memory_budget: Bytes, or "3GiB", for weights, buffers, KV caches and workspace together, over what the process
            holds anyway; "auto" takes what the machine and its cgroups leave, gives back within a sweep when they leave
            less, and takes it again when that lasts.
        draft_model: A small model with the same tokenizer, as `source`; it drafts tokens that the model verifies, and
            is in memory as a whole, in the same budget.
        config: Options.
        on_event: Called on the event loop at each step of each request; must not block, and what it raises ends the
            engine.
        trace: A file to write what the agents do to, in Chrome's trace event format: for Perfetto, and for
            `hermes-async timeline`; a new one, or an older trace. Or a `Trace`, whose events you drain yourself.
        revision, token, cache_dir: For models on the hub: a branch, tag or commit (not of the draft model); instead of
            the token that is logged in (False sends none); instead of the hub's cache.

    Raises (on entering):
        ConfigError: An option cannot work.
        CheckpointError: The checkpoint cannot be used.
        UnsupportedModelError: The architecture would not run right.
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ReadError: A file of weights could not be opened, or the draft model not be read.
    """

    # --- what users call ---

    @property
    def plan(self) -> Plan:
        """How the budget is divided; `print` it."""
        with self._call():
            return self._model().running.opened.plan

    def statistics(self) -> EngineStatistics:
        """Counts since the engine opened; also after it was left."""
        self._check_loop()
        if self._serving is None:
            raise EngineClosedError("the engine was never entered")
        return self._serving.statistics()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Generates from a prompt; yields a chunk for every sweep that has new tokens, the last with a `finish_reason`.

        A user who does not take its chunks pauses its own request: past `EngineConfig.max_buffered_chunks` it takes
        part in no sweep, until one is taken.

        Args:
            prompt: Text, token ids, or chat messages (`[{"role": "user", "content": "..."}]`), which go through the
                checkpoint's chat template.
            params: How tokens are chosen.
            request_id: For `abort`; not in use by another request. None makes one.
            deadline: When the request must have ended, on the event loop's clock (`anyio.current_time() + seconds`).

        Raises:
            RequestError: The prompt or a parameter cannot be used.
            ContextLengthError: The prompt leaves no room in the context.
            MemoryBudgetError: The request could never fit in what the plan leaves for KV caches.
            QueueFullError: As many requests wait as may.
            DeadlineExceededError: The deadline has passed; what came before it was yielded.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was left, or failed.

        Cancellation: leaving the iteration, or cancelling its task, ends the request within one stage and frees its
        memory. An iterator that is kept after `break` ends when it is closed: use `contextlib.aclosing`.
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

        Forward passes that wait at one time share a sweep, as far as memory for their activations reaches; each is
        computed as if it were alone.

        Args:
            inputs: What the model's class takes: tensors, arrays or lists, such as `input_ids=[[1, 2]]` or
                `pixel_values=` [images, channels, height, width]; flags such as `output_hidden_states=True`.

        Raises:
            RequestError: The model's forward does not take an input, or does not run on it.
            ContextLengthError: More tokens than the model has positions.
            MemoryBudgetError: The activations would take more than the plan sets aside for them.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was left, or failed.

        Cancellation: the pass ends before its next stage.
        """
        from hermes_async.serving.forward import prepare_forward

        with self._call():
            request = await self._prepare(lambda opened: prepare_forward(opened, inputs))
            return await self._model().forwarding.run(request)

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
        """Sentence vectors, float32 [texts, out]; of one text [out]. They are those of sentence-transformers.

        `out` is the hidden size, or what the checkpoint's own Dense layers make of it.
        Texts of about one length go in one forward pass, and passes share sweeps, also those of other calls.

        Args:
            pooling: "mean", "cls", "max", "last", "weightedmean" or "mean_sqrt_len"; None takes the checkpoint's own
                (sentence-transformers' files), or the last token of a causal language model, or the mean.
            normalize: To length 1; None as the checkpoint says, where `pooling` is not given.
            truncate: Cut texts that are longer than the checkpoint takes, or refuse them. None cuts them where the
                checkpoint has sentence-transformers' files.
            prompt_name: One of the checkpoint's prompts, to put before each text; None takes its default, if any.
            prompt: A text to put before each text.
            truncate_dim: Keep only so many numbers of each vector; None as the checkpoint says.

        Raises:
            RequestError: Something is no text, or the model does not take texts or gives no hidden states.
            ContextLengthError: A text is too long.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.embedding import EmbeddingOptions, embed_batches, prepare_embedding

        with one_request("the reading of the texts"):
            several = [texts] if isinstance(texts, str) else list(texts)
        options = EmbeddingOptions(pooling, normalize, truncate, prompt_name, prompt, truncate_dim)
        with self._call():
            batches = await self._prepare(lambda opened: prepare_embedding(opened, several, options))
            vectors = await embed_batches(self._model().forwarding, batches)
        return vectors[0] if isinstance(texts, str) else vectors

    async def classify(
        self, item: str | os.PathLike[str] | Sequence[str], *, truncate: bool = False
    ) -> Sequence[Label]:
        """All labels of a text, or of an image file where the model takes images, the likeliest first.

        Of a pair of texts too, as cross-encoders take them: `classify((query, document))`.

        Raises:
            RequestError: The model is no classifier of texts or images, or the file is no image.
            ContextLengthError: The text is too long; `truncate` cuts it.
            CheckpointError: The checkpoint does not say how images are prepared.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.classification import prepare_classification

        with self._call():
            request = await self._prepare(lambda opened: prepare_classification(opened, item, truncate=truncate))
            labels: Sequence[Label] = await self._model().forwarding.run(request)
        return labels

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """A conversation that keeps its keys and values between turns; use it with `async with`.

        Args:
            messages: What it begins with, such as a system message.

        Raises:
            RequestError: A message has no role or no content.
            EngineClosedError, EngineFailedError: The engine was left, or failed.
        """
        with one_request("the reading of the messages"):
            checked = checked_messages(messages)
        return self._open_session(None, checked, ())

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its iterator yields a last chunk with `finish_reason` "abort".

        Returns when the request's memory is free; one whose prompt is still being tokenized holds none. False if no
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
        """Takes more memory, or gives some back, between two sweeps; requests go on, and get the same tokens.

        More or fewer stages stay resident; those that newly stay are loaded while requests go on. The stages
        themselves, the ring and the workspace are those that the engine opened with; KV memory is given back only where
        nothing else is left, and never while it is in use.

        Args:
            memory_budget: Bytes, or "3GiB".

        Returns:
            The new plan.

        Raises:
            ConfigError: Not a byte size.
            MemoryBudgetError: Less than the engine cannot give back; the error has the smallest that works, and nothing
                has changed.
            EngineClosedError, EngineFailedError: The engine was left, or failed.

        Cancellation: what has begun goes on.
        """
        budget = parse_bytes(memory_budget)
        with self._call():
            await self._model().resize(budget)
            return self.plan

    def drop_prefixes(self) -> None:
        """Frees the keys and values that are kept only for requests to come that begin with the same tokens."""
        with self._call():
            self._model().running.blocks.drop_unused()

    # --- sessions ---

    def _open_session(
        self, parent: SessionKV | None, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int]
    ) -> Session:
        with self._call():
            return Session(self, self._model().admission.open_session(parent), messages, token_ids)

    def _close_session(self, kv: SessionKV) -> None:
        if self._serving is not None and not self._closed:  # leaving the engine closes all of them
            self._serving.admission.close_session(kv)
        kv.closed = True

    # --- a request's way: prepared, submitted, taken ---

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
            self._model()  # says so where the engine was left or failed
            if session is not None and session.closed:
                raise SessionClosedError(f"{session.name} was closed")
            request = Request(request_id, prompt, params, self._config.max_buffered_chunks, created_at, session)
            try:
                serving.submit(request, deadline)
                while (chunk := await serving.next_chunk(request)) is not None:
                    yield chunk
                    self._check_loop()
            finally:
                self._on_own_loop(serving.leave, request)

    def _on_own_loop(self, function: Callable[[Request], None], request: Request) -> None:
        """Calls `function` at once; where an iterator was taken to another loop or thread, on its own one."""
        try:
            self._check_loop()
        except EngineError:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(function, request)
        else:
            function(request)

    async def _prepare(self, check: Callable[[OpenedModel], T]) -> T:
        """As `Preparations.run`, for what is no request to generate."""
        serving = self._model()
        opened = self._opened_model()
        return await serving.preparations.run(lambda: check(opened))
