"""What tests may know of an engine's inside: the only module of the tests that reads the package's private names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from hermes_async import Engine, EngineConfig
from hermes_async.engine.session import Session
from hermes_async.modeling.bfloat16_weight import Bfloat16Weight
from hermes_async.modeling.row_tables import RowTable
from hermes_async.modeling.turn_state import state_bytes
from hermes_async.pipeload.expert_cache import ExpertCache
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.serving.jobs import GenerationJob
from hermes_async.serving.loaded_model import LoadedModel
from hermes_async.serving.loop import ServingLoop
from hermes_async.serving.request import Request
from hermes_async.serving.statistics import engine_statistics
from hermes_async.serving.sweep_times import SweepTimes
from hermes_async.serving.turn_caches import TurnReservation
from hermes_async.storage import parking, threads
from hermes_async.storage.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import pytest


def inside(engine: Engine) -> EngineInside:
    """The inside of an engine, open or left."""
    return EngineInside(engine)


class EngineInside:
    """The few things of an engine that `statistics()`, `plan` and events do not tell."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # --- the engine's own task ---

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What all of the engine runs in; None before it was entered."""
        return self._engine._task

    @property
    def is_open(self) -> bool:
        """The model was opened, now or some time before."""
        return self._engine._serving is not None

    @property
    def has_stopped(self) -> bool:
        """Nothing of it runs any more."""
        return self._engine._task is not None and self._engine._task.done()

    def fail(self, error: Exception) -> None:
        """Ends the engine with `error`, as a listener's error does; while nothing is under way."""
        self._serving._listener_error = error
        self._serving._work.set()

    @property
    def config(self) -> EngineConfig:
        """What the engine was made with."""
        return self._engine._config

    @property
    def checkpoint_path(self) -> Path:
        """The directory that the model was read from."""
        return self._loaded.planned.checkpoint.path

    @property
    def is_traced(self) -> bool:
        """Whether the agents tell what they do."""
        return self._loaded.trace is not None

    @property
    def bfloat16_weights(self) -> set[str]:
        """The bound parameters that are `Bfloat16Weight`s."""
        parameters = self._loaded.model.model.named_parameters()
        return {name for name, parameter in parameters if type(parameter) is Bfloat16Weight}

    # --- requests ---

    @property
    def request_ids(self) -> set[str]:
        """Names of the requests that were submitted and have not ended."""
        return set(self._serving.requests)

    def cache_bytes(self, request_id: str) -> tuple[int, int]:
        """Of a request in turns: what the tensors of its cache take, and what its lease has."""
        reservation = self._serving.requests[request_id].reservation
        assert isinstance(reservation, TurnReservation)
        return state_bytes(reservation.cache.contents), reservation.lease.nbytes

    @property
    def admitted_ids(self) -> list[str]:
        """Of these, the ones that have their KV, in the order in which they got it."""
        return [request.request_id for request in self._serving.scheduler.running]

    def is_aborted(self, request_id: str) -> bool:
        """Whether a request that has not ended is to end as soon as nothing uses its memory."""
        return self._serving.requests[request_id].aborted

    def abort_from_thread(self, request_id: str) -> None:
        """Aborts a request; called by the compute thread, and does not wait until the request has ended."""
        agent = self._loaded.pipeline._inference_agent
        agent.call_on_loop(self._serving.abort, self._serving.requests[request_id])

    async def pass_deadline(self, request_id: str) -> None:
        """Lets a request's deadline pass now."""
        await self._serving._watch_deadline(self._serving.requests[request_id], anyio.current_time())

    def limit_preparations(self, num_threads: int) -> None:
        """From now on at most so many threads prepare requests."""
        self._serving.preparations._threads.total_tokens = num_threads

    @property
    def num_preparing(self) -> int:
        """Threads that prepare requests, also for callers that have left."""
        return self._serving.preparations._threads.borrowed_tokens

    # --- sweeps ---

    @property
    def num_sweeps(self) -> int:
        """As `statistics().sweeps`, for any thread."""
        return engine_statistics(self._serving).sweeps

    @property
    def sweep(self) -> Sequence[GenerationJob]:
        """What the sweep that is computed now consists of; empty between sweeps."""
        return () if self._serving.sweep is None else self._serving.sweep.generation

    @property
    def num_forwards_in_sweep(self) -> int:
        """Forward passes that take part in the sweep that is computed now."""
        return 0 if self._serving.sweep is None else len(self._serving.sweep.forwards)

    @property
    def num_waiting_forwards(self) -> int:
        """Forward passes that wait for a sweep."""
        return len(self._serving.forwards)

    @property
    def sweep_times(self) -> SweepTimes:
        """What sweeps took so far."""
        return self._loaded.times

    def freeze_sweep_times(self) -> None:
        """From now on nothing is learned from sweeps."""
        times = self.sweep_times
        times.record_stalls = times.record_read = times.record = lambda *args: None  # type: ignore[method-assign]

    def on_scheduled(self, call: Callable[[Sequence[GenerationJob]], None]) -> None:
        """From now on calls `call` with each sweep before it runs, empty ones too."""
        scheduler = self._serving.scheduler
        schedule = scheduler.schedule

        def schedule_and_tell() -> list[GenerationJob]:
            sweep = schedule()
            call(sweep)
            return sweep

        scheduler.schedule = schedule_and_tell  # type: ignore[method-assign]

    def on_swept(self, call: Callable[[Sequence[GenerationJob]], Awaitable[None]]) -> None:
        """From now on awaits `call` with each sweep when it was computed, before its tokens are delivered."""
        pipeline = self._loaded.pipeline
        sweep = pipeline.sweep

        async def sweep_and_tell(compute: Callable[[], Any], groups: Collection[str] = ()) -> Any:
            result = await sweep(compute, groups)
            await call(self.sweep)
            return result

        pipeline.sweep = sweep_and_tell  # type: ignore[method-assign, assignment]

    def on_stage(self, call: Callable[[], None]) -> None:
        """From now on the compute thread calls `call` before each stage; what it raises comes out of the model."""
        pipeline = self._loaded.pipeline
        enter = pipeline.enter

        def call_and_enter(*args: Any) -> Any:
            call()
            return enter(*args)

        pipeline.enter = call_and_enter

    def on_stage_computed(self, call: Callable[[], None]) -> None:
        """From now on calls `call` on the event loop after each streamed stage, which is not left yet."""
        pipeline = self._loaded.pipeline
        leave = pipeline.leave

        def call_and_leave(stage: Stage) -> None:
            pipeline._inference_agent.call_on_loop(call)
            leave(stage)

        pipeline.leave = call_and_leave  # type: ignore[method-assign]

    @contextmanager
    def failing_sweeps(self, error: Exception) -> Iterator[None]:
        """Every sweep raises `error` before it begins."""
        pipeline = self._loaded.pipeline
        sweep = pipeline.sweep

        async def fail(*args: Any) -> Any:
            raise error

        pipeline.sweep = fail
        try:
            yield
        finally:
            pipeline.sweep = sweep

    # --- memory ---

    @property
    def governor(self) -> MemoryGovernor:
        """Of the engine's KV memory."""
        return self._loaded.kv_memory

    @property
    def stages(self) -> Sequence[Stage]:
        """All of the model, in its order."""
        return self._loaded.pipeline.stages

    @property
    def streamed_stages(self) -> Sequence[Stage]:
        """What is read again for every sweep, in the order of reading."""
        return self._loaded.pipeline.load_order.cycle

    @property
    def is_loading(self) -> bool:
        """Whether any stage or expert is being read or freed."""
        every = (*self.stages, *self.expert_cache.experts)
        return any(stage.state in (StageState.LOADING, StageState.SPENT) for stage in every)

    @property
    def expert_cache(self) -> ExpertCache:
        """Experts that are read one by one."""
        return self._loaded.pipeline.experts

    def check_experts(self) -> None:
        """No call needs an expert; each that is in memory was read as a whole, and has the one lease of its place."""
        cache = self.expert_cache
        assert cache.num_asked == 0
        loaded = [expert for expert in cache.experts if expert.state is not StageState.EMPTY]
        assert all(expert.state is StageState.READY and expert.error is None for expert in loaded)
        statistics = cache.memory.statistics()
        assert set(statistics.holders) == {expert.name for expert in loaded}
        assert statistics.num_leases == len(loaded) == len({id(expert.buffer) for expert in loaded})
        assert statistics.num_waiting == 0
        assert statistics.peak_bytes_in_use <= statistics.budget_bytes

    @property
    def embedding(self) -> TensorSpec:
        """Where the input embedding lies, whose rows are read for every sweep."""
        return self.row_tables[0].spec

    @property
    def row_tables(self) -> Sequence[RowTable]:
        """The embeddings that are read by row."""
        return self._loaded.planned.partition.row_tables

    @property
    def num_parking_slots(self) -> int:
        """Blocks of KV that are in the parking file."""
        return self._loaded.parking.num_slots_used

    def kv_of(self, session: Session) -> list[tuple[Any, ...]]:
        """The keys and values that an idle session has in memory, layer by layer."""
        reservation = session._kv.reservation
        assert reservation is not None
        kv, layers = reservation.kv, self._loaded.blocks.pool.layout.layers
        return [tuple(part.clone() for part in kv.read(layer_idx, 0, kv.length)) for layer_idx in layers]

    # --- where all of this is ---

    @property
    def _serving(self) -> ServingLoop:
        serving = self._engine._serving
        assert serving is not None
        return serving

    @property
    def _loaded(self) -> LoadedModel:
        return self._serving.loaded


def num_idle_workers() -> int:
    """Threads of `run_in_thread` that have nothing to do."""
    return len(threads._idle)


def park_in(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Engines that are given no folder park their sessions in this one."""
    patch.setattr(parking, "_DEFAULT_FOLDER", folder)


def is_parked(session: Session) -> bool:
    """Whether a session's KV is on disk."""
    return session._kv.parked is not None


def num_untaken_chunks(request: Request) -> int:
    """Chunks that a request's user has not taken yet."""
    return request.send.statistics().current_buffer_used


def on_delivery(patch: pytest.MonkeyPatch, call: Callable[[], None]) -> None:
    """Calls `call` whenever any engine has delivered what a sweep made for one request."""
    deliver = ServingLoop._deliver

    def deliver_and_tell(serving: ServingLoop, *args: Any) -> None:
        deliver(serving, *args)
        call()

    patch.setattr(ServingLoop, "_deliver", deliver_and_tell)
