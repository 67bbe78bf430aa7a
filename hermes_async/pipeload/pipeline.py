"""PIPELOAD: resident stages loaded once, on the first sweep's way, the others cycling through a ring of buffers.

Source: Hermes (arXiv 2409.04249), sections III (PIPELOAD) and IV (Execution Engine).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio

from hermes_async.errors import EngineClosedError
from hermes_async.foreign_errors import ungrouped
from hermes_async.pipeload.agents import DaemonAgent, InferenceAgent, LoadingAgents, PipelineStatistics, Sweep
from hermes_async.pipeload.expert_cache import ExpertCache
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.load_order import LoadOrder
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.pipeload.trace import AgentTrace, Trace
from hermes_async.storage.buffers import BufferLock, BufferPool
from hermes_async.storage.file_state import FileState
from hermes_async.storage.read_watch import ReadWatch
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.threads import DaemonExecutor

T = TypeVar("T")

_CLAIMED_AHEAD = 1
"""Stages that are claimed besides those being read: a thread that has read one finds its next read waiting, and does
not wait for the event loop's turn."""


class Pipeline:
    """Keeps streamed stages coming, in the order the model computes them, sweep after sweep.

    Args:
        stages: All stages, in the order they are expected to be computed in.
        num_loading_agents: How many stages may be read at once.
        ring: Grants the places of streamed stages; holds the loading agents back.
        experts: The experts of each layer, which are not among the stages; None if there are none.
        buffers: The memory of the ring: at least as many as the ring grants leases at once.
        lock: Locks the memory of resident stages; None locks nothing.
        statistics: Added to by the readers.
        direct: Read past the page cache where possible.
        trace: Told of every load, wait, computation and free.
        file_states: What the stages' files must still be; see `Reader`.
        watch: Of the reads; by default, one without a timeout.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        num_loading_agents: int,
        ring: MemoryGovernor,
        buffers: BufferPool,
        lock: BufferLock | None = None,
        experts: ExpertCache | None = None,
        statistics: ReadStatistics,
        direct: bool = True,
        trace: Trace | None = None,
        file_states: Mapping[Path, FileState] | None = None,
        watch: ReadWatch | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self.experts = experts or ExpertCache((), MemoryGovernor(0))
        self.read_statistics = statistics
        self.watch = watch or ReadWatch()
        self._num_loading_agents = num_loading_agents
        self._buffers = buffers
        self._direct = direct
        self._file_states = file_states or {}
        # All mutable state is in the stages (`StageState`), the order of loads, the expert cache, the ring (who has a
        # place, who waits for one) and the inference agent (the running sweep); beside them, whether a sweep is under
        # way, whether the agents have stopped, counts, and what ended an agent that should have gone on.
        self._is_sweeping = False
        self._has_stopped = False
        self.statistics = PipelineStatistics()
        self.failure: Exception | None = None
        self._trace = AgentTrace(trace)
        self._trace.note_experts({layer[0].name.rpartition(".")[0]: len(layer) for layer in self.experts.layers})
        self.load_order = LoadOrder(self.stages, ring, lock)
        self._daemon_agent = DaemonAgent(buffers, self.experts, self._trace)
        self._inference_agent = InferenceAgent(
            self.load_order, self._daemon_agent, self.statistics, self._trace, self.watch
        )
        self._loading_agents = LoadingAgents(
            self.load_order,
            ring,
            buffers,
            inference_agent=self._inference_agent,
            daemon_agent=self._daemon_agent,
            trace=self._trace,
        )

    def __repr__(self) -> str:
        states = Counter(stage.state.value for stage in self.stages)
        return f"<Pipeline of {len(self.stages)} stages: {dict(states)}, {self.statistics.sweeps} sweeps>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps the agents at work until the block is left; they begin to read at once.

        Raises:
            ReadError: A file could not be opened.
        """
        async with AsyncExitStack() as exits:
            executor = exits.enter_context(DaemonExecutor(self._num_loading_agents, "hermes-loading-agent"))
            every = (*self.stages, *self.experts.experts)
            files = sorted({item.file for stage in every for item in stage.layout.ranges})
            reader = await exits.enter_async_context(
                Reader(
                    files,
                    executor,
                    self.read_statistics,
                    direct=self._direct,
                    states=self._file_states,
                    watch=self.watch,
                )
            )
            exits.callback(self._buffers.close)
            exits.callback(self.experts.close_free)
            exits.callback(self._free_everything)
            with ungrouped():
                async with anyio.create_task_group() as agents:
                    agents.start_soon(self._run_agent, self._inference_agent.run, name="hermes inference agent")
                    for idx in range(self._num_loading_agents + _CLAIMED_AHEAD):
                        loading_agent = partial(self._loading_agents.run, reader)
                        agents.start_soon(self._run_agent, loading_agent, name=f"hermes loading agent {idx}")
                    try:
                        yield
                    finally:
                        self._inference_agent.close()
                        agents.cancel_scope.cancel()

    async def _run_agent(self, agent: Callable[[], Awaitable[None]]) -> None:
        try:
            await agent()
        except Exception as error:
            self.failure = self.failure or error
            raise

    def _free_everything(self) -> None:
        self._has_stopped = True
        every = (*self.stages, *self.experts.experts)
        self._daemon_agent.free_all(stage for stage in every if stage.state is not StageState.EMPTY)
        self._trace.tell_experts()
        for stage in self.stages:
            stage.ready.set()  # nobody loads it any more; `wait_resident` raises

    # --- what is resident ---

    @property
    def loads_resident(self) -> bool:
        """Whether any resident stage is not in memory yet."""
        return any(stage.resident and stage.state is not StageState.READY for stage in self.stages)

    @property
    def streams(self) -> bool:
        """Whether a sweep that asks for no group reads any stage from disk."""
        return any(not stage.resident and stage.group is None for stage in self.stages)

    @property
    def computing(self) -> Stage | None:
        """The stage that is computed now; None between stages and between sweeps."""
        return self._inference_agent.computing

    @property
    def holds_resident(self) -> bool:
        """Whether every resident stage is in memory, without an error."""
        return all(stage.state is StageState.READY and stage.error is None for stage in self.stages if stage.resident)

    async def wait_resident(self) -> None:
        """Waits until every resident stage is in memory. One that could not be read before is read again.

        Raises:
            ReadError: One could not be read, or its read is overdue.
            EngineClosedError: The agents have stopped.
        """
        if not self._is_sweeping:  # a sweep raises the error, and the next one reads the stage again
            self._load_again(stage for stage in self.stages if stage.resident and stage.error is not None)
        while not self.holds_resident:
            for stage in self.stages:
                while stage.resident and stage.state is not StageState.READY:
                    if self._has_stopped:
                        raise EngineClosedError("the engine was left while its weights were loaded")
                    await self.watch.wait(stage.ready)
                if stage.resident and stage.error is not None:
                    raise stage.error

    async def wait_for_reads(self) -> None:
        """Waits until no stage is being read. Agents must be held back, so that none is read afterwards.

        Raises:
            ReadTimeoutError: A read is overdue.
        """
        for stage in (*self.stages, *self.experts.experts):
            while stage.state is StageState.LOADING:
                await self.watch.wait(stage.ready)

    async def set_resident(self, resident: Collection[Stage]) -> None:
        """Makes these stages the resident ones, and streams all others; between sweeps only.

        The caller has taken the weights of the stages that leave out of the model. Returns when those stages have given
        their memory back. Stages that become resident are loaded next, as at the beginning.

        Cancellation: some stages are what they shall be already, and the others are what they were.
        """
        leaving = [stage for stage in self.stages if stage.resident and stage not in resident]
        coming = [stage for stage in self.stages if not stage.resident and stage in resident]
        self._stream(stage for stage in self.stages if not stage.resident and stage not in coming)
        try:
            # What is not being read goes at once, so no agent takes a stage that is about to leave.
            loading = [stage for stage in leaving if stage.state is StageState.LOADING]
            for stage in leaving:
                if stage not in loading:
                    self._release_resident(stage)
            self.load_order.find_missing()
            for stage in loading:
                while stage.state is StageState.LOADING:
                    await stage.ready.wait()
                self._release_resident(stage)
            for stage in coming:
                while stage.state is not StageState.EMPTY:  # an agent still reads it, or the daemon has not freed it
                    await stage.emptied.wait()
                stage.resident = True
        finally:
            self._stream(stage for stage in self.stages if not stage.resident)
            self.load_order.find_missing()

    def _release_resident(self, stage: Stage) -> None:
        if stage.state is StageState.READY:
            self._daemon_agent.free(stage)
        stage.resident = False

    def _stream(self, stages: Iterable[Stage]) -> None:
        self._daemon_agent.free_all(self.load_order.stream(stages))

    async def resize_experts(self, nbytes: int) -> None:
        """Gives the expert cache so many bytes; between sweeps only.

        Raises:
            anyio.WouldBlock: The governor has no more memory. Nothing changes.

        Cancellation: some experts were freed.
        """
        for expert in self.experts.experts:
            while expert.state is StageState.LOADING:
                await expert.ready.wait()
        self._daemon_agent.free_all(self.experts.surplus(nbytes))
        self.experts.close_free()
        self.experts.memory.resize(nbytes)

    # --- sweeps ---

    async def sweep(self, compute: Callable[[], T], groups: Collection[str] = ()) -> T:
        """Runs `compute` on the inference agent's thread, where it may call `enter` and `leave`; one call at a time.

        The ring goes on into the next sweep. After an error or an abandoned sweep it starts over.

        Args:
            groups: The groups of optional stages that `compute` enters. Others are not read.

        Raises:
            SweepAbandoned: `abandon` was called.
            ReadError: A stage that the sweep needed could not be read, or its read is overdue.

        Cancellation: the sweep is abandoned, and the call ends when the compute thread has noticed, within one stage.
        """
        self._load_again(stage for stage in self.stages if stage.error is not None)
        self._daemon_agent.free_all(self.load_order.begin_sweep(groups))
        self._is_sweeping = True
        started, stalled_before = time.perf_counter(), self.statistics.stall_seconds
        experts = self.experts.statistics
        hits_before, misses_before = experts.num_hits, experts.num_misses
        complete = False
        try:
            result = await self._compute(compute)
            complete = True
        finally:
            self._is_sweeping = False
            self._inference_agent.end_sweep()
            hits, misses = experts.num_hits - hits_before, experts.num_misses - misses_before
            counts = {"expert_hits": hits, "expert_misses": misses} if hits + misses else {}
            self._trace.span("sweeps", f"sweep {self.statistics.sweeps}", started, **counts)
            stalled = self.statistics.stall_seconds - stalled_before
            self.statistics.compute_seconds += time.perf_counter() - started - stalled
            self._daemon_agent.free_all(self.load_order.end_sweep(complete=complete))
            self._daemon_agent.free_all(self.experts.end_sweep())
            self._trace.tell_experts()
        self.statistics.sweeps += 1
        return result

    async def _compute(self, compute: Callable[[], T]) -> T:
        sweep = Sweep(compute)
        self._inference_agent.start(sweep)
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

    def _load_again(self, failed: Iterable[Stage]) -> None:
        """Has stages read again that could not be read. No sweep may be under way."""
        failed = list(failed)
        if any(not stage.resident for stage in failed):
            self._daemon_agent.free_all(self.load_order.rewind(0))
        self._daemon_agent.free_all(stage for stage in failed if stage.resident)
        if failed:
            self.load_order.find_missing()

    def abandon(self) -> None:
        """Ends the running sweep at its next stage."""
        self._inference_agent.abandon()

    def look(self) -> None:
        """Lets `enter` return None, if the compute thread waits for a stage or as soon as it does."""
        self._inference_agent.look()

    def enter(self, stages: Sequence[Stage]) -> Stage | None:
        """Called by the compute thread: waits until one of the stages is READY, and returns it.

        Several can only be experts of a layer, which were asked for.

        None means that `look` was called meanwhile: look who was aborted, and call `enter` again.

        Raises:
            SweepAbandoned: The sweep was abandoned or its task cancelled.
            ReadError: The stage could not be read.
        """
        return self._inference_agent.enter(stages)

    def leave(self, stage: Stage) -> None:
        """Called by the compute thread: `stage` was computed and nothing refers to its buffer any more."""
        self._inference_agent.leave(stage)

    def ask(self, experts: Sequence[Stage]) -> None:
        """Called by the compute thread: a call needs these experts of a layer. They are read next.

        They stay in memory until they are left or forgotten.
        """
        self._inference_agent.ask(experts)

    def forget(self, experts: Sequence[Stage]) -> None:
        """Called by the compute thread: a call does not need these experts, which it had asked for."""
        self._inference_agent.forget(experts)
