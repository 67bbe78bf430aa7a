"""The engine: owns every task, buffer and file, takes prompts, and gives tokens through async iterators."""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from hermes_async.config import EngineConfig, SamplingParams
from hermes_async.engine.admission import Admission
from hermes_async.engine.events import EventKind, RequestEvent
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.engine.prompt import PreparedPrompt, Prompt, encode, prepare
from hermes_async.engine.request import Chunk, Completion, Request
from hermes_async.engine.runner import Outcome, SweepRunner
from hermes_async.engine.running import RunningModel, running_model
from hermes_async.engine.scheduler import Scheduled, Scheduler
from hermes_async.engine.session import Session
from hermes_async.engine.session_kv import SessionKV
from hermes_async.engine.speculation import AcceptanceRates
from hermes_async.engine.statistics import EngineStatistics
from hermes_async.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineClosedError,
    EngineFailedError,
    HermesError,
    RequestError,
)
from hermes_async.pipeload.memory import process_peak_rss_bytes
from hermes_async.pipeload.pipeline import SweepAbandoned, ungrouped
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
        config: Options.
        on_event: Called on the event loop at each step of each request; must not block, and what it raises ends the
            engine.

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
        on_event: Callable[[RequestEvent], None] | None = None,
    ) -> None:
        if config is not None and not isinstance(config, EngineConfig):
            raise ConfigError(f"config must be an EngineConfig, not {type(config).__name__}")
        self._source = source
        self._memory_budget = memory_budget
        self._config = config or EngineConfig()
        self._on_event = on_event
        # All mutable state. `_running` is there from the loading of the resident stages on, and stays for its counts,
        # as do the scheduler and the admission; `_requests` holds every request that has not ended; `_preparing` an
        # event for each prompt tokenized just now; `_work` wakes the sweeps; `_acceptance` is what drafts were worth.
        self._tasks: anyio.abc.TaskGroup | None = None
        self._running: RunningModel | None = None
        self._scheduler: Scheduler
        self._admission: Admission
        self._watchers: anyio.abc.TaskGroup
        self._requests: dict[str, Request] = {}
        self._preparing: set[anyio.Event] = set()
        self._work = anyio.Event()
        self._acceptance = AcceptanceRates()
        self._tokens_generated = 0
        self._num_drafted = 0
        self._num_accepted = 0
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
        memory, pipeline, blocks = self._running.governor.statistics(), self._running.pipeline, self._running.blocks
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
            drafted_tokens=self._num_drafted,
            accepted_tokens=self._num_accepted,
            tokens_per_sweep=self._tokens_generated / max(1, pipeline.statistics.sweeps),
            read_seconds=pipeline.read_statistics.seconds,
            compute_seconds=pipeline.statistics.compute_seconds,
            stall_seconds=pipeline.statistics.stall_seconds,
            num_running=len(self._scheduler.running) + self._admission.num_loading,
            num_paused=len(self._scheduler.running) - self._scheduler.num_active,
            num_waiting=self._admission.num_waiting,
            num_sessions=self._admission.num_sessions,
            num_parked=self._admission.num_parked,
            num_parkings=self._admission.num_parkings,
            kv_bytes=blocks.kv_bytes,
            prefix_bytes=blocks.unused_prefix_bytes,
            prefix_hits=blocks.num_hits,
            prefix_tokens=blocks.num_hit_tokens,
            num_leases=memory.num_leases,
            num_free_buffers=self._running.ring.statistics().num_free,
            holders=memory.holders,
        )

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
        return self._stream(lambda opened: encode(opened, prompt), params, self._request_id(request_id), deadline, None)

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

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """A conversation that keeps its keys and values between turns; use it with `async with`.

        Args:
            messages: What it begins with, such as a system message.

        Raises:
            EngineClosedError, EngineFailedError: The engine was left, or failed.
        """
        return self._open_session(None, messages, ())

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

    def drop_prefixes(self) -> None:
        """Frees the keys and values that are kept only for requests to come that begin with the same tokens."""
        self._model().blocks.drop_unused()

    # --- sessions ---

    def _open_session(
        self, parent: SessionKV | None, messages: Sequence[Mapping[str, Any]], token_ids: Sequence[int]
    ) -> Session:
        self._model()
        return Session(self, self._admission.open_session(parent), messages, token_ids)

    def _close_session(self, kv: SessionKV) -> None:
        if not self._closed:  # which closed all of them
            self._admission.close_session(kv)
        kv.closed = True

    # --- a request's way: made, submitted, running, finished ---

    @staticmethod
    def _request_id(request_id: str | None) -> str:
        return request_id or uuid.uuid4().hex

    async def _stream(
        self,
        tokenize: Callable[[OpenedModel], list[int]],
        params: SamplingParams | None,
        request_id: str,
        deadline: float | None,
        session: SessionKV | None,
    ) -> AsyncGenerator[Chunk, None]:
        request = await self._make_request(tokenize, params, request_id, deadline, session)
        try:
            self._submit(request, deadline)
            while (chunk := await self._next(request)) is not None:
                yield chunk
        finally:
            self._leave(request)

    async def _make_request(
        self,
        tokenize: Callable[[OpenedModel], list[int]],
        params: SamplingParams | None,
        request_id: str,
        deadline: float | None,
        session: SessionKV | None,
    ) -> Request:
        running = self._model()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        _check_deadline(deadline)
        created_at = time.perf_counter()
        running.pipeline.start_streaming()
        ready = anyio.Event()
        self._preparing.add(ready)

        def prepared() -> PreparedPrompt:
            return prepare(
                running.opened,
                tokenize(running.opened),
                params,
                prompt_lookup=self._config.prompt_lookup,
                prior=self._acceptance,
            )

        try:
            prompt = await anyio.to_thread.run_sync(prepared)
        finally:
            self._preparing.remove(ready)
            ready.set()
        self._model()
        if request_id in self._requests:
            raise RequestError(f"request_id {request_id!r} is in use by a request that has not ended")
        return Request(request_id, prompt, params, self._config.max_buffered_chunks, created_at, session)

    def _submit(self, request: Request, deadline: float | None) -> None:
        self._requests[request.request_id] = request
        self._tell("queued", request)
        if deadline is not None:
            self._watchers.start_soon(self._watch_deadline, request, deadline)
        try:
            self._admission.submit(request)
        except RequestError as error:
            self._finish(request, error)

    async def _watch_deadline(self, request: Request, deadline: float) -> None:
        with anyio.move_on_after(deadline - anyio.current_time()):
            await request.released.wait()
            return
        if request.request_id in self._requests:
            request.error = DeadlineExceededError(
                f"the request did not end before its deadline; {request.num_output_tokens} tokens came"
            )
            self._abort(request)

    def _admitted(self, request: Request) -> None:
        self._scheduler.add(request)
        self._work.set()
        self._tell("admitted", request)

    async def _next(self, request: Request) -> Chunk | None:
        paused = request.paused
        try:
            chunk = await request.receive.receive()
        except anyio.EndOfStream:
            if request.error is not None:
                raise request.error from request.error.__cause__
            return None
        if paused and request.request_id in self._requests:
            self._work.set()
            self._tell("resumed", request)
        return chunk

    def _leave(self, request: Request) -> None:
        """Its user is gone."""
        self._abort(request)
        request.receive.close()

    def _abort(self, request: Request) -> None:
        if request.request_id in self._requests:
            request.aborted = True
            in_use = self._running is not None and self._running.runner.abort(request)
            if not in_use and not self._admission.is_loading(request):
                self._finish(request)

    def _finish(self, request: Request, error: HermesError | None = None) -> None:
        """Gives back all that the request holds and ends its stream. No thread may still use its KV."""
        if self._requests.pop(request.request_id, None) is None:
            return
        self._scheduler.remove(request)
        self._admission.give_back(request)
        request.error = error or request.error
        request.finished_at = time.perf_counter()
        if request.finish_reason is None and request.error is None:
            self._send(request, Chunk("", (), "abort"))
        self._tell("finished", request)
        request.send.close()
        request.released.set()
        self._admission.pump()

    def _send(self, request: Request, chunk: Chunk) -> None:
        request.finish_reason = chunk.finish_reason
        if chunk.finish_reason is not None:
            chunk = replace(chunk, usage=request.usage(), timings=request.timings())
        with contextlib.suppress(anyio.BrokenResourceError):  # its user left, and `_leave` sees to the rest
            request.send.send_nowait(replace(chunk, request_id=request.request_id))

    def _tell(self, kind: EventKind, request: Request) -> None:
        if self._on_event is not None:
            self._on_event(
                RequestEvent(
                    kind,
                    request.request_id,
                    time.perf_counter(),
                    request.usage(),
                    request.timings(),
                    request.finish_reason,
                    request.error,
                )
            )

    # --- the sweeps ---

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Opens the model, then runs sweeps until it is cancelled; whatever ends it, every request is ended."""
        try:
            opened = await anyio.to_thread.run_sync(open_model, self._source, self._memory_budget, self._config)
            with contextlib.closing(opened):
                async with running_model(opened, self._config, self._finish) as self._running:
                    await self._serve_requests(self._running, task_status)
        except Exception as error:
            if self._running is None:
                raise
            self._failure = error

    async def _serve_requests(self, running: RunningModel, task_status: anyio.abc.TaskStatus[None]) -> None:
        plan, blocks = running.opened.plan, running.blocks
        self._scheduler = Scheduler(
            plan.max_tokens_per_sweep, plan.max_sequences, plan.max_outputs, running.times, blocks.skip_computed
        )
        try:
            with ungrouped():
                async with anyio.create_task_group() as self._watchers:
                    self._admission = Admission(
                        blocks,
                        running.parking,
                        self._watchers,
                        max_sequences=plan.max_sequences,
                        max_waiting=self._config.max_waiting,
                        num_active=lambda: self._scheduler.num_active,
                        admitted=self._admitted,
                        ended=self._finish,
                    )
                    task_status.started()
                    try:
                        await self._run_sweeps(running.runner)
                    finally:
                        self._watchers.cancel_scope.cancel()
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._closed = True
            for request in list(self._requests.values()):
                ended = EngineClosedError("the engine was left while the request was running")
                self._finish(request, self._failed() if self._failure is not None else ended)
            self._admission.close()

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
            self._admission.pump()

    def _deliver(self, outcome: Outcome) -> None:
        item, request = outcome.item, outcome.item.request
        if request.reservation is None:
            return
        tokens = tuple(sampled.token_id for sampled in outcome.sampled)
        request.num_sweeps += 1
        request.token_ids += tokens
        request.kv.length = outcome.length
        self._model().blocks.commit(request.reservation, request.token_ids)
        if item.num_drafted:
            self._count_drafts(item, max(0, len(tokens) - 1))
        if outcome.error is not None:
            self._finish(request, outcome.error)
        if not tokens or request.aborted:
            return
        self._tokens_generated += len(tokens)
        if request.prepared.lookup is not None:
            request.prepared.lookup.extend(tokens)
        if request.first_token_at == 0:
            request.first_token_at = time.perf_counter()
            self._tell("first_token", request)
        if outcome.finish_reason is not None:
            request.finished_at = time.perf_counter()
        logprobs = outcome.sampled if request.params.logprobs is not None else ()
        self._send(request, Chunk(outcome.text, tokens, outcome.finish_reason, logprobs))
        if outcome.finish_reason is not None:
            self._finish(request)
        elif request.paused:
            self._tell("paused", request)

    def _count_drafts(self, item: Scheduled, num_accepted: int) -> None:
        request = item.request
        request.num_drafted += item.num_drafted
        request.num_accepted += num_accepted
        self._num_drafted += item.num_drafted
        self._num_accepted += num_accepted
        request.prepared.acceptance.record(item.match_length, item.num_drafted, num_accepted)

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


def _check_deadline(deadline: float | None) -> None:
    if deadline is None:
        return
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not math.isfinite(deadline):
        raise RequestError(f"deadline must be a time on anyio.current_time()'s clock or None, not {deadline!r}")
    late = anyio.current_time() - deadline
    if late >= 0:
        raise DeadlineExceededError(
            f"the deadline was {late:.3f} s ago; it is a time on the event loop's clock: anyio.current_time() + seconds"
        )
