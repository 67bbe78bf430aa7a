"""The engine: owns every task, buffer and file, takes prompts, and gives tokens through async iterators."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from hermes_async.config import EngineConfig, SamplingParams
from hermes_async.engine.opening import open_model
from hermes_async.engine.prompt import Prompt, prepare
from hermes_async.engine.request import Chunk, Completion, Request
from hermes_async.engine.runner import Outcome, SweepRunner
from hermes_async.engine.running import RunningModel, running_model
from hermes_async.engine.scheduler import Scheduler
from hermes_async.engine.statistics import EngineStatistics
from hermes_async.errors import (
    ConfigError,
    EngineClosedError,
    EngineFailedError,
    HermesError,
    RequestError,
)
from hermes_async.modeling.kv_cache import SequenceKV
from hermes_async.pipeload.memory import process_peak_rss_bytes
from hermes_async.pipeload.pipeline import SweepAbandoned
from hermes_async.pipeload.planner import Plan


class Engine:
    """Runs one causal language model in a memory budget, for any number of requests at once.

        async with Engine("path or hub id", memory_budget="3GiB") as engine:
            async for chunk in engine.generate("Once upon a time"):
                print(chunk.text, end="", flush=True)

    Entering opens the checkpoint and loads the resident stages. Leaving ends every request: one that is still
    iterated over gets `EngineClosedError`. Used from one event loop (asyncio or uvloop); not thread-safe.

    Args:
        source: A checkpoint's directory, or an id on the Hugging Face hub.
        memory_budget: Bytes, or "3GiB", for weights, buffers, KV caches and workspace together, over what the process
            holds anyway; "auto" takes what the machine and its cgroups leave.
        config: Options for experiments.

    Raises (on entering):
        ConfigError: An option cannot work.
        CheckpointError: The checkpoint cannot be used.
        UnsupportedModelError: The architecture would not run right.
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ReadError: Weights could not be read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        memory_budget: int | str = "auto",
        config: EngineConfig | None = None,
    ) -> None:
        if config is not None and not isinstance(config, EngineConfig):
            raise ConfigError(f"config must be an EngineConfig, not {type(config).__name__}")
        self._source = source
        self._memory_budget = memory_budget
        self._config = config or EngineConfig()
        # All mutable state. `_running` is there from the loading of the resident stages on, and stays for its counts;
        # `_requests` holds every request that has not ended; `_preparing` an event for each prompt tokenized just
        # now; `_slots` are the places in a sweep; `_work` wakes the sweeps.
        self._tasks: anyio.abc.TaskGroup | None = None
        self._running: RunningModel | None = None
        self._scheduler = Scheduler(0)
        self._slots = anyio.Semaphore(0)
        self._requests: dict[str, Request] = {}
        self._preparing: set[anyio.Event] = set()
        self._work = anyio.Event()
        self._tokens_generated = 0
        self._closed = False
        self._failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        if self._tasks is not None or self._closed:
            raise EngineClosedError("an engine can be entered once; make another one")
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            await self._tasks.start(self._serve, name="hermes engine")
        except BaseException:
            self._closed = True
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        self._closed = True
        self._tasks.cancel_scope.cancel()
        # The body's own error goes on by itself; given to the task group it would come out in a group.
        await self._tasks.__aexit__(None, None, None)

    # --- what users call ---

    @property
    def plan(self) -> Plan:
        """How the budget is divided; `print` it."""
        return self._model().opened.plan

    def statistics(self) -> EngineStatistics:
        """Counts since the engine opened; also after it was left."""
        if self._running is None:
            raise EngineClosedError("the engine was never entered")
        memory, pipeline = self._running.governor.statistics(), self._running.pipeline
        return EngineStatistics(
            bytes_read=pipeline.read_statistics.bytes_read,
            bytes_resident=self._running.opened.plan.resident_bytes,
            bytes_in_use=memory.bytes_in_use,
            peak_bytes_in_use=memory.peak_bytes_in_use,
            memory_budget=memory.budget_bytes,
            baseline_bytes=self._running.opened.baseline_bytes,
            # Linux brings the peak up to date only now and then, and the baseline may be above it.
            process_peak_rss_bytes=max(process_peak_rss_bytes(), self._running.opened.baseline_bytes),
            sweeps=pipeline.statistics.sweeps,
            tokens_generated=self._tokens_generated,
            read_seconds=pipeline.read_statistics.seconds,
            compute_seconds=pipeline.statistics.compute_seconds,
            stall_seconds=pipeline.statistics.stall_seconds,
            num_running=len(self._scheduler.running),
            num_waiting=sum(request.kv is None for request in self._requests.values()),
            num_leases=memory.num_leases,
            num_free_buffers=self._running.ring.statistics().num_free,
            holders=memory.holders,
        )

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Generates from a prompt; yields a chunk for every new token, the last one with a `finish_reason`.

        Args:
            prompt: Text, token ids, or chat messages (`[{"role": "user", "content": "..."}]`), which go through the
                checkpoint's chat template.
            params: How tokens are chosen.
            request_id: For `abort`; not in use by another request. None makes one.

        Raises:
            RequestError: The prompt or a parameter cannot be used.
            ContextLengthError: The prompt leaves no room in the context.
            MemoryBudgetError: The request could never fit in what the plan leaves for KV caches.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was left, or failed.

        Cancellation: leaving the iteration, or cancelling its task, ends the request within one stage and frees its
        memory. An iterator that is kept after `break` ends when it is closed: use `contextlib.aclosing`.
        """
        request = await self._make_request(prompt, params, request_id)
        try:
            await self._admit(request)
            while (chunk := await self._next(request)) is not None:
                yield chunk
        finally:
            self._leave(request)

    async def complete(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Completion:
        """As `generate`, but returns the whole answer at its end."""
        request = await self._make_request(prompt, params, request_id)
        chunks = []
        try:
            await self._admit(request)
            while (chunk := await self._next(request)) is not None:
                chunks.append(chunk)
        finally:
            self._leave(request)
        reason = chunks[-1].finish_reason
        assert reason is not None
        return Completion(
            request_id=request.request_id,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
            finish_reason=reason,
            usage=request.usage(),
            timings=request.timings(),
            logprobs=tuple(sampled for chunk in chunks for sampled in chunk.logprobs),
        )

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its iterator yields a last chunk with `finish_reason` "abort".

        Returns when the request's memory is free. False if no such request is under way.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._abort(request)
        await request.released.wait()
        return True

    # --- a request's way: made, admitted, running, finished ---

    async def _make_request(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None) -> Request:
        running = self._model()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        created_at = time.perf_counter()
        running.pipeline.start_streaming()
        ready = anyio.Event()
        self._preparing.add(ready)
        try:
            prepared = await anyio.to_thread.run_sync(prepare, running.opened, prompt, params)
        finally:
            self._preparing.remove(ready)
            ready.set()
        self._model()
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._requests:
            raise RequestError(f"request_id {request_id!r} is in use by a request that has not ended")
        send, receive = anyio.create_memory_object_stream[Chunk](float("inf"))
        request = Request(request_id, prepared, params, send, receive, created_at)
        self._requests[request.request_id] = request
        return request

    async def _admit(self, request: Request) -> None:
        """Waits for a place in the sweeps and for the request's KV memory, first come, first served."""
        running = self._model()
        kv_layout = running.opened.seen.kv
        with request.waiting:
            await self._slots.acquire()
            if request.released.is_set():  # it was ended while its place was on the way
                self._slots.release()
                return
            request.has_slot = True
            nbytes = kv_layout.nbytes(request.prepared.capacity)
            lease = await running.governor.acquire(f"KV of request {request.request_id}", nbytes)
            if request.released.is_set():
                lease.release()
                return
            request.lease = lease
            request.kv = SequenceKV(kv_layout, request.prepared.capacity)
            request.admitted_at = time.perf_counter()
            self._scheduler.add(request)
            self._work.set()

    async def _next(self, request: Request) -> Chunk | None:
        try:
            return await request.receive.receive()
        except anyio.EndOfStream:
            if request.error is not None:
                raise request.error from request.error.__cause__
            return None

    def _leave(self, request: Request) -> None:
        """Its user is gone."""
        self._abort(request)
        request.receive.close()

    def _abort(self, request: Request) -> None:
        if request.request_id in self._requests:
            request.aborted = True
            if self._running is None or not self._running.runner.abort(request):
                self._finish(request)

    def _finish(self, request: Request, error: HermesError | None = None) -> None:
        """Gives back all that the request holds and ends its stream. No sweep may still use its KV."""
        if self._requests.pop(request.request_id, None) is None:
            return
        self._scheduler.remove(request)
        if request.kv is not None:
            request.kv.close()
        if request.lease is not None:
            request.lease.release()
        if request.has_slot:
            self._slots.release()
        request.waiting.cancel()
        request.error = error
        request.finished_at = time.perf_counter()
        if request.finish_reason is None and error is None:
            self._send(request, Chunk("", (), "abort"))
        request.send.close()
        request.released.set()

    def _send(self, request: Request, chunk: Chunk) -> None:
        request.finish_reason = chunk.finish_reason
        with contextlib.suppress(anyio.BrokenResourceError):  # its user left, and `_leave` sees to the rest
            request.send.send_nowait(chunk)

    # --- the sweeps ---

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Opens the model, then runs sweeps until it is cancelled; whatever ends it, every request is ended."""
        try:
            opened = await anyio.to_thread.run_sync(open_model, self._source, self._memory_budget, self._config)
            with contextlib.closing(opened):
                async with running_model(opened, self._config, self._finish) as self._running:
                    self._scheduler = Scheduler(opened.plan.max_tokens_per_sweep)
                    self._slots = anyio.Semaphore(opened.plan.max_sequences)
                    task_status.started()
                    await self._run_sweeps(self._running.runner)
        except Exception as error:
            if self._running is None:
                raise
            self._failure = error
        finally:
            for request in list(self._requests.values()):
                ended = EngineClosedError("the engine was left while the request was running")
                self._finish(request, self._failed() if self._failure is not None else ended)

    async def _run_sweeps(self, runner: SweepRunner) -> None:
        while True:
            sweep = self._scheduler.schedule()
            if not sweep:
                self._work = anyio.Event()
                await self._work.wait()
                for ready in tuple(self._preparing):  # requests made at the same time share the first sweep too
                    await ready.wait()
                await anyio.lowlevel.checkpoint()
                continue
            outcomes: list[Outcome] = []
            error: HermesError | None = None
            try:
                outcomes = await runner.run(sweep)
            except SweepAbandoned:
                pass
            except HermesError as read_error:
                error = read_error
            for outcome in outcomes:
                self._deliver(outcome)
            for item in sweep:
                if item.request.aborted or error is not None:
                    self._finish(item.request, None if item.request.aborted else error)

    def _deliver(self, outcome: Outcome) -> None:
        request = outcome.request
        if request.kv is None or request.aborted:
            return
        request.kv.length += outcome.num_tokens
        if outcome.error is not None:
            self._finish(request, outcome.error)
        if outcome.sampled is None:
            return
        self._tokens_generated += 1
        if request.first_token_at == 0:
            request.first_token_at = time.perf_counter()
        request.token_ids.append(outcome.sampled.token_id)
        logprobs = (outcome.sampled,) if request.params.logprobs is not None else ()
        self._send(request, Chunk(outcome.text, (outcome.sampled.token_id,), outcome.finish_reason, logprobs))
        if outcome.finish_reason is not None:
            self._finish(request)

    def _model(self) -> RunningModel:
        if self._failure is not None:
            raise self._failed()
        if self._closed:
            raise EngineClosedError("the engine was left")
        if self._running is None:
            raise EngineClosedError("the engine is not entered; use it with `async with`")
        return self._running

    def _failed(self) -> EngineFailedError:
        error = EngineFailedError(f"the engine stopped: {type(self._failure).__name__}: {self._failure}")
        error.__cause__ = self._failure
        return error
