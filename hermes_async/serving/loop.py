"""Between a request that was made and the chunks that its user takes: the queue, the sweeps, the delivery."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import anyio
import anyio.abc
import anyio.lowlevel

from hermes_async.config import EngineConfig, format_count
from hermes_async.errors import DeadlineExceededError, EngineClosedError, HermesError, QueueFullError, RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.memory.available import process_peak_rss_bytes
from hermes_async.pipeload.pipeline import SweepAbandoned
from hermes_async.results import Chunk, EngineStatistics, EventKind, RequestEvent, Timings, Usage
from hermes_async.serving.admission import Admission
from hermes_async.serving.forward import Forwarding
from hermes_async.serving.loaded_model import LoadedModel
from hermes_async.serving.preparations import Preparations
from hermes_async.serving.request import Request
from hermes_async.serving.scheduler import Scheduled, Scheduler
from hermes_async.serving.speculation import AcceptanceRates
from hermes_async.serving.sweep import Outcome

_SECONDS_TO_SHARE = 0.02  # that the first sweep after an idle moment waits for prompts that are being tokenized


@dataclass(eq=False, slots=True)
class _Resize:
    """Another budget, and whoever waits for it."""

    budget: int
    done: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | None = None

    async def run(self, running: LoadedModel) -> None:
        try:
            await running.resize(self.budget)
        except HermesError as error:
            self.error = error
        except BaseException:
            self.error = EngineClosedError("the engine was left while it was resized")
            raise
        finally:
            self.done.set()

    def end(self, error: HermesError) -> None:
        self.error = error
        self.done.set()


class Serving:
    """Serves requests with a model that runs. Event-loop side only.

    Args:
        tasks: Owns the tasks that watch deadlines and park sessions.
        on_event: Told of each step of each request.
    """

    def __init__(
        self,
        running: LoadedModel,
        tasks: anyio.abc.TaskGroup,
        config: EngineConfig,
        on_event: Callable[[RequestEvent], None] | None,
    ) -> None:
        plan = running.opened.plan
        self.running = running
        self._tasks = tasks
        self._on_event = on_event
        # All mutable state. `_resizes` are done before the next sweep; `requests` holds every request that has not
        # ended, once it is prepared; `_work` wakes the sweeps; `acceptance` is what drafts were worth; and counts.
        self.requests: dict[str, Request] = {}
        self.preparations = Preparations()
        self.scheduler = Scheduler(
            plan.tokens_by_outputs,
            plan.max_sequences,
            running.times,
            running.blocks.skip_computed,
            running.draft_model,
        )
        self.admission = Admission(
            running.blocks,
            running.parking,
            tasks,
            max_sequences=plan.max_sequences,
            max_waiting=config.max_waiting,
            num_active=lambda: self.scheduler.num_active,
            admitted=self._admitted,
            ended=self.finish,
        )
        self.forwarding = Forwarding(running.model, running.pipeline, running.rows, plan, lambda: self._work.set())
        self.acceptance = AcceptanceRates()
        self._resizes: deque[_Resize] = deque()
        self._listener_error: Exception | None = None
        self._work = anyio.Event()
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_accepted = 0

    async def resize(self, budget: int) -> None:
        """Waits for the running sweep to end, and for the memory to be taken or given back.

        Raises:
            MemoryBudgetError, ReadError: As `LoadedModel.resize`.

        Cancellation: what has begun goes on; what has not never will.
        """
        resize = _Resize(budget)
        self._resizes.append(resize)
        self._work.set()
        try:
            await resize.done.wait()
        finally:
            if resize in self._resizes:
                self._resizes.remove(resize)
        if resize.error is not None:
            raise resize.error from resize.error.__cause__

    def end_resizes(self, error: HermesError) -> None:
        while self._resizes:
            self._resizes.popleft().end(error)

    def statistics(self) -> EngineStatistics:
        """Counts so far."""
        running, pipeline, blocks = self.running, self.running.pipeline, self.running.blocks
        memory, admission, scheduler = running.governor.statistics(), self.admission, self.scheduler
        return EngineStatistics(
            bytes_read=pipeline.read_statistics.bytes_read,
            bytes_resident=running.opened.plan.resident_bytes,
            bytes_in_use=memory.bytes_in_use,
            peak_bytes_in_use=memory.peak_bytes_in_use,
            memory_budget=memory.budget_bytes,
            baseline_bytes=running.opened.baseline_bytes,
            # Linux brings the peak up to date only now and then, and the baseline may be above it.
            process_peak_rss_bytes=max(process_peak_rss_bytes(), running.opened.baseline_bytes),
            sweeps=pipeline.statistics.sweeps,
            tokens_generated=self.num_tokens,
            drafted_tokens=self.num_drafted,
            accepted_tokens=self.num_accepted,
            tokens_per_sweep=self.num_tokens / max(1, pipeline.statistics.sweeps),
            read_seconds=pipeline.read_statistics.seconds,
            compute_seconds=pipeline.statistics.compute_seconds,
            stall_seconds=pipeline.statistics.stall_seconds,
            num_running=len(scheduler.running) + admission.num_loading,
            num_paused=len(scheduler.running) - scheduler.num_active,
            num_waiting=admission.num_waiting + self.preparations.num_requests,
            num_sessions=admission.num_sessions,
            num_parked=admission.num_parked,
            num_parkings=admission.num_parkings,
            num_forwards=self.forwarding.num_under_way,
            kv_bytes=blocks.kv_bytes,
            prefix_bytes=blocks.unused_prefix_bytes,
            prefix_hits=blocks.num_hits,
            prefix_tokens=blocks.num_hit_tokens,
            num_leases=memory.num_leases,
            num_free_buffers=running.ring.statistics().num_free,
            holders=memory.holders,
        )

    # --- a request's way: submitted, running, finished ---

    def check_new(self, request_id: str) -> None:
        """Refuses a request whose name is in use, or that would have to wait where no more may.

        Raises:
            RequestError: Another request of this name has not ended.
            QueueFullError: As many wait as may, those included that are being prepared.
        """
        if request_id in self.requests or self.preparations.is_under_way(request_id):
            raise RequestError(f"request_id {request_id!r} is in use by a request that has not ended")
        try:
            self.admission.check_room(self.preparations.num_requests)
        except QueueFullError as error:
            at, usage, timings = time.perf_counter(), Usage(0, 0), Timings(0.0, 0.0, 0.0, 0.0)
            self._tell_event(RequestEvent("queued", request_id, at, usage, timings, None, None))
            self._tell_event(RequestEvent("finished", request_id, at, usage, timings, None, error))
            raise

    def submit(self, request: Request, deadline: float | None) -> None:
        self.requests[request.request_id] = request
        self._tell("queued", request)
        if deadline is not None:
            self._tasks.start_soon(self._watch_deadline, request, deadline)
        try:
            self.admission.submit(request)
        except RequestError as error:
            self.finish(request, error)

    async def _watch_deadline(self, request: Request, deadline: float) -> None:
        with anyio.move_on_after(deadline - anyio.current_time()):
            await request.released.wait()
            return
        if self._is_under_way(request):
            request.error = DeadlineExceededError(
                f"the request did not end before its deadline; {format_count(request.num_output_tokens, 'token')} came"
            )
            self.abort(request)
            request.send.close()  # its user is told at once, although a sweep may still use its memory

    def _admitted(self, request: Request) -> None:
        self.scheduler.add(request)
        self._work.set()
        self._tell("admitted", request)

    async def next_chunk(self, request: Request) -> Chunk | None:
        try:
            chunk = await request.receive.receive()
        except anyio.EndOfStream:
            if request.error is not None:
                raise request.error from request.error.__cause__
            return None
        # It may have been passed over while this waited its turn to take the chunk.
        self._work.set()
        if request.told_paused and not request.paused:
            request.told_paused = False
            if self._is_under_way(request):
                self._tell("resumed", request)
        return chunk

    def leave(self, request: Request) -> None:
        """Its user is gone."""
        self.abort(request)
        request.receive.close()

    def abort(self, request: Request) -> None:
        if self._is_under_way(request):
            request.aborted = True
            in_use = self.running.runner.abort(request)
            if not in_use and not self.admission.is_loading(request):
                self.finish(request)

    def finish(self, request: Request, error: HermesError | None = None) -> None:
        """Gives back all that the request holds and ends its stream. No thread may still use its KV."""
        if not self._is_under_way(request):
            return
        del self.requests[request.request_id]
        self.scheduler.remove(request)
        self.admission.give_back(request)
        if self.running.draft_model is not None:
            self.running.draft_model.forget(request)
        request.error = error or request.error
        request.finished_at = time.perf_counter()
        if request.finish_reason is None and request.error is None:
            self._send(request, Chunk("", (), "abort"))
        self._tell("finished", request)
        request.send.close()
        request.released.set()
        self.admission.pump()

    def _send(self, request: Request, chunk: Chunk) -> None:
        request.finish_reason = chunk.finish_reason
        if chunk.finish_reason is not None:
            chunk = replace(chunk, usage=request.usage(), timings=request.timings())
        with contextlib.suppress(anyio.BrokenResourceError):  # its user left, and `_leave` sees to the rest
            request.send.send_nowait(replace(chunk, request_id=request.request_id))

    def _is_under_way(self, request: Request) -> bool:
        """Whether it has not ended; another request may have its name since."""
        return self.requests.get(request.request_id) is request

    def _tell(self, kind: EventKind, request: Request) -> None:
        if self._on_event is None:
            return
        usage, timings, at = request.usage(), request.timings(), time.perf_counter()
        self._tell_event(
            RequestEvent(kind, request.request_id, at, usage, timings, request.finish_reason, request.error)
        )

    def _tell_event(self, event: RequestEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:  # the sweeps raise it, and the engine ends; this may be a user's task
            self._listener_error = self._listener_error or error
            self._work.set()

    # --- the sweeps ---

    async def run_sweeps(self) -> None:
        """Runs sweeps for as long as there is anything to do, and waits for more; never returns.

        Where there are both, sweeps that generate and sweeps of plain forward passes take turns.
        """
        while True:
            if self._listener_error is not None:
                raise self._listener_error
            while self._resizes:
                await self._resizes.popleft().run(self.running)
                self.admission.pump()
            sweep, forwards = self.scheduler.schedule(), self.forwarding.take()
            if sweep:
                await self._run_sweep(sweep)
            if forwards:
                await self.forwarding.sweep(forwards)
            if self.running.trace is not None:
                self.running.trace.count("KV", bytes=self.running.blocks.kv_bytes)
            if not sweep and not forwards and not self._resizes:
                self._work = anyio.Event()
                await self._work.wait()
                # Requests made at the same time share the first sweep too, where their prompts take no time.
                with anyio.move_on_after(_SECONDS_TO_SHARE):
                    await self.preparations.wait()
                await anyio.lowlevel.checkpoint()

    async def _run_sweep(self, sweep: Sequence[Scheduled]) -> None:
        outcomes: list[Outcome] = []
        error: HermesError | None = None
        try:
            outcomes = await self.running.runner.run(sweep)
        except SweepAbandoned:
            pass
        except HermesError as read_error:
            error = read_error
        for outcome in outcomes:
            try:
                with one_request("the delivery of tokens"):
                    self._deliver(outcome)
            except RequestError as error_of_one:
                self.finish(outcome.item.request, error_of_one)
        for item in sweep:
            if item.request.aborted or error is not None:
                self.finish(item.request, None if item.request.aborted else error)
        self.admission.pump()

    def _deliver(self, outcome: Outcome) -> None:
        item, request = outcome.item, outcome.item.request
        if request.reservation is None:
            return
        tokens = tuple(sampled.token_id for sampled in outcome.sampled)
        request.num_sweeps += 1
        request.token_ids += tokens
        request.kv.length = outcome.length
        self.running.blocks.commit(request.reservation, request.token_ids)
        if request.aborted:
            return
        if item.num_drafted:
            # The last token is the one after the right drafts, unless there was an error in its place.
            self._count_drafts(item, len(tokens) - (outcome.error is None))
        if tokens:
            self._deliver_tokens(outcome, tokens)
        if outcome.error is not None or outcome.finish_reason is not None:
            self.finish(request, outcome.error)
        elif tokens and request.paused:
            request.told_paused = True
            self._tell("paused", request)

    def _deliver_tokens(self, outcome: Outcome, tokens: tuple[int, ...]) -> None:
        request = outcome.item.request
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

    def _count_drafts(self, item: Scheduled, num_accepted: int) -> None:
        request = item.request
        request.num_drafted += item.num_drafted
        request.num_accepted += num_accepted
        self.num_drafted += item.num_drafted
        self.num_accepted += num_accepted
        request.prepared.acceptance.record(item.match_length, item.num_drafted, num_accepted)
