"""PIPELOAD: resident stages loaded once, on the first sweep's way, the others cycling through a ring of buffers.

Source: Hermes (arXiv 2409.04249), sections III (PIPELOAD) and IV (Execution Engine).
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.from_thread
import anyio.lowlevel
from anyio.lowlevel import EventLoopToken

from hermes_async.errors import ReadError
from hermes_async.foreign_errors import ungrouped
from hermes_async.pipeload.load_order import LoadOrder
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.pipeload.sweep_work import SweepWork
from hermes_async.pipeload.trace import Trace
from hermes_async.storage.buffers import Buffer, BufferPool
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.tensor_spec import FileState
from hermes_async.storage.threads import DaemonExecutor, only_waiting, run_in_thread, when_interpreter_exits

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_CLAIMED_AHEAD = 1
"""Stages that are claimed besides those being read: a thread that is done has its next read, and does not wait for the
event loop to take its turn."""


class SweepAbandoned(BaseException):
    """Unwinds the compute thread from a sweep that nobody waits for any more; never leaves the engine.

    A BaseException, so that no `except Exception` of a model's forward holds it up.
    """


@dataclass(slots=True)
class PipelineStatistics:
    """Seconds of all sweeps so far: computing, and waiting for a stage (stalls); and how many sweeps ended well."""

    sweeps: int = 0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0


class Pipeline:
    """Keeps streamed stages coming, in the order the model computes them, sweep after sweep.

    Args:
        stages: All stages, in the order they are expected to be computed in.
        num_loading_agents: How many stages may be read at once.
        ring: The buffers that streamed stages pass through.
        statistics: Added to by the readers.
        direct: Read past the page cache where possible.
        pinned: Page-locked memory for resident stages.
        trace: Told of every load, wait, computation and free.
        file_states: What the stages' files must still be; see `Reader`.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        num_loading_agents: int,
        ring: BufferPool,
        statistics: ReadStatistics,
        direct: bool = True,
        pinned: bool = False,
        trace: Trace | None = None,
        file_states: Mapping[Path, FileState] | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self.statistics = PipelineStatistics()
        self.read_statistics = statistics
        self._ring = ring
        self._direct = direct
        self._num_loading_agents = num_loading_agents
        self._trace = trace
        self._file_states = file_states or {}
        # All mutable state. `load_order` says what is read next, and `_free_later` feeds the daemon.
        self.load_order = LoadOrder(self.stages, ring, self._free, pinned=pinned)
        self._free_later, self._to_free = anyio.create_memory_object_stream[Stage](float("inf"))
        self.failure: Exception | None = None  # what ended an agent that should have gone on
        self._abandoned = False
        self._look = False  # somebody was aborted while the compute thread may wait
        self._sweeps: queue.SimpleQueue[SweepWork | None] = queue.SimpleQueue()  # None ends the inference agent
        self._arrived = threading.Condition()  # for the compute thread: a load has ended, or the sweep was abandoned
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs, and the same for anyio
        self._token: EventLoopToken | None = None
        self._traced_bytes = 0  # of weights in memory or on their way there
        self._traced_stage: tuple[str, float] | None = None  # what is computed, and since when

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps the agents at work until the block is left; they begin to read at once.

        Raises:
            ReadError: A file could not be opened.
        """
        async with AsyncExitStack() as exits:
            exits.callback(self._free_later.close)
            exits.callback(self._to_free.close)
            executor = exits.enter_context(DaemonExecutor(self._num_loading_agents, "hermes-loading-agent"))
            files = sorted({item.file for stage in self.stages for item in stage.layout.ranges})
            reader = await exits.enter_async_context(
                Reader(files, executor, self.read_statistics, direct=self._direct, states=self._file_states)
            )
            exits.callback(self._ring.close)
            exits.callback(self._close_stages)
            self._loop, self._token = asyncio.get_running_loop(), anyio.lowlevel.current_token()
            when_interpreter_exits(self)
            with ungrouped():
                async with anyio.create_task_group() as agents:
                    agents.start_soon(self._run_agent, self._daemon_agent, name="hermes daemon agent")
                    agents.start_soon(self._run_agent, self._inference_agent, name="hermes inference agent")
                    for idx in range(self._num_loading_agents + _CLAIMED_AHEAD):
                        loading_agent = partial(self._loading_agent, reader)
                        agents.start_soon(self._run_agent, loading_agent, name=f"hermes loading agent {idx}")
                    try:
                        yield
                    finally:
                        self.abandon()
                        self._sweeps.put(None)
                        agents.cancel_scope.cancel()

    async def _run_agent(self, agent: Callable[[], Awaitable[None]]) -> None:
        try:
            await agent()
        except Exception as error:
            self.failure = self.failure or error
            raise

    async def wait_resident(self) -> None:
        """Waits until every resident stage is in memory.

        Raises:
            ReadError: One could not be read.
        """
        for stage in self.stages:
            while stage.resident and stage.state is not StageState.READY:
                await stage.ready.wait()
            if stage.resident and stage.error is not None:
                raise stage.error

    async def set_resident(self, resident: Collection[Stage], unbind: Callable[[Stage], None]) -> None:
        """Makes these stages the ones that stay, and streams all others; between sweeps only.

        Returns when those that no longer stay have given their memory back. Those that stay from now on are loaded
        next, as those that stay from the beginning are.

        Args:
            unbind: Takes a stage's weights out of the model.

        Cancellation: some stages stay, or are streamed, already, and the others are what they were.
        """
        leaving = [stage for stage in self.stages if stage.resident and stage not in resident]
        coming = [stage for stage in self.stages if not stage.resident and stage in resident]
        self.load_order.stream(stage for stage in self.stages if not stage.resident and stage not in coming)
        try:
            # What is not being read goes at once: so no agent takes a stage that is about to leave.
            for stage in sorted(leaving, key=lambda stage: stage.state is StageState.LOADING):
                while stage.state is StageState.LOADING:
                    await stage.ready.wait()
                unbind(stage)
                stage.resident = False
                self._unload(stage)
                self.load_order.find_missing()
            for stage in coming:
                while stage.state is not StageState.EMPTY:  # an agent still reads it, or the daemon has not freed it
                    await stage.emptied.wait()
                stage.resident = True
        finally:
            self.load_order.stream(stage for stage in self.stages if not stage.resident)

    @property
    def loads_resident(self) -> bool:
        """Whether any stage that stays is not in memory yet."""
        return any(stage.resident and stage.state is not StageState.READY for stage in self.stages)

    @property
    def streams(self) -> bool:
        """Whether a sweep reads any stage from disk."""
        return any(not stage.resident for stage in self.stages)

    # --- Loading Agents and Daemon Agent: tasks on the event loop ---

    async def _loading_agent(self, reader: Reader) -> None:
        """Reads what is needed next and has a place; only that there is none, or no thread free, holds it back."""
        while True:
            stage, buffer = await self.load_order.claim()
            error: ReadError | None = None
            try:
                await self._read(reader, stage, buffer)
            except ReadError as read_error:
                error = read_error
            except BaseException:
                self._drop(stage, buffer)
                raise
            if stage.stale:
                # Never READY, not even for a moment: the compute thread would take the buffer.
                self._drop(stage, buffer)
            else:
                stage.set_ready(buffer, error)
                self._tell_compute_thread()

    async def _read(self, reader: Reader, stage: Stage, buffer: Buffer) -> None:
        self._trace_bytes(stage.layout.weight_bytes)
        on_read = None if self._trace is None else partial(self._trace_read, stage)
        await reader.read(stage.layout.ranges, buffer.view, on_read)

    def _trace_read(self, stage: Stage, started: float, ended: float) -> None:
        """Called by the thread that has read it."""
        assert self._trace is not None
        thread = threading.current_thread().name.rpartition("_")[2]
        self._trace.span(f"loading agent {thread}", stage.name or "base", started, ended, bytes=stage.layout.read_bytes)

    async def _daemon_agent(self) -> None:
        """Frees what was computed, which lets the next load in."""
        async for stage in self._to_free:
            self._free(stage)

    def _free(self, stage: Stage) -> None:
        self._ring.release(stage.clear())
        self.load_order.wake()
        if self._trace is not None:
            now = time.perf_counter()
            self._trace.span("daemon agent", f"free {stage.name}", now, now)
        self._trace_bytes(-stage.layout.weight_bytes)

    def _drop(self, stage: Stage, buffer: Buffer) -> None:
        """Of a stage that is LOADING."""
        if stage.resident:
            buffer.close()
        else:
            self._ring.release(buffer)
        stage.drop()
        self.load_order.wake()
        self._trace_bytes(-stage.layout.weight_bytes)

    def _unload(self, stage: Stage) -> None:
        """Gives its memory back, if it has any."""
        if stage.buffer is not None:
            stage.clear().close()
            self._trace_bytes(-stage.layout.weight_bytes)

    def _trace_bytes(self, more: int) -> None:
        if self._trace is not None:
            self._traced_bytes += more
            self._trace.count("weights", bytes=self._traced_bytes)

    # --- Inference Agent: one compute thread ---

    async def _inference_agent(self) -> None:
        """Computes all sweeps on one thread.

        Another thread would have kernel threads of its own, and those that are idle slow down those that compute.
        """
        await run_in_thread(self._compute_sweeps)

    def _compute_sweeps(self) -> None:
        while (sweep := self._next_sweep()) is not None:
            sweep.run()
            self._later_on_loop(sweep.done.set)

    def _next_sweep(self) -> SweepWork | None:
        with only_waiting():
            return self._sweeps.get()

    async def sweep(self, compute: Callable[[], T]) -> T:
        """Runs `compute` on the inference agent's thread, where it may call `enter` and `leave`; one call at a time.

        The ring goes on into the next sweep. After an error or an abandoned sweep it starts over.

        Raises:
            SweepAbandoned: `abandon` was called.
            ReadError: A stage that the sweep needed could not be read.

        Cancellation: the sweep is abandoned, and the call ends when the compute thread has noticed, within one stage.
        """
        self._abandoned = False
        self._load_again()
        started = time.perf_counter()
        stalled_before = self.statistics.stall_seconds
        complete = False
        try:
            result = await self._computed(compute)
            complete = True
        finally:
            self._trace_computed()
            if self._trace is not None:
                self._trace.span("sweeps", f"sweep {self.statistics.sweeps}", started, time.perf_counter())
            stalled = self.statistics.stall_seconds - stalled_before
            self.statistics.compute_seconds += time.perf_counter() - started - stalled
            self.load_order.end_sweep(complete=complete)
        self.statistics.sweeps += 1
        return result

    async def _computed(self, compute: Callable[[], T]) -> T:
        sweep = SweepWork(compute)
        self._sweeps.put(sweep)
        try:
            await sweep.done.wait()
        except anyio.get_cancelled_exc_class():
            self.abandon()
            with anyio.CancelScope(shield=True):
                await sweep.done.wait()
            raise
        if sweep.error is not None:
            raise sweep.error
        result: T = sweep.result
        return result

    def _load_again(self) -> None:
        """What could not be read is read again."""
        failed = [stage for stage in self.stages if stage.error is not None]
        if any(not stage.resident for stage in failed):
            self.load_order.rewind(0)
        for stage in failed:
            if stage.resident:
                self._unload(stage)
        if failed:
            self.load_order.find_missing()

    def abandon(self) -> None:
        """Ends the running sweep at its next stage."""
        self._abandoned = True
        self._tell_compute_thread()

    def _tell_compute_thread(self) -> None:
        with self._arrived:
            self._arrived.notify_all()

    def check_abandoned(self) -> None:
        """Called by the compute thread.

        Raises:
            SweepAbandoned: The sweep was abandoned or its task cancelled.
        """
        if self._abandoned:
            raise SweepAbandoned

    def look(self) -> None:
        """Lets the compute thread, if it waits for a stage, call what `enter` was given."""
        self._look = True
        self._tell_compute_thread()

    def enter(self, stage: Stage, on_look: Callable[[], None] = lambda: None) -> Buffer:
        """Called by the compute thread: waits until `stage` is READY and returns its buffer.

        Args:
            on_look: Called while it waits, after each `look`.

        Raises:
            SweepAbandoned: The sweep was abandoned or its task cancelled.
            ReadError: The stage could not be read.
        """
        self._trace_computed()
        self.check_abandoned()
        if stage.state is not StageState.READY or not self.load_order.is_next(stage):
            started = time.perf_counter()
            self._wait_ready(stage, on_look)
            ended = time.perf_counter()
            self.statistics.stall_seconds += ended - started
            if self._trace is not None:
                self._trace.span("inference agent", f"wait for {stage.name or 'base'}", started, ended)
            self.check_abandoned()
        self.load_order.enter(stage)
        if stage.error is not None:
            raise stage.error
        if self._trace is not None:
            self._traced_stage = stage.name or "base", time.perf_counter()
        return stage.loaded

    def leave(self, stage: Stage) -> None:
        """Called by the compute thread: `stage` was computed and nothing refers to its buffer any more."""
        self._trace_computed()
        if not stage.resident:
            stage.state = StageState.SPENT
            self._later_on_loop(self._free_later.send_nowait, stage)

    def _trace_computed(self) -> None:
        """What was computed since a stage was entered; resident ones are not left, but end where the next begins."""
        if self._trace is not None and self._traced_stage is not None:
            (name, started), self._traced_stage = self._traced_stage, None
            self._trace.span("inference agent", name, started, time.perf_counter())

    def _wait_ready(self, stage: Stage, on_look: Callable[[], None]) -> None:
        """Returns when it is READY, or the sweep abandoned."""
        if not self.load_order.is_next(stage):
            self.call_on_loop(self.load_order.reorder, stage)
        while True:
            with only_waiting(), self._arrived:
                self._arrived.wait_for(lambda: self._look or self._abandoned or stage.state is StageState.READY)
            if not self._look:
                return
            self._look = False
            on_look()

    def call_on_loop(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Called by the compute thread: calls `function` on the event loop, and waits for it."""
        with only_waiting():
            return anyio.from_thread.run_sync(function, *args, token=self._token)

    def _later_on_loop(self, function: Callable[[Unpack[Ts]], object], *args: *Ts) -> None:
        """Called by the compute thread: calls `function` on the event loop some time, and does not wait for it."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(function, *args)

    def interpreter_exits(self) -> None:
        """Nothing is computed from here on."""
        self.abandon()

    def _close_stages(self) -> None:
        for stage in self.stages:
            self._unload(stage)
