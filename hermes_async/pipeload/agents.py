"""The agents of PIPELOAD: loading agents read stages, the inference agent computes them, the daemon agent frees them.

Source: Hermes (arXiv 2409.04249), section III (PIPELOAD: Loading Agent, Inference Agent, Daemon Agent).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.from_thread
import anyio.lowlevel
from anyio.lowlevel import EventLoopToken

from hermes_async.errors import HermesError, MemoryBudgetError, ReadError
from hermes_async.pipeload.expert_cache import ExpertCache
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.pipeload.load_order import LoadOrder
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.pipeload.trace import WAITS_FOR_MEMORY, AgentTrace
from hermes_async.storage.buffers import BufferPool
from hermes_async.storage.interpreter_exit import when_interpreter_exits
from hermes_async.storage.kernel_threads import end_kernel_threads
from hermes_async.storage.read_watch import ReadWatch
from hermes_async.storage.reader import Reader
from hermes_async.storage.threads import LoopEvent, only_waiting, run_in_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_SECONDS_UNTIL_IDLE = 0.005
"""A compute thread without a sweep for so long ends its kernel threads, which slow down other engines."""


class SweepAbandoned(BaseException):
    """Unwinds the compute thread from a sweep that nobody waits for any more; never leaves the engine.

    A BaseException, so that no `except Exception` of a model's forward catches it.
    """


@dataclass(slots=True)
class PipelineStatistics:
    """Of all sweeps so far.

    Attributes:
        sweeps: How many ended well.
        stall_seconds: The compute thread waited for a stage.
    """

    sweeps: int = 0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class DaemonAgent:
    """Frees stages: gives their memory back, which lets the next load in. Works on the event loop.

    Source: Hermes, section III: the Daemon Agent destroys computed layers and watches the memory.
    """

    buffers: BufferPool
    experts: ExpertCache
    trace: AgentTrace

    def free(self, stage: Stage) -> None:
        """Makes a stage EMPTY. The lease of a streamed stage goes back to the governor, which wakes who waits for it.

        No thread may still write to the stage's buffer or compute with it.
        """
        started = time.perf_counter()
        buffer, lease = stage.clear()
        if lease is not None:
            lease.release()
        if stage.is_expert:
            self.experts.give_back(stage, buffer)
        elif lease is None:
            buffer.close()
        else:
            self.buffers.release(buffer)
        self.trace.span("daemon agent", f"free {stage.label}", started)
        add_bytes = self.trace.add_expert if stage.is_expert else self.trace.add_weights
        add_bytes(-stage.layout.weight_bytes)

    def free_all(self, stages: Iterable[Stage]) -> None:
        """Frees each of these stages."""
        for stage in stages:
            self.free(stage)


class InferenceAgent:
    """Computes all sweeps on one thread, and waits there for each stage.

    Another thread would have kernel threads of its own, and those that are idle slow down those that compute. A stage
    that is READY is entered without asking the event loop.

    Source: Hermes, section III: the Inference Agent computes layers in order, as they become ready.
    """

    def __init__(
        self,
        order: LoadOrder,
        daemon_agent: DaemonAgent,
        statistics: PipelineStatistics,
        trace: AgentTrace,
        watch: ReadWatch,
    ) -> None:
        self._order = order
        self._experts = daemon_agent.experts
        self._daemon_agent = daemon_agent
        self._statistics = statistics
        self._trace = trace
        self._watch = watch
        # All mutable state. The compute thread waits on `_changed` for all that it waits for: the next sweep or the
        # end, a stage that is READY, `_abandoned` or `_look`. `_error` is what an abandoned sweep raises, if it is an
        # error. `_loop` and `_token` are the event loop, once it runs. `computing` is the stage that is computed now,
        # for snapshots; the compute thread sets it.
        self._changed = threading.Condition()
        self._sweep: Sweep | None = None
        self._is_closed = False
        self._abandoned = False
        self._error: HermesError | None = None
        self._look = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._token: EventLoopToken | None = None
        self.computing: Stage | None = None

    # --- on the event loop ---

    async def run(self) -> None:
        """Computes sweeps until `close`."""
        when_interpreter_exits(self)
        self._loop, self._token = asyncio.get_running_loop(), anyio.lowlevel.current_token()
        await run_in_thread(self._compute_sweeps)

    def start(self, sweep: Sweep) -> None:
        """Has a sweep computed; no other may be under way."""
        end_kernel_threads()  # this thread's, which the application may have made
        self._abandoned, self._error = False, None
        self._sweep = sweep
        self.notify()

    def notify(self) -> None:
        """Lets the compute thread see what has changed. May be called by any thread."""
        with self._changed:
            self._changed.notify_all()

    def end_sweep(self) -> None:
        """The sweep has ended, so no stage is computed. Only `leave` knows of the end of a stage, and not of all."""
        self.computing = None
        self._trace.end_computing()

    def abandon(self) -> None:
        """Ends the running sweep at its next stage. May be called by any thread."""
        self._abandoned = True
        self.notify()

    def fail(self, error: HermesError) -> None:
        """Ends the running sweep with an error at its next stage; its calls raise it."""
        self._error = error
        self.abandon()

    def look(self) -> None:
        """Ends the wait for a stage, if there is one now, or else the next one. May be called by any thread."""
        self._look = True
        self.notify()

    def close(self) -> None:
        """Ends `run`, and the running sweep at its next stage."""
        self._is_closed = True
        self.abandon()

    interpreter_exits = abandon  # nothing is computed from then on

    # --- on the compute thread ---

    def _compute_sweeps(self) -> None:
        while (sweep := self._next_sweep()) is not None:
            sweep.run()

    def _next_sweep(self) -> Sweep | None:
        """Waits for the next sweep; None at the end."""
        if not self._wait_for_sweep(_SECONDS_UNTIL_IDLE):
            end_kernel_threads()
            self._wait_for_sweep()
        with self._changed:
            sweep, self._sweep = self._sweep, None
            return sweep

    def _wait_for_sweep(self, seconds: float | None = None) -> bool:
        """Waits for a sweep or the end; returns whether one came in time."""
        with only_waiting(), self._changed:
            return self._changed.wait_for(lambda: self._sweep is not None or self._is_closed, seconds)

    def enter(self, stages: Sequence[Stage]) -> Stage | None:
        """See `Pipeline.enter`."""
        self.computing = None
        self._trace.end_computing()
        self._check_abandoned()
        stage = self._ready(stages)
        if stage is None:
            started = time.perf_counter()
            try:
                stage = self._wait_ready(stages)
            finally:
                self._statistics.stall_seconds += time.perf_counter() - started
                self._trace.span("inference agent", f"wait for {stages[0].label}", started)
            self._check_abandoned()
            if stage is None:
                return None
        if not stage.is_expert:
            self._order.enter(stage)
        if stage.error is not None:
            raise stage.error
        self._trace.begin_computing(stage.label)
        self.computing = stage
        return stage

    def leave(self, stage: Stage) -> None:
        """See `Pipeline.leave`. Tells the daemon agent, and does not wait for it."""
        self.computing = None
        self._trace.end_computing()
        if stage.is_expert:
            self._choose_again(self._experts.leave(stage))
        elif not stage.resident:
            stage.spend()
            self._tell(self._daemon_agent.free, stage)

    def ask(self, experts: Sequence[Stage]) -> None:
        """See `Pipeline.ask`."""
        self._choose_again(self._experts.ask(experts))

    def forget(self, experts: Sequence[Stage]) -> None:
        """See `Pipeline.forget`."""
        self._choose_again(self._experts.forget(experts))

    def _choose_again(self, has_more: bool) -> None:
        """Lets the loading agents see that there may be an expert to read, or a place for it."""
        if has_more:
            self._tell(self._order.choose_again)

    def _tell(self, function: Callable[[Unpack[Ts]], object], *args: *Ts) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(function, *args)

    def _ready(self, stages: Sequence[Stage]) -> Stage | None:
        """One that can be entered now."""
        for stage in stages:
            # The cache is asked first: an expert that it holds is not freed meanwhile.
            may_enter = self._experts.holds(stage) if stage.is_expert else self._order.is_next(stage)
            if may_enter and stage.state is StageState.READY:
                return stage
        return None

    def _wait_ready(self, stages: Sequence[Stage]) -> Stage | None:
        """The first that is READY; None after a `look` or when the sweep was abandoned.

        Raises:
            ReadTimeoutError: None came in time, and a read is overdue. It goes on: its stage is LOADING until its
                thread has returned.
        """
        if not (stages[0].is_expert or self._order.is_next(stages[0])):
            self.call_on_loop(self._reorder, stages[0])
        seconds = self._watch.timeout
        while not self._wait_for_change(stages, seconds):
            error = self._watch.overdue()
            if error is not None:
                raise error
            seconds = self._watch.seconds_left()
        was_look, self._look = self._look, False
        return None if was_look else self._ready(stages)

    def _wait_for_change(self, stages: Sequence[Stage], seconds: float | None) -> bool:
        """Waits until a stage is READY, for a `look`, or until the sweep was abandoned; False if time was up."""
        with only_waiting(), self._changed:
            return self._changed.wait_for(
                lambda: self._look or self._abandoned or self._ready(stages) is not None, seconds
            )

    def _reorder(self, stage: Stage) -> None:
        self._daemon_agent.free_all(self._order.reorder(stage))

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise self._error or SweepAbandoned

    def call_on_loop(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Calls `function` on the event loop, and waits for it."""
        with only_waiting():
            return anyio.from_thread.run_sync(function, *args, token=self._token)


