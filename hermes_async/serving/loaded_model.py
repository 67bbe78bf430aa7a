"""A planned model with its memory and its agents. It can be resized to another budget."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio.lowlevel

from hermes_async.config import EngineConfig, format_bytes
from hermes_async.errors import ConfigError, MemoryBudgetError
from hermes_async.memory.locking import LockMemory, locking
from hermes_async.modeling.kv_cache import KVPool
from hermes_async.modeling.row_tables import most_rows
from hermes_async.modeling.streamed import StreamedModel, replace_linears
from hermes_async.modeling.turns import Turns
from hermes_async.pipeload.expert_cache import ExpertCache
from hermes_async.pipeload.governor import GovernorStatistics, Lease, MemoryGovernor
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import Stage
from hermes_async.pipeload.trace import Trace
from hermes_async.planning.expert_use import all_expert_bytes
from hermes_async.planning.plan import Plan
from hermes_async.planning.resize import PlanChange, resized
from hermes_async.planning.workspace import LEAST_KV_TOKENS
from hermes_async.serving.draft_model import DraftModel, running_draft_model
from hermes_async.serving.kv_blocks import KVBlocks
from hermes_async.serving.lending import Lending
from hermes_async.serving.planned_model import PlannedModel, usable_bytes
from hermes_async.serving.resident_stages import ResidentStages
from hermes_async.serving.sweep_times import SweepTimes
from hermes_async.serving.turn_caches import SLOT_BYTES, TurnCaches
from hermes_async.storage.buffers import BufferLock, BufferPool
from hermes_async.storage.parking import ParkingFile
from hermes_async.storage.read_watch import ReadWatch
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.rows import ROWS_AT_ONCE, RowReader
from hermes_async.storage.tensor_spec import file_states
from hermes_async.storage.threads import DaemonExecutor, run_in_thread

WEIGHTS_HOLDER = "resident weights"
RING_HOLDER = "ring buffers"
EXPERTS_HOLDER = "experts"
WORKSPACE_HOLDER = "workspace"
HANGING_HOLDER = "reads that hang"
_KV = "KV"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an open engine holds.

    Attributes:
        governor: Of the whole budget. Weights, ring, KV and workspace have leases of it.
        weights: The lease of the resident weights.
        ring: The part of the governor for streamed stages. Loading agents wait for it.
        kv_memory: The part of the governor for KV. The first request of the queue waits for it.
        lock: Locks weights and the ring in memory, if the plan says so.
        lock_memory: The engine's option of this name.
        resident: Makes stages resident.
        lending: Lends weights what sequences do not need.
        rows: Reads rows of the partition's `row_tables`; None if there are none.
        blocks: The KV of sequences that are packed; unused where they run in turns.
        turns: Runs sequences in turns; None where all are packed.
    """

    planned: PlannedModel
    governor: MemoryGovernor
    weights: Lease
    ring: MemoryGovernor
    kv_memory: MemoryGovernor
    buffers: BufferPool
    lock: BufferLock
    lock_memory: LockMemory
    pipeline: Pipeline
    model: StreamedModel
    resident: ResidentStages
    lending: Lending
    rows: RowReader | None
    blocks: KVBlocks
    turns: Turns | None
    turn_caches: TurnCaches | None
    parking: ParkingFile
    times: SweepTimes
    draft_model: DraftModel | None
    trace: Trace | None

    @property
    def plan(self) -> Plan:
        """The plan, with what is really locked; see `BufferLock`."""
        plan = self.planned.plan
        if not plan.locked_bytes or self.lock.is_on:
            return plan
        return replace(plan, locked_bytes=0, lock_refusal="another part of this process has locked what was left")

    @property
    def bytes_for_everything(self) -> int:
        """The budget that keeps every stage and every expert in memory."""
        plan = self.planned.plan
        weights = sum(stage.slot_bytes for stage in plan.stages) + plan.partition.base.slot_bytes
        weights += all_expert_bytes(plan.expert_layers) if plan.partition.experts else 0
        return weights + plan.ring_bytes + plan.workspace_bytes + self._max_kv_bytes + self._draft_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches of sequences, unused prefixes included."""
        return self.kv_memory.budget_bytes - self.kv_memory.free_bytes - self.kv_memory.lent_bytes

    def memory(self) -> GovernorStatistics:
        """The leases of the budget. KV counts with the bytes in use, not with those set aside for it."""
        whole, kv = self.governor.statistics(), self.kv_memory.statistics()
        holders = Counter({holder: nbytes for holder, nbytes in whole.holders.items() if holder != _KV})
        holders.update(kv.holders)  # weights may have loans of both
        set_aside = whole.holders.get(_KV, 0)
        return replace(
            whole,
            bytes_in_use=whole.bytes_in_use - set_aside + kv.bytes_in_use,
            peak_bytes_in_use=whole.bytes_in_use - set_aside + kv.peak_bytes_in_use,
            num_leases=whole.num_leases - (_KV in whole.holders) + kv.num_leases,
            num_waiting=kv.num_waiting,
            holders=dict(holders),
        )

    # --- another budget ---

    async def resize(self, budget: int) -> None:
        """Changes the budget, between two sweeps.

        Raises:
            MemoryBudgetError: Too little for what cannot be freed, or the system has no more memory. All is as before.
            ReadTimeoutError: A read hangs, so its memory cannot be given to others. All is as before.

        Cancellation: afterwards the model can only be closed.
        """
        with self.pipeline.load_order.held_back():
            await self.pipeline.wait_for_reads()
            await self.lending.return_all()
            await self._resize(budget)

    async def _resize(self, budget: int) -> None:
        """As `resize`, while no stage is read."""
        before = self.planned.plan
        after = await self._with_locking(self._plan_for(budget))
        await self._claim(max(usable_bytes(plan, self.planned.draft) for plan in (before, after)))
        try:
            await self._apply(before, after)
        except MemoryBudgetError as error:
            raise MemoryBudgetError(
                f"the system does not give the memory for a budget of {format_bytes(budget)}: {error}",
                requested_bytes=budget,
                budget_bytes=before.memory_budget,
            ) from error
        finally:
            await self._claim(usable_bytes(self.planned.plan, self.planned.draft))

    def _plan_for(self, budget: int) -> Plan:
        blocks, skeleton = self.blocks, self.planned.skeleton
        least_tokens = min(skeleton.context_length or LEAST_KV_TOKENS, LEAST_KV_TOKENS) if skeleton.generates else 0
        kv_in_use = self.kv_bytes - blocks.unused_prefix_bytes
        return resized(
            self.planned.plan,
            budget,
            kv_least=max(kv_in_use, self._kv_bytes_of(least_tokens)),
            kv_most=self._max_kv_bytes,
            other_bytes=self._draft_bytes,
        )

    async def _with_locking(self, after: Plan) -> Plan:
        """Says what a new plan locks: as before, or nothing if the system does not lock what is added.

        Raises:
            MemoryBudgetError: It does not, and the engine's option is True.
        """
        before = self.plan
        if not before.locked_bytes:
            return replace(after, locked_bytes=0, lock_refusal=before.lock_refusal)
        added_bytes = after.lockable_bytes - before.lockable_bytes
        locked_bytes = before.locked_bytes + added_bytes
        if added_bytes <= 0:
            return replace(after, locked_bytes=locked_bytes)
        try:
            decided = await run_in_thread(locking, self.lock_memory, added_bytes)
        except ConfigError as error:
            raise MemoryBudgetError(
                f"a budget of {format_bytes(after.memory_budget)} cannot be kept in memory: {error}",
                requested_bytes=after.memory_budget,
                budget_bytes=before.memory_budget,
            ) from error
        return replace(after, locked_bytes=locked_bytes if decided.is_on else 0, lock_refusal=decided.refusal)

    def _kv_bytes_of(self, num_tokens: int) -> int:
        """Of a sequence; of an encoder-decoder, also of an input of as many tokens."""
        turns = self.planned.probe.turns
        input_bytes = 0 if turns is None else num_tokens * turns.input_token_bytes
        return self.planned.probe.cache.nbytes(num_tokens) + input_bytes

    async def _apply(self, before: Plan, after: Plan) -> None:
        """Frees memory that the new plan does not have, then takes memory that only the new plan has.

        Raises:
            MemoryBudgetError: The system gives no more memory. All is as before.
        """
        change = PlanChange.between(before, after)
        staying = before.resident - change.leaving
        if self.lock.is_on and not after.locked_bytes:
            self.lock.release()
            self.planned.plan = replace(before, locked_bytes=0, lock_refusal=after.lock_refusal)
        # They take memory at their first use. They are locked when what leaves is no longer.
        added_buffers = self.buffers.add(max(0, change.num_added_buffers), change.slot_bytes)
        with self.kv_memory.closed():  # new requests must not take the memory that is freed here
            await self.resident.set(staying)
            self.weights.shrink(change.leaving_bytes)
            kv_surplus = self.kv_memory.statistics().bytes_in_use - after.kv_bytes
            self.blocks.drop_unused(max(0, -(-kv_surplus // self.planned.probe.kv.block_bytes)))
            self.kv_memory.resize(min(before.kv_bytes, after.kv_bytes))
            await self.pipeline.resize_experts(change.expert_bytes)
        self.lock.add(added_buffers)
        self.governor.resize(after.memory_budget)
        if change.num_added_buffers > 0:
            self.ring.resize(after.ring_bytes, max_leases=after.num_buffers)
        self.weights.grow_nowait(change.coming_bytes)
        try:
            await self.resident.set(after.resident)
        except MemoryBudgetError:  # raised only if stages come, and then no stage has left
            await self.resident.set(staying)
            self.weights.shrink(change.coming_bytes)
            self.governor.resize(before.memory_budget)
            await self.pipeline.resize_experts(before.expert_bytes)
            raise
        if change.num_added_buffers < 0:
            await self._remove_ring()
        self.kv_memory.resize(after.kv_bytes)
        await self.pipeline.resize_experts(after.expert_bytes)
        self.planned.plan = after

    async def _remove_ring(self) -> None:
        """All stages are resident, so no buffer of the ring holds one."""
        with self.ring.closed():
            while self.ring.statistics().num_leases:  # an agent gives back what it was just granted
                await anyio.lowlevel.checkpoint()
            self.ring.resize(0, max_leases=0)
        self.buffers.remove_all()

    @property
    def _max_kv_bytes(self) -> int:
        return self.blocks.pool.num_blocks * self.blocks.pool.layout.block_bytes

    @property
    def _draft_bytes(self) -> int:
        draft = self.planned.draft
        return 0 if draft is None else draft.fixed_bytes + draft.kv_bytes

    async def _claim(self, nbytes: int) -> None:
        """Publishes what the engine may hold, on a thread: other processes read it from a file."""
        await run_in_thread(self.planned.claim.change, nbytes)


@asynccontextmanager
async def loaded_model(
    planned: PlannedModel, config: EngineConfig, trace: Trace | None = None
) -> AsyncGenerator[LoadedModel, None]:
    """Takes the plan's memory and starts the agents, which begin to load. Leaving undoes all of it in reverse order.

    Leaving gives up reads that hang. The governor keeps leases of their memory until their threads have returned.

    Args:
        trace: Records what the agents do.

    Raises:
        ReadError: A file could not be opened, or the draft model could not be read.
        MemoryBudgetError: The system does not give the memory.
    """
    plan, partition = planned.plan, planned.partition
    governor = MemoryGovernor(plan.memory_budget)
    watches: list[ReadWatch] = []

    def new_watch() -> ReadWatch:
        watches.append(ReadWatch(config.read_timeout))
        return watches[-1]

    async with AsyncExitStack() as exits:
        exits.callback(_lease_what_hangs, governor, watches)  # when all other leases have been given back
        weights = exits.enter_context(governor.acquire_nowait(WEIGHTS_HOLDER, plan.resident_bytes))
        ring = exits.enter_context(governor.part(RING_HOLDER, plan.ring_bytes, max_leases=plan.num_buffers))
        expert_memory = MemoryGovernor(0)
        if partition.experts:
            expert_memory = exits.enter_context(governor.part(EXPERTS_HOLDER, plan.expert_bytes))
        workspace = exits.enter_context(governor.acquire_nowait(WORKSPACE_HOLDER, plan.workspace_bytes))
        kv_memory = exits.enter_context(governor.part(_KV, plan.kv_bytes))
        planned.claim.leased = lambda: governor.budget_bytes - governor.free_bytes - kv_memory.free_bytes
        blocks = KVBlocks(KVPool(planned.probe.kv, plan.kv_bytes), kv_memory, share=config.share_prefixes)
        exits.callback(blocks.close)
        turns, turn_caches = None, None
        if planned.probe.turns is not None:
            layout = planned.probe.turns
            turns = Turns(planned.skeleton.model, layout.traits)
            drafts = config.prompt_lookup or planned.draft is not None
            turn_caches = TurnCaches(turns, layout, kv_memory, drafts=drafts)
        folder = None if config.parking_dir is None else Path(config.parking_dir)
        slot_bytes = planned.probe.kv.block_bytes if planned.probe.packs else SLOT_BYTES
        parking = ParkingFile(folder, slot_bytes, direct=config.direct_io, watch=new_watch())
        exits.push_async_callback(parking.aclose)
        read_statistics = ReadStatistics()
        lock = BufferLock(is_on=plan.locked_bytes > 0)
        exits.callback(lock.release)
        buffers = BufferPool(0, plan.slot_bytes)
        lock.add(buffers.add(plan.num_buffers, plan.slot_bytes))
        stages = _stages(planned)
        experts = _experts(planned)
        pipeline = Pipeline(
            stages,
            experts=ExpertCache(experts, expert_memory, lock),
            num_loading_agents=plan.num_loading_agents,
            ring=ring,
            buffers=buffers,
            lock=lock,
            statistics=read_statistics,
            direct=config.direct_io,
            trace=trace,
            file_states=file_states(planned.skeleton.tensors.values()),
            watch=new_watch(),
        )
        after_pipeline = exits.enter_context(ExitStack())  # closed after the pipeline has stopped
        await exits.enter_async_context(pipeline.running())
        # On a thread, because the agents are reading already and need the event loop.
        model = await run_in_thread(_streamed_model, planned, stages, pipeline)
        after_pipeline.callback(model.close)
        resident = ResidentStages(pipeline, model, len(plan.stages))
        lending = Lending(
            planned,
            governor,
            workspace=workspace,
            kv_memory=kv_memory,
            pipeline=pipeline,
            resident=resident,
        )
        after_pipeline.callback(lending.close)
        rows = None
        if partition.row_tables:
            executor = exits.enter_context(DaemonExecutor(ROWS_AT_ONCE, "hermes-row-reader"))
            tables = [table.spec for table in partition.row_tables]
            files, states = sorted({spec.file for spec in tables}), file_states(tables)
            reader = await exits.enter_async_context(
                Reader(files, executor, read_statistics, direct=config.direct_io, states=states, watch=new_watch())
            )
            usual_rows = most_rows(partition.row_tables, plan.max_tokens_per_sweep)
            rows = await exits.enter_async_context(RowReader(tables, reader, usual_rows, pipeline.load_order.held_back))
        draft_model = None
        if planned.draft is not None:
            vocab_size = planned.skeleton.vocab_size
            draft_model = await exits.enter_async_context(
                running_draft_model(
                    planned.draft,
                    governor,
                    read_statistics,
                    vocab_size,
                    direct=config.direct_io,
                    lock=lock,
                    watch=new_watch(),
                )
            )
        yield LoadedModel(
            planned=planned,
            governor=governor,
            weights=weights,
            ring=ring,
            kv_memory=kv_memory,
            buffers=buffers,
            lock=lock,
            lock_memory=config.lock_memory,
            pipeline=pipeline,
            model=model,
            resident=resident,
            lending=lending,
            rows=rows,
            blocks=blocks,
            turns=turns,
            turn_caches=turn_caches,
            parking=parking,
            times=SweepTimes(),
            draft_model=draft_model,
            trace=trace,
        )


def _lease_what_hangs(governor: MemoryGovernor, watches: Sequence[ReadWatch]) -> None:
    """Leases the memory that threads still read into, until each of them has returned."""
    loop = asyncio.get_running_loop()
    reads = [read for watch in watches for read in watch.under_way if read.views]
    num_readers = Counter(id(read.views[0]) for read in reads)  # several threads read rows into one buffer

    def release(lease: Lease) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody asks any more
            loop.call_soon_threadsafe(lease.release)

    for read in reads:
        nbytes = sum(map(len, read.views)) // num_readers[id(read.views[0])]
        lease = governor.acquire_nowait(HANGING_HOLDER, min(nbytes, governor.free_bytes))
        read.when_returned(partial(release, lease))


def _streamed_model(planned: PlannedModel, stages: Sequence[Stage], pipeline: Pipeline) -> StreamedModel:
    partition, model = planned.partition, planned.skeleton.model
    replace_linears(model, partition.linear_blocks)
    return StreamedModel(
        model,
        planned.attention,
        stages,
        experts=list(zip(partition.experts, pipeline.experts.layers, strict=True)),
        row_tables=partition.row_tables,
        encoded=partition.encoded,
        native_tokens=planned.plan.native_tokens,
        lays_out=planned.plan.layout_bytes > 0,
        products=planned.products,
        gate=pipeline,
    )


def _stages(planned: PlannedModel) -> list[Stage]:
    """The base, if it has tensors, and then the plan's stages."""
    base, plan = planned.partition.base, planned.plan
    stages = [Stage(0, base, resident=True)] if base.placements else []
    for idx, layout in enumerate(plan.stages):
        stages.append(Stage(len(stages), layout, resident=idx in plan.resident))
    return stages


def _experts(planned: PlannedModel) -> list[list[Stage]]:
    """The experts of each layer, with the index of the stage that is entered before them."""
    num_before = 1 if planned.partition.base.placements else 0
    return [
        [Stage(num_before + layer.position - 1, layout, resident=False, is_expert=True) for layout in layer.layouts]
        for layer in planned.partition.experts
    ]
