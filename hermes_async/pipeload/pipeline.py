"""PIPELOAD: resident stages loaded once, the others cycling through a ring of buffers.

Source: Hermes (arXiv 2409.04249), sections III (PIPELOAD) and IV (Execution Engine).
"""

from __future__ import annotations

import queue
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from hermes_async.errors import ReadError
from hermes_async.pipeload.groups import ungrouped
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.pipeload.sweep_work import SweepWork
from hermes_async.pipeload.trace import Trace
from hermes_async.storage.buffers import Buffer, BufferPool
from hermes_async.storage.reader import Reader, ReadStatistics

T = TypeVar("T")


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
    ) -> None:
        self.stages = tuple(stages)
        self.statistics = PipelineStatistics()
        self.read_statistics = statistics
        self._ring = ring
        self._direct = direct
        self._pinned = pinned
        self._num_loading_agents = num_loading_agents
        # All mutable state. `_order` is the cycle of streamed stages as the model visits them; `_next_load` is where
        # the loading agents are in it, `_next_compute` where the sweep is. `_free_later` feeds the daemon.
        self._order = [stage for stage in stages if not stage.resident]
        self._next_load = 0
        self._next_compute = 0
        self._free_later, self._to_free = anyio.create_memory_object_stream[Stage](float("inf"))
        self._cycle = 0  # counts the rewinds, so that an agent sees that what it claimed is out of date
        self._rewound = anyio.Event()
        self._abandoned = False
        self._spare_reader: Reader | None = None
        self._sweeps: queue.SimpleQueue[SweepWork | None] = queue.SimpleQueue()  # None ends the inference agent
        self._first_request = anyio.Event()
        self._wait_scope: anyio.CancelScope | None = None
        self._trace = trace
        self._traced_bytes = 0  # of weights in memory or on their way there
        self._traced_stage: tuple[str, float] | None = None  # what is computed, and since when

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Loads the resident stages, then keeps the agents at work until the block is left.

        Raises:
            ReadError: A resident stage could not be read.
        """
        async with AsyncExitStack() as exits:
            exits.callback(self._free_later.close)
            exits.callback(self._to_free.close)
            executor = exits.enter_context(ThreadPoolExecutor(self._num_loading_agents, "hermes-loading-agent"))
            readers = [
                await exits.enter_async_context(Reader(executor, self.read_statistics, direct=self._direct))
                for _ in range(self._num_loading_agents + 1)
            ]
            files = sorted({item.file for stage in self.stages for item in stage.layout.ranges})
            exits.callback(self._ring.close)
            exits.callback(self._close_resident)
            for reader in readers:
                await reader.open(files)
            self._spare_reader = readers.pop()
            await self._load_resident(readers)
            with ungrouped():
                async with anyio.create_task_group() as agents:
                    agents.start_soon(self._daemon_agent, name="hermes daemon agent")
                    agents.start_soon(self._inference_agent, name="hermes inference agent")
                    for idx, reader in enumerate(readers):
                        agents.start_soon(self._loading_agent, idx, reader, name=f"hermes loading agent {idx}")
                    try:
                        yield
                    finally:
                        self._sweeps.put(None)
                        agents.cancel_scope.cancel()

    # --- Loading Agents and Daemon Agent: tasks on the event loop ---

    async def _load_resident(self, readers: Sequence[Reader]) -> None:
        waiting = iter([stage for stage in self.stages if stage.resident])

        async def load(idx: int, reader: Reader) -> None:
            for stage in waiting:
                buffer = Buffer(stage.layout.slot_bytes, pinned=self._pinned)
                stage.start_loading()
                try:
                    await self._read(idx, reader, stage, buffer)
                except BaseException:
                    self._drop(stage)
                    raise
                stage.set_ready(buffer, None)

        with ungrouped():
            async with anyio.create_task_group() as group:
                for idx, reader in enumerate(readers):
                    group.start_soon(load, idx, reader)

    async def set_resident(
        self, resident: Collection[Stage], bind: Callable[[Stage, Buffer], None], unbind: Callable[[Stage], None]
    ) -> None:
        """Makes these stages the ones that stay, and streams all others; between sweeps only.

        Those that no longer stay give their memory back first; then the others are read, while the ring fills.

        Args:
            bind: Puts a stage's weights into the model.
            unbind: Takes them out.

        Raises:
            ReadError: A stage could not be read; it is streamed, and so are those that would have come after it.

        Cancellation: as an error.
        """
        leaving = [stage for stage in self.stages if stage.resident and stage not in resident]
        coming = [stage for stage in self.stages if not stage.resident and stage in resident]
        if not leaving and not coming:
            return
        for stage in leaving:
            unbind(stage)
            stage.resident = False
            self._trace_bytes(-stage.layout.weight_bytes)
            stage.clear().close()
        self._order = [stage for stage in self.stages if not stage.resident and stage not in coming]
        self._rewind(0)
        try:
            while coming:
                await self._make_resident(coming[0])
                bind(coming[0], coming[0].loaded)
                coming.pop(0)
        finally:
            if coming:
                self._order = [stage for stage in self.stages if not stage.resident]
                self._rewind(0)

    async def _make_resident(self, stage: Stage) -> None:
        assert self._spare_reader is not None
        while stage.state is not StageState.EMPTY:  # an agent still reads it, or the daemon has not freed it
            await stage.emptied.wait()
        buffer = Buffer(stage.layout.slot_bytes, pinned=self._pinned)
        stage.start_loading()
        try:
            await self._read(self._num_loading_agents, self._spare_reader, stage, buffer)
        except BaseException:
            self._drop(stage)
            buffer.close()
            raise
        stage.resident = True
        stage.set_ready(buffer, None)

    @property
    def streams(self) -> bool:
        """Whether a sweep reads any stage from disk."""
        return any(not stage.resident for stage in self.stages)

    async def _read(self, idx: int, reader: Reader, stage: Stage, buffer: Buffer) -> None:
        """`idx`: The loading agent's."""
        started = time.perf_counter()
        self._trace_bytes(stage.layout.weight_bytes)
        try:
            await reader.read(stage.layout.ranges, buffer.view)
        finally:
            if self._trace is not None:
                row, nbytes = f"loading agent {idx}", stage.layout.read_bytes
                self._trace.span(row, stage.name or "base", started, time.perf_counter(), bytes=nbytes)

    async def _loading_agent(self, idx: int, reader: Reader) -> None:
        """Reads the next stage of the cycle whenever a buffer is free; only free buffers hold it back."""
        await self._first_request.wait()
        while True:
            buffer = await self._ring.acquire()
            stage: Stage | None = None
            error: ReadError | None = None
            try:
                stage = await self._claim()
                await self._read(idx, reader, stage, buffer)
            except ReadError as read_error:
                error = read_error
            except BaseException:
                self._ring.release(buffer)
                if stage is not None:
                    self._drop(stage)
                raise
            assert stage is not None
            if stage.stale:
                # Never READY, not even for a moment: the compute thread would take the buffer.
                self._ring.release(buffer)
                self._drop(stage)
            else:
                stage.set_ready(buffer, error)

    async def _claim(self) -> Stage:
        """Takes the next stage of the cycle to load, once it is EMPTY, and marks it LOADING."""
        while True:
            while not self._order:
                await self._rewound.wait()
            cycle = self._cycle
            stage = self._order[self._next_load]
            self._next_load = (self._next_load + 1) % len(self._order)
            while cycle == self._cycle and stage.state is not StageState.EMPTY:
                await stage.emptied.wait()
            if cycle == self._cycle:
                stage.start_loading()
                return stage

    async def _daemon_agent(self) -> None:
        """Frees what was computed, which lets the next load in."""
        async for stage in self._to_free:
            self._free(stage)

    def _free(self, stage: Stage) -> None:
        self._ring.release(stage.clear())
        if self._trace is not None:
            now = time.perf_counter()
            self._trace.span("daemon agent", f"free {stage.name}", now, now)
        self._trace_bytes(-stage.layout.weight_bytes)

    def _drop(self, stage: Stage) -> None:
        stage.drop()
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
        # A limiter of our own: the application may have given all of the common worker threads away.
        await anyio.to_thread.run_sync(self._compute_sweeps, limiter=anyio.CapacityLimiter(1))

    def _compute_sweeps(self) -> None:
        while (sweep := self._sweeps.get()) is not None:
            sweep.run()
            anyio.from_thread.run_sync(sweep.done.set)

    async def sweep(self, compute: Callable[[], T]) -> T:
        """Runs `compute` on the inference agent's thread, where it may call `enter` and `leave`; one call at a time.

        The ring goes on into the next sweep. After an error or an abandoned sweep it starts over.

        Raises:
            SweepAbandoned: `abandon` was called.
            ReadError: A stage that the sweep needed could not be read.

        Cancellation: the sweep is abandoned, and the call ends when the compute thread has noticed, within one stage.
        """
        self.start_streaming()
        self._abandoned = False
        if any(stage.error is not None for stage in self._order):
            self._rewind(0)
        self._next_compute = 0
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
            if not complete:
                self._rewind(0)
            elif 0 < self._next_compute < len(self._order):
                del self._order[self._next_compute :]  # the model did not visit these
                self._rewind(0)
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

    def start_streaming(self) -> None:
        """Lets the loading agents begin to fill the ring, ahead of the first sweep; from then on they never stop."""
        self._first_request.set()

    def abandon(self) -> None:
        """Ends the running sweep at its next stage."""
        self._abandoned = True
        if self._wait_scope is not None:
            self._wait_scope.cancel()

    def check_abandoned(self) -> None:
        """Called by the compute thread.

        Raises:
            SweepAbandoned: The sweep was abandoned or its task cancelled.
        """
        if self._abandoned:
            raise SweepAbandoned

    def enter(self, stage: Stage) -> Buffer:
        """Called by the compute thread: waits until `stage` is READY and returns its buffer.

        Raises:
            SweepAbandoned: The sweep was abandoned or its task cancelled.
            ReadError: The stage could not be read.
        """
        self._trace_computed()
        self.check_abandoned()
        if not stage.resident:
            if not self._is_next(stage) or stage.state is not StageState.READY:
                started = time.perf_counter()
                try:
                    anyio.from_thread.run(self._wait_ready, stage)
                except CancelledError:
                    raise SweepAbandoned from None
                finally:
                    ended = time.perf_counter()
                    self.statistics.stall_seconds += ended - started
                    if self._trace is not None:
                        self._trace.span("inference agent", f"wait for {stage.name}", started, ended)
            self._next_compute += 1
        if stage.error is not None:
            raise stage.error
        if self._trace is not None:
            self._traced_stage = stage.name or "base", time.perf_counter()
        return stage.loaded

    def leave(self, stage: Stage) -> None:
        """Called by the compute thread: `stage` was computed and nothing refers to its buffer any more."""
        self._trace_computed()
        if not stage.resident:
            anyio.from_thread.run_sync(self._spend, stage)

    def _trace_computed(self) -> None:
        """What was computed since a stage was entered; resident ones are not left, but end where the next begins."""
        if self._trace is not None and self._traced_stage is not None:
            (name, started), self._traced_stage = self._traced_stage, None
            self._trace.span("inference agent", name, started, time.perf_counter())

    def _is_next(self, stage: Stage) -> bool:
        return self._next_compute < len(self._order) and self._order[self._next_compute] is stage

    async def _wait_ready(self, stage: Stage) -> None:
        if not self._is_next(stage):
            self._reorder(stage)
        with anyio.CancelScope() as self._wait_scope:
            while not self._abandoned and stage.state is not StageState.READY:
                await stage.ready.wait()
        self._wait_scope = None
        if self._abandoned:
            raise SweepAbandoned

    def _reorder(self, stage: Stage) -> None:
        """The model visits its stages in another order than was known: learn it, and load on from here."""
        if stage in self._order[self._next_compute :]:
            del self._order[self._order.index(stage, self._next_compute)]
        self._order.insert(self._next_compute, stage)
        self._rewind(self._next_compute)

    def _spend(self, stage: Stage) -> None:
        stage.state = StageState.SPENT
        self._free_later.send_nowait(stage)

    def _rewind(self, position: int) -> None:
        """Empties the ring and loads on from `position` of the cycle."""
        self._cycle += 1
        rewound, self._rewound = self._rewound, anyio.Event()
        rewound.set()
        self._next_load = position
        for stage in self.stages:
            if not stage.resident and stage.state is StageState.READY:
                self._free(stage)
            elif stage.state is StageState.LOADING:
                stage.stale = True

    def _close_resident(self) -> None:
        for stage in self.stages:
            if stage.buffer is not None:
                stage.clear().close()
