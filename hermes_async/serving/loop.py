"""The serving loop: schedules jobs, runs a sweep for them, and delivers its outcomes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from hermes_async.config import EngineConfig, format_count
from hermes_async.errors import DeadlineExceededError, HermesError, QueueFullError, ReadTimeoutError, RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.results import Chunk, EventKind, RequestEvent, Timings, Usage
from hermes_async.serving.admission import Admission
from hermes_async.serving.forward_passes import ForwardQueue, forward_error
from hermes_async.serving.jobs import ForwardJob, GenerationJob, Outcome
from hermes_async.serving.loaded_model import LoadedModel
from hermes_async.serving.loop_lag import LoopLag
from hermes_async.serving.preparations import Preparations
from hermes_async.serving.request import Request, RequestState
from hermes_async.serving.request_log import log_finished
from hermes_async.serving.resizes import Resizes
from hermes_async.serving.scheduler import Scheduler
from hermes_async.serving.speculation import AcceptanceRates
from hermes_async.serving.sweep import Sweep, SweepOutcomes

_SHARING_SECONDS = 0.02
"""How long the first sweep after an idle time waits for prompts that are being tokenized."""


class ServingLoop:
    """Serves requests and forward passes with a loaded model. Event-loop side only.

    A step of the loop is three calls: `schedule`, `Sweep.run`, `deliver`.

    Args:
        tasks: Owns the tasks that admit requests, watch deadlines, and move the KV of sessions.
        on_event: Called for each step of each request.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: anyio.abc.TaskGroup,
        config: EngineConfig,
        on_event: Callable[[RequestEvent], None] | None,
    ) -> None:
        plan = loaded.planned.plan
        self.loaded = loaded
        self._tasks = tasks
        self._on_event = on_event
        # All mutable state. `requests` has every prepared request that has not ended; `sweep` is the one that runs now;
        # `_forwards_first` says that the last sweep had no room for forward passes; `_resizes` are applied before the
        # next sweep; `_work` wakes the loop; `acceptance` is how often drafts were right; and counts.
        self.requests: dict[str, Request] = {}
        self.preparations = Preparations()
        traits = None if loaded.turns is None else loaded.turns.traits
        fits = None if loaded.planned.probe.images is None else loaded.planned.fits
        self.scheduler = Scheduler(
            plan.tokens_by_outputs, plan.max_sequences, loaded.times, loaded.draft_model, traits=traits, fits=fits
        )
        self.admission = Admission(
            blocks=loaded.blocks,
            turn_caches=loaded.turn_caches,
            kv_memory=loaded.kv_memory,
            parking=loaded.parking,
            scheduler=self.scheduler,
            tasks=tasks,
            max_sequences=plan.max_sequences,
            max_waiting=config.max_waiting,
            trace=loaded.trace,
        )
        self.forwards = ForwardQueue()
        self.sweep: Sweep | None = None
        self._forwards_first = False
        self.acceptance = AcceptanceRates()
        self.lag = LoopLag()
        self._resizes = Resizes()
        self._listener_error: Exception | None = None
        self._work = anyio.Event()
        self.num_tokens = self.num_prompt_tokens = 0
        self.num_drafted = self.num_accepted = 0

    # --- the loop ---

    async def run(self) -> None:
        """Runs sweeps while there are jobs, and otherwise waits for some; never returns.

        Raises:
            Exception: The user's `on_event`, the model or a library raised it. The engine fails.

        Cancellation: ends within one stage; `end` must follow.
        """
        self._tasks.start_soon(self._admit_requests)
        while True:
            if await self._resizes.apply(self.loaded):
                self.admission.check_again()
            await self._return_loans()
            generation, forwards = self.schedule()
            if not generation and not forwards:
                self.lag.pause()
                await self._wait_for_work()
                continue
            self.lag.begin()
            self.sweep = Sweep(self.loaded, generation, forwards)
            outcomes = await self.sweep.run()
            self.deliver(self.sweep, outcomes)
            self.sweep = None
            if self.loaded.trace is not None:
                self.loaded.trace.count("KV", bytes=self.loaded.kv_bytes)
            if self.admission.num_waiting:
                await self.admission.settle()

    def schedule(self) -> tuple[list[GenerationJob], list[ForwardJob]]:
        """The jobs of the next sweep: tokens of requests, and as many forward passes as fit beside them.

        If none fits, the following sweep is for forward passes alone.
        """
        if self._listener_error is not None:
            raise self._listener_error
        planned = self.loaded.planned
        generation = [] if self._forwards_first else self.scheduler.schedule()
        num_tokens, nbytes = planned.plan.max_tokens_per_sweep, planned.plan.workspace_bytes
        if generation and self.forwards:
            num_tokens -= sum(job.num_tokens for job in generation)
            nbytes -= planned.workspace_of(generation)
        forwards = self.forwards.take(num_tokens, nbytes)
        self._forwards_first = bool(generation and self.forwards and not forwards)
        return generation, forwards

    def deliver(self, sweep: Sweep, outcomes: SweepOutcomes) -> None:
        """Sends users the outcomes of a sweep, and ends the requests and passes that are done."""
        for outcome in outcomes.generated:
            try:
                with one_request("the delivery of tokens"):
                    self._deliver(outcome)
            except RequestError as error:
                self.finish(outcome.job.request, error)
        for job in sweep.generation:
            if job.request.aborted or outcomes.error is not None:
                self.finish(job.request, None if job.request.aborted else outcomes.error)
        self._deliver_forwards(sweep.forwards, outcomes.error)
        self.admission.wake()  # a request may have paused, which frees its place

    async def _wait_for_work(self) -> None:
        self._work = anyio.Event()
        self.loaded.kv_memory.set_when_wanted_back(self._work)
        await self._work.wait()
        # Requests that are made at the same time share the first sweep, unless a prompt takes long to tokenize.
        with anyio.move_on_after(_SHARING_SECONDS):
            await self.preparations.wait()
        await anyio.lowlevel.checkpoint()
        await self.admission.settle()

    # --- requests ---

    def check_new(self, request_id: str) -> None:
        """Refuses a request whose id is in use, or that finds the queue full.

        Raises:
            RequestError: Another request with this id has not ended.
            QueueFullError: `max_waiting` requests wait already, those in preparation included.
        """
        if request_id in self.requests or self.preparations.is_under_way(request_id):
            raise RequestError(f"request_id {request_id!r} is in use by a request that has not ended")
        try:
            self.admission.check_room(self.preparations.num_requests)
        except QueueFullError as error:
            at, usage, timings = time.perf_counter(), Usage(0, 0), Timings(0.0, 0.0, 0.0, 0.0)
            self._tell_event(RequestEvent("queued", request_id, at, usage, timings))
            self._tell_event(RequestEvent("finished", request_id, at, usage, timings, error=error))
            raise

    def submit(self, request: Request, deadline: float | None) -> None:
        """Takes a prepared request; `next_chunk` gives its chunks."""
        self.requests[request.request_id] = request
        self._tell("queued", request)
        if deadline is not None:
            self._tasks.start_soon(self._watch_deadline, request, deadline)
        try:
            self.admission.submit(request)
        except RequestError as error:
            self.finish(request, error)

    async def _admit_requests(self) -> None:
        """Runs as a task, and admits requests."""
        while True:
            request, error = await self.admission.next()
            if error is not None:
                self.finish(request, error)
            elif request.state is RequestState.RESTORING:
                self._tasks.start_soon(self._restore, request)
            else:
                self._start(request)

    async def _restore(self, request: Request) -> None:
        error = await self.admission.restore(request)
        if error is not None:
            self.finish(request, error)
        elif not request.ended:
            self._start(request)

    def _start(self, request: Request) -> None:
        self.scheduler.add(request)
        self._work.set()
        self._tell("admitted", request)

    async def _watch_deadline(self, request: Request, deadline: float) -> None:
        with anyio.move_on_after(deadline - anyio.current_time()):
            await request.released.wait()
            return
        if not request.ended:
            request.error = DeadlineExceededError(
                f"the request did not end before its deadline; {format_count(request.num_output_tokens, 'token')} came"
            )
            self.abort(request)
            request.send.close()  # the user gets the error at once, although a sweep may still use the KV

    async def next_chunk(self, request: Request) -> Chunk | None:
        """Waits for the next chunk; None after the last one.

        Raises:
            HermesError: The request ended early.
        """
        try:
            chunk = await request.receive.receive()
        except anyio.EndOfStream:
            if request.error is not None:
                raise request.error from request.error.__cause__
            return None
        self._work.set()  # the request may have been paused
        if request.told_paused and not request.paused:
            request.told_paused = False
            if not request.ended:
                self._tell("resumed", request)
        return chunk

    def leave(self, request: Request) -> None:
        """Ends a request whose user reads no more chunks."""
        self.abort(request)
        request.receive.close()

    def abort(self, request: Request) -> None:
        """Ends a request, at once or when no thread uses its KV any more."""
        if request.ended or request.aborted:
            return
        if self.sweep is not None and self.sweep.uses(request):
            sweep = self.sweep
            request.enter(RequestState.LEAVING)
            if sweep.drop(request):
                self._tasks.start_soon(self._finish_when_left, request, sweep)
            else:
                self.finish(request)
        else:
            self.finish(request)

    async def _finish_when_left(self, request: Request, sweep: Sweep) -> None:
        await sweep.wait_left(request)
        self.finish(request)

    def finish(self, request: Request, error: HermesError | None = None) -> None:
        """Frees all that the request holds, and ends its stream. Only a read from disk may still use its KV."""
        if request.ended:
            return
        request.enter(RequestState.ENDED)
        del self.requests[request.request_id]
        self.scheduler.remove(request)
        self.admission.give_back(request)
        if self.loaded.draft_model is not None:
            self.loaded.draft_model.forget(request)
        request.error = error or request.error
        request.finished_at = time.perf_counter()
        if request.finish_reason is None and request.error is None:
            self._send(request, Chunk("", (), "abort"))
        self._tell("finished", request)
        log_finished(request)
        request.send.close()
        request.released.set()

    def _deliver(self, outcome: Outcome) -> None:
        job, request = outcome.job, outcome.job.request
        if request.ended:
            return
        tokens = tuple(sampled.token_id for sampled in outcome.sampled)
        request.num_sweeps += 1
        self.num_prompt_tokens += outcome.num_prompt_tokens
        request.token_ids += tokens
        assert request.reservation is not None
        request.reservation.advance(outcome.length, request.token_ids)
        if request.aborted:
            return
        if job.num_drafted:
            # The last token was not drafted, unless an error came in its place.
            self._count_drafts(job, len(tokens) - (outcome.error is None))
        if tokens:
            self._deliver_tokens(outcome, tokens)
        if outcome.error is not None or outcome.finish_reason is not None:
            self.finish(request, outcome.error)
        elif tokens and request.paused:
            request.told_paused = True
            self._tell("paused", request)

    def _deliver_tokens(self, outcome: Outcome, tokens: tuple[int, ...]) -> None:
        request = outcome.job.request
        self.num_tokens += len(tokens)
        if request.prepared.lookup is not None:
            request.prepared.lookup.extend(tokens)
        if request.first_token_at == 0:
            request.first_token_at = time.perf_counter()
            self._tell("first_token", request)
        if outcome.finish_reason is not None:
            request.finished_at = time.perf_counter()
        logprobs = outcome.sampled if request.params.logprobs is not None else ()
        self._send(request, Chunk(outcome.text, tokens, outcome.finish_reason, logprobs))

    def _count_drafts(self, job: GenerationJob, num_accepted: int) -> None:
        job.request.num_drafted += job.num_drafted
        job.request.num_accepted += num_accepted
        self.num_drafted += job.num_drafted
        self.num_accepted += num_accepted
        job.request.prepared.acceptance.record(job.match_length, job.num_drafted, num_accepted)

    def _send(self, request: Request, chunk: Chunk) -> None:
        request.finish_reason = chunk.finish_reason
        if chunk.finish_reason is not None:
            chunk = replace(chunk, usage=request.usage(), timings=request.timings())
        with contextlib.suppress(anyio.BrokenResourceError):  # the user has closed the stream, and `leave` follows
            request.send.send_nowait(replace(chunk, request_id=request.request_id))

    # --- forward passes ---

    async def forward(self, job: ForwardJob) -> Any:
        """Waits for a forward pass and returns its result.

        Raises:
            RequestError: The model's forward does not run on these inputs.
            ReadError: Weights could not be read; the engine goes on.

        Cancellation: the pass ends before its next stage.
        """
        self.forwards.add(job)
        self._work.set()
        try:
            await job.done.wait()
        finally:
            if not job.done.is_set():
                job.call.dropped = True
                self.forwards.discard(job)
                if self.sweep is not None and job in self.sweep.forwards:
                    self.sweep.drop_forward(job)
        if job.error is not None:
            raise job.error from job.error.__cause__
        return job.call.result

    def _deliver_forwards(self, jobs: Sequence[ForwardJob], error: HermesError | None) -> None:
        name = type(self.loaded.planned.skeleton.model).__name__
        not_run: list[ForwardJob] = []
        for job in jobs:
            if job.call.completed or job.call.dropped or job.call.error is not None:
                job.end(forward_error(job, name))
            elif error is not None:
                job.end(error)
            else:  # the sweep was abandoned before it computed anything
                not_run.append(job)
        self.forwards.put_back(not_run)

    # --- resizes ---

    async def resize(self, budget: int) -> None:
        """Waits until the sweep has ended and the budget is changed.

        Raises:
            MemoryBudgetError: As `LoadedModel.resize`.

        Cancellation: a resize that has begun goes on; one that has not never begins.
        """
        resize = self._resizes.add(budget)
        self._work.set()
        await self._resizes.wait(resize)

    async def _return_loans(self) -> None:
        """Takes back the KV memory that the first request waits for, if it is lent to weights."""
        while self.admission.short_of_kv is not None:
            try:
                if not await self.loaded.lending.return_kv():
                    return
            except ReadTimeoutError as error:
                if (request := self.admission.short_of_kv) is not None:
                    self.finish(request, error)
            await self.admission.settle()

    # --- the end, events and counts ---

    def end(self, error_of: Callable[[str], HermesError]) -> None:
        """Ends all requests, passes and preparations. Call it when the sweep and all tasks have ended.

        Args:
            error_of: Makes the error for users from what was under way, such as "while the request was running".
        """
        for request in list(self.requests.values()):
            self.finish(request, error_of("while the request was running"))
        for job in () if self.sweep is None else self.sweep.forwards:
            job.end(error_of("while the forward pass was running"))
        self.forwards.end_all(error_of("while the forward pass was running"))
        self.preparations.end(error_of("while the request was prepared"))
        self._resizes.end_all(error_of("before it was resized"))
        self.admission.close()
        self.lag.pause()

    def _tell(self, kind: EventKind, request: Request) -> None:
        if self._on_event is not None:
            usage, timings, at = request.usage(), request.timings(), time.perf_counter()
            event = RequestEvent(kind, request.request_id, at, usage, timings)
            self._tell_event(replace(event, finish_reason=request.finish_reason, error=request.error))

    def _tell_event(self, event: RequestEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:  # this may be a user's task: `schedule` raises the error, which ends the engine
            self._listener_error = self._listener_error or error
            self._work.set()
