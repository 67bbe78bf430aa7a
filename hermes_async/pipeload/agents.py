"""The agents of PIPELOAD: loading agents read stages, the inference agent computes them, the daemon agent frees them.

Source: Hermes (arXiv 2409.04249), section III (PIPELOAD: Loading Agent, Inference Agent, Daemon Agent).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.from_thread
import anyio.lowlevel
from anyio.lowlevel import EventLoopToken

from hermes_async.errors import ReadError
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.pipeload.load_order import LoadOrder
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.pipeload.trace import WAITS_FOR_MEMORY, AgentTrace
from hermes_async.storage.buffers import Buffer, BufferPool
from hermes_async.storage.interpreter_exit import when_interpreter_exits
from hermes_async.storage.reader import Reader
from hermes_async.storage.threads import LoopEvent, only_waiting, run_in_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


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
    trace: AgentTrace

    def free(self, stage: Stage) -> None:
        """Makes a stage EMPTY. The lease of a streamed stage goes back to the governor, which wakes who waits for it.

        No thread may still write to the stage's buffer or compute with it.
        """
        started = time.perf_counter()
        buffer, lease = stage.clear()
        if lease is None:
            buffer.close()
        else:
            self.buffers.release(buffer)
            lease.release()
        self.trace.span("daemon agent", f"free {stage.label}", started)
        self.trace.add_weights(-stage.layout.weight_bytes)

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
        self, order: LoadOrder, daemon_agent: DaemonAgent, statistics: PipelineStatistics, trace: AgentTrace
    ) -> None:
        self._order = order
        self._daemon_agent = daemon_agent
        self._statistics = statistics
        self._trace = trace
        # All mutable state. The compute thread waits on `_changed` for all that it waits for: the next sweep or the
        # end, a stage that is READY, `_abandoned` or `_look`. `_loop` and `_token` are the event loop, once it runs.
        # `computing` is the stage that is computed now, for snapshots; the compute thread sets it.
        self._changed = threading.Condition()
        self._sweep: Sweep | None = None
        self._is_closed = False
        self._abandoned = False
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
        self._abandoned = False
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
        with only_waiting(), self._changed:
            self._changed.wait_for(lambda: self._sweep is not None or self._is_closed)
            sweep, self._sweep = self._sweep, None
            return sweep

    def enter(self, stage: Stage) -> Buffer | None:
        """See `Pipeline.enter`."""
        self.computing = None
        self._trace.end_computing()
        self._check_abandoned()
        if stage.state is not StageState.READY or not self._order.is_next(stage):
            started = time.perf_counter()
            is_ready = self._wait_ready(stage)
            self._statistics.stall_seconds += time.perf_counter() - started
            self._trace.span("inference agent", f"wait for {stage.label}", started)
            self._check_abandoned()
            if not is_ready:
                return None
        self._order.enter(stage)
        if stage.error is not None:
            raise stage.error
        self._trace.begin_computing(stage.label)
        self.computing = stage
        return stage.loaded

    def leave(self, stage: Stage) -> None:
        """See `Pipeline.leave`. Tells the daemon agent, and does not wait for it."""
        self.computing = None
        self._trace.end_computing()
        if not stage.resident:
            stage.spend()
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop was closed: nobody waits
                self._loop.call_soon_threadsafe(self._daemon_agent.free, stage)

    def _wait_ready(self, stage: Stage) -> bool:
        """Whether it is READY; False after a `look` or when the sweep was abandoned."""
        if not self._order.is_next(stage):
            self.call_on_loop(self._reorder, stage)
        with only_waiting(), self._changed:
            self._changed.wait_for(lambda: self._look or self._abandoned or stage.state is StageState.READY)
            was_look, self._look = self._look, False
            return not was_look and stage.state is StageState.READY

    def _reorder(self, stage: Stage) -> None:
        self._daemon_agent.free_all(self._order.reorder(stage))

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise SweepAbandoned

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

        Cancellation: waits for the read that is under way, and frees the stage.
        """
        while True:
            stage = await self._claim()
            error: ReadError | None = None
            try:
                on_read = self.trace.read_callback(stage.label, stage.layout.read_bytes)
                await reader.read(stage.layout.ranges, stage.loaded.view, on_read)
            except ReadError as read_error:
                error = read_error
            except BaseException:
                self.daemon_agent.free(stage)
                raise
            if stage.stale:  # never READY, not even for a moment: the compute thread would take the buffer
                self.daemon_agent.free(stage)
            else:
                stage.set_ready(error)
                self.inference_agent.notify()

    async def _claim(self) -> Stage:
        """Waits for the next stage to load and for its place; returns the stage, which is LOADING then.

        Cancellation: takes nothing.
        """
        async with self.turn:
            while True:
                with self.order.choice() as choice:
                    stage = self.order.next_stage()
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