@dataclass(eq=False, slots=True)
class Sweep:
    """What the inference agent is to compute, and then what came of it. Made on the event loop."""

    compute: Callable[[], Any]
    done: LoopEvent = field(default_factory=LoopEvent)
    result: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        """Sets `result` or `error`, and `done`; called by the inference agent."""
        try:
            self.result = self.compute()
        except BaseException as error:  # raised again where the sweep is awaited
            self.error = error
        self.done.set()


@dataclass(frozen=True, eq=False, slots=True)
class LoadingAgents:
    """Read stages in the load order, each into a place that the governor has granted.

    All run the same task. One at a time chooses a stage and waits for its place, so places are granted in the order in
    which stages are needed.

    Attributes:
        ring: Grants the places of streamed stages.
        buffers: The memory of those places: one is free for each lease of the ring.
        turn: Of the agent that chooses a stage and waits for its place.

    Source: Hermes, section III: several Loading Agents read layers in parallel, while memory allows.
    """

    order: LoadOrder
    ring: MemoryGovernor
    buffers: BufferPool
    inference_agent: InferenceAgent
    daemon_agent: DaemonAgent
    trace: AgentTrace
    turn: anyio.Lock = field(default_factory=lambda: anyio.Lock(fast_acquire=True))

    async def run(self, reader: Reader) -> None:
        """One loading agent: reads one stage after another.

        Cancellation: waits for the read that is under way, and frees the stage. A read that hangs is given up.
        """
        while True:
            stage = await self._claim()
            error: ReadError | None = None
            try:
                on_read = self.trace.read_callback(stage.label, stage.layout.read_bytes)
                await reader.read(stage.layout.ranges, stage.loaded.view, on_read, kind=stage.read_kind)
            except ReadError as read_error:
                error = read_error
            except BaseException:
                self.daemon_agent.free(stage)
                raise
            if stage.stale or self._is_given_up(stage, error):
                self.daemon_agent.free(stage)  # never READY, not even for a moment: the compute thread would take it
            else:
                stage.set_ready(error)
                if stage.is_expert and error is None:
                    self.daemon_agent.experts.loaded(stage)
                self.inference_agent.notify()
            if stage.is_expert:
                self.order.choose_again()  # its place may be what another expert waits for

    def _is_given_up(self, stage: Stage, error: ReadError | None) -> bool:
        """Whether it is an expert whose read failed, and that no call needs."""
        return stage.is_expert and error is not None and not self.daemon_agent.experts.failed(stage)

    async def _claim(self) -> Stage:
        """Waits for the next stage to load and for its place; returns the stage, which is LOADING then.

        Cancellation: takes nothing.
        """
        async with self.turn:
            while True:
                with self.order.choice() as choice:
                    stage = self.order.next_stage()
                    expert = self._claimed_expert(stage)
                    if expert is not None:
                        return expert
                    if stage is None:
                        await anyio.sleep_forever()  # until the choice is cancelled
                        continue
                    lease = None if stage.resident else await self._wait_for_place(stage)
                    if lease is not None and choice.cancel_called:  # in the moment when the place was granted
                        lease.release()
                        continue
                    stage.start_loading(self.order.take(stage) or self.buffers.acquire_nowait(), lease)
                    self.trace.add_weights(stage.layout.weight_bytes)
                    return stage

    def _claimed_expert(self, stage: Stage | None) -> Stage | None:
        """An expert that is read before `stage`; it is LOADING then. None if there is none, or no place for it.

        Experts that a sweep has asked for are needed now. Those that it is expected to ask for are read while the ring
        is full.
        """
        experts = self.daemon_agent.experts
        if self.order.is_held_back:
            return None
        found = experts.next_asked()
        if found is None and (stage is None or not self.order.has_place(stage)):
            found = experts.next_expected()
        if found is None:
            return None
        expert, victims = found
        self.daemon_agent.free_all(victims)
        try:
            buffer, lease = experts.take(expert)
        except MemoryBudgetError as error:
            self.inference_agent.fail(error)
            return None
        expert.start_loading(buffer, lease)
        self.trace.add_expert(expert.layout.weight_bytes)
        self.trace.tell_experts()
        return expert

    async def _wait_for_place(self, stage: Stage) -> Lease:
        """Cancellation: takes nothing."""
        while stage.state is not StageState.EMPTY:  # a short cycle: it comes again before it was freed
            await stage.emptied.wait()
        nbytes = stage.layout.slot_bytes
        if self.ring.can_grant(nbytes):
            return self.ring.acquire_nowait(stage.label, nbytes)
        started = time.perf_counter()
        try:
            return await self.ring.acquire(stage.label, nbytes)
        finally:
            self.trace.span(WAITS_FOR_MEMORY, stage.label, started)
