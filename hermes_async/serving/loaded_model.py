"""A planned model brought to life: memory leased, resident stages loaded, agents at work."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hermes_async.config import EngineConfig
from hermes_async.modeling.kv_cache import KVPool
from hermes_async.modeling.packed import PackedBatch
from hermes_async.modeling.streamed import StreamedModel, replace_linears
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import Stage
from hermes_async.pipeload.trace import Trace
from hermes_async.planning.plan import Plan
from hermes_async.planning.planner import LEAST_KV_TOKENS
from hermes_async.planning.resize import resized
from hermes_async.serving.draft_model import DraftModel, running_draft_model
from hermes_async.serving.kv_blocks import KVBlocks
from hermes_async.serving.planned_model import PlannedModel
from hermes_async.serving.request import Request
from hermes_async.serving.sweep import SweepRunner
from hermes_async.serving.sweep_times import SweepTimes
from hermes_async.storage.buffers import BufferPool
from hermes_async.storage.parking import ParkingFile
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.rows import ROWS_AT_ONCE, RowReader
from hermes_async.storage.tensor_spec import file_states
from hermes_async.storage.threads import DaemonExecutor, run_in_thread


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an open engine holds."""

    opened: PlannedModel
    governor: MemoryGovernor
    weights_lease: Lease
    ring_lease: Lease
    ring: BufferPool
    pipeline: Pipeline
    model: StreamedModel
    rows: RowReader | None
    runner: SweepRunner
    blocks: KVBlocks
    parking: ParkingFile
    times: SweepTimes
    draft_model: DraftModel | None
    trace: Trace | None

    @property
    def bytes_for_everything(self) -> int:
        """The budget in which every stage stays."""
        plan = self.opened.plan
        resident = sum(stage.slot_bytes for stage in plan.stages) + plan.partition.base.slot_bytes
        return resident + plan.ring_bytes + plan.workspace_bytes + self._kv_most + self._draft_bytes

    @property
    def _kv_most(self) -> int:
        return self.blocks.pool.num_blocks * self.blocks.pool.layout.block_bytes

    @property
    def _draft_bytes(self) -> int:
        draft = self.opened.draft
        return 0 if draft is None else draft.fixed_bytes + draft.kv_bytes

    async def resize(self, budget: int) -> None:
        """Takes more memory, or gives some back; between two sweeps only.

        Raises:
            MemoryBudgetError: It cannot give so much back; nothing has changed.

        Cancellation: leaves the model fit only to be closed.
        """
        plan = self._resized(budget)
        kept = frozenset(idx for idx in plan.resident if idx in self.opened.plan.resident)
        # Requests that come meanwhile would take what is to be given back.
        with self.governor.closed():
            await self._claim(max(budget, self.opened.plan.memory_budget))
            await self._set_resident(kept)
        self.weights_lease.shrink(self.opened.plan.resident_bytes - replace(plan, resident=kept).resident_bytes)
        num_buffers = plan.num_buffers - self.opened.plan.num_buffers
        self.opened.plan = replace(plan, resident=kept)
        over = self.governor.budget_bytes - self.governor.free_bytes + num_buffers * plan.slot_bytes - budget
        self.blocks.drop_unused(max(0, -(-over // self.opened.seen.kv.block_bytes)))
        self.governor.resize(budget)
        self.ring_lease.grow_nowait(num_buffers * plan.slot_bytes)
        self.ring.add(num_buffers, plan.slot_bytes)
        self.weights_lease.grow_nowait(plan.resident_bytes - self.opened.plan.resident_bytes)
        await self._set_resident(plan.resident)
        self.opened.plan = plan
        await self._claim(budget)

    async def _claim(self, budget: int) -> None:
        """On a thread, as other processes are told by a file."""
        await run_in_thread(self.opened.claim.change, budget)

    def _resized(self, budget: int) -> Plan:
        blocks, skeleton = self.blocks, self.opened.skeleton
        least_tokens = min(skeleton.context_length or LEAST_KV_TOKENS, LEAST_KV_TOKENS) if skeleton.generates else 0
        kv_in_use = blocks.kv_bytes - blocks.unused_prefix_bytes
        return resized(
            self.opened.plan,
            budget,
            kv_least=max(kv_in_use, self.opened.seen.kv.nbytes(least_tokens)),
            kv_most=self._kv_most,
            other_bytes=self._draft_bytes,
        )

    async def _set_resident(self, resident: Collection[int]) -> None:
        """By the stages' numbers in the plan; the base, which the plan does not count, always stays."""
        stages = self.pipeline.stages
        num_base = len(stages) - len(self.opened.plan.stages)
        staying = [*stages[:num_base], *(stages[num_base + idx] for idx in sorted(resident))]
        await self.pipeline.set_resident(staying, self.model.unbind)


@asynccontextmanager
async def loaded_model(
    opened: PlannedModel, config: EngineConfig, release: Callable[[Request], None], trace: Trace | None = None
) -> AsyncGenerator[LoadedModel, None]:
    """Takes the plan's memory and starts the agents, which begin to load; undoes all of it in reverse order.

    Args:
        release: Gives an aborted request's memory back; called on the event loop.
        trace: Told of what the agents do.

    Raises:
        ReadError: A file could not be opened, or a draft model not be read.
    """
    plan, partition = opened.plan, opened.partition
    governor = MemoryGovernor(plan.memory_budget)
    opened.claim.leased = lambda: governor.budget_bytes - governor.free_bytes
    async with AsyncExitStack() as exits:
        weights_lease = exits.enter_context(governor.acquire_nowait("resident weights", plan.resident_bytes))
        ring_lease = exits.enter_context(governor.acquire_nowait("ring buffers", plan.ring_bytes))
        exits.enter_context(governor.acquire_nowait("workspace", plan.workspace_bytes))
        blocks = KVBlocks(KVPool(opened.seen.kv, plan.kv_bytes), governor, share=config.share_prefixes)
        exits.callback(blocks.close)
        folder = None if config.parking_dir is None else Path(config.parking_dir)
        parking = ParkingFile(folder, opened.seen.kv.block_bytes, direct=config.direct_io)
        exits.push_async_callback(parking.aclose)
        read_statistics = ReadStatistics()
        ring = BufferPool(plan.num_buffers, plan.slot_bytes)
        stages = _stages(opened)
        pipeline = Pipeline(
            stages,
            num_loading_agents=plan.num_loading_agents,
            ring=ring,
            statistics=read_statistics,
            direct=config.direct_io,
            trace=trace,
            file_states=file_states(opened.skeleton.tensors.values()),
        )
        runner: SweepRunner | None = None

        def on_stage(batch: PackedBatch) -> None:
            assert runner is not None
            runner.drop_aborted(batch)

        behind_pipeline = exits.enter_context(ExitStack())
        await exits.enter_async_context(pipeline.running())
        # The agents read by now, and need the event loop for it.
        model = await run_in_thread(_streamed_model, opened, stages, pipeline, on_stage)
        behind_pipeline.callback(model.close)
        rows = None
        if partition.streamed_embedding is not None:
            executor = exits.enter_context(DaemonExecutor(ROWS_AT_ONCE, "hermes-row-reader"))
            files = [partition.streamed_embedding.file]
            states = partition.streamed_embedding.file_states
            reader = await exits.enter_async_context(
                Reader(files, executor, read_statistics, direct=config.direct_io, states=states)
            )
            held_back = pipeline.load_order.held_back
            rows = await exits.enter_async_context(
                RowReader(partition.streamed_embedding, reader, plan.max_tokens_per_sweep, held_back)
            )
        draft_model = None
        if opened.draft is not None:
            draft_model = await exits.enter_async_context(
                running_draft_model(
                    opened.draft,
                    governor,
                    read_statistics,
                    opened.skeleton.vocab_size,
                    direct=config.direct_io,
                )
            )
        times = SweepTimes()
        runner = SweepRunner(
            model,
            pipeline,
            rows,
            times=times,
            draft_model=draft_model,
            eos_token_ids=opened.skeleton.eos_token_ids,
            release=release,
        )
        yield LoadedModel(
            opened,
            governor,
            weights_lease,
            ring_lease,
            ring,
            pipeline,
            model,
            rows,
            runner,
            blocks,
            parking,
            times,
            draft_model,
            trace,
        )


def _streamed_model(
    opened: PlannedModel, stages: Sequence[Stage], pipeline: Pipeline, on_stage: Callable[[PackedBatch], None]
) -> StreamedModel:
    partition, model = opened.partition, opened.skeleton.model
    replace_linears(model, partition.linear_blocks)
    return StreamedModel(
        model,
        opened.attention,
        stages,
        streamed_embedding=partition.streamed_embedding is not None,
        native_tokens=opened.plan.speeds.native_tokens,
        gate=pipeline,
        on_stage=on_stage,
    )


def _stages(opened: PlannedModel) -> list[Stage]:
    """The base, if anything is in it, and then the plan's stages."""
    base, plan = opened.partition.base, opened.plan
    stages = [Stage(0, base, resident=True)] if base.placements else []
    for idx, layout in enumerate(plan.stages):
        stages.append(Stage(len(stages), layout, resident=idx in plan.resident))
    return stages
