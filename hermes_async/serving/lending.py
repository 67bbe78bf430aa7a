"""Lends weights the memory that a plan sets aside for sequences, as long as these do not need it."""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from hermes_async.errors import HermesError, MemoryBudgetError
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.planning.planner import spread
from hermes_async.serving.planned_model import PlannedModel
from hermes_async.serving.resident_stages import ResidentStages, slots_of
from hermes_async.storage.buffers import align_up

logger = logging.getLogger(__name__)

HOLDER = "weights on loan"

SWEEPS_BEFORE_LENDING = 2
"""All of these must have left the memory unused, so the sweep of a prompt lends nothing. Each time that stages come or
go, the loads in progress are waited for."""


class _Spare(NamedTuple):
    """Bytes that sequences do not need: of KV memory, and of the workspace and what the plan has left over."""

    kv: int
    rest: int


class Lending:
    """Keeps more stages in memory than the plan does, in memory that is set aside for sequences.

    A plan sets memory aside for KV caches and for the longest sweep. Requests rely on it, but mostly need less. So
    stages that the plan streams stay there. That costs no read, because every sweep reads them anyway. Before a sweep
    or a request needs the memory, stages leave, as many as it takes. So nobody gets less than the plan promises.

    KV memory is lent only where sequences are packed. A fork copies a cache of transformers, and waits for no memory.

    All methods belong to the event loop, between two sweeps.

    Args:
        governor: Of the whole budget.
        workspace: The lease of the plan's workspace.
        kv_memory: The part of the governor for KV.
    """

    def __init__(
        self,
        planned: PlannedModel,
        governor: MemoryGovernor,
        *,
        workspace: Lease,
        kv_memory: MemoryGovernor,
        pipeline: Pipeline,
        resident: ResidentStages,
    ) -> None:
        self._planned = planned
        self._governor = governor
        self._workspace = workspace
        self._kv_memory = kv_memory
        self._pipeline = pipeline
        self._resident = resident
        # All mutable state: the stages that borrow, by their index in the plan; their memory that is not of KV, which
        # is leased here (that of KV is the loan of `kv_memory`); and what each of the last sweeps left unused.
        self._borrowers: frozenset[int] = frozenset()
        self._of_rest: Lease | None = None
        self._spares: deque[_Spare] = deque(maxlen=SWEEPS_BEFORE_LENDING)

    @property
    def lent_bytes(self) -> int:
        """Bytes of the stages that borrow."""
        return self._kv_memory.lent_bytes + self._rest_bytes

    @property
    def _rest_bytes(self) -> int:
        return 0 if self._of_rest is None else self._of_rest.nbytes

    async def before_sweep(self, activation_bytes: int) -> None:
        """Takes back what a sweep needs that has so many bytes of activations. Lends what the last sweeps left unused.

        Raises:
            ReadTimeoutError: A read hangs, so the memory of its stage cannot be given to others.

        Cancellation: as `ResidentStages.set`; only closing the model may follow.
        """
        if not self._planned.plan.lends:
            return
        spare = self._spare(activation_bytes)
        self._spares.append(spare)
        if spare.rest < self._rest_bytes:
            await self._return(_Spare(self._kv_memory.lent_bytes, spare.rest))
        elif len(self._spares) == SWEEPS_BEFORE_LENDING and self._may_lend:
            lasting = _Spare(min(one.kv for one in self._spares), min(one.rest for one in self._spares))
            if self._fitting(lasting) > self._borrowers:
                await self._lend_more(lasting)

    async def return_kv(self) -> bool:
        """Takes back the KV memory that a request waits for; returns whether there was any.

        Raises:
            ReadTimeoutError: As `before_sweep`.

        Cancellation: as `before_sweep`.
        """
        wanted = self._kv_memory.wanted_back_bytes
        if not wanted:
            return False
        self._spares.clear()
        await self._return(_Spare(self._kv_memory.lent_bytes - wanted, self._rest_bytes))
        return True

    async def return_all(self) -> None:
        """Takes everything back, before the plan changes. No stage may be read meanwhile.

        Cancellation: as `before_sweep`.
        """
        self._spares.clear()
        if self._borrowers:
            self._borrowers = frozenset()
            await self._resident.set(self._planned.plan.resident)
            self._borrow(0, 0)

    def close(self) -> None:
        """Ends all loans, when the pipeline has stopped."""
        self._borrow(0, 0)

    @property
    def _may_lend(self) -> bool:
        plan = self._planned.plan
        return plan.num_buffers > 0 and not self._kv_memory.is_waited_for

    def _spare(self, activation_bytes: int) -> _Spare:
        plan = self._planned.plan
        beside = align_up(self._planned.partition.cast_bytes) + plan.layout_bytes
        needed = min(plan.workspace_bytes, beside + activation_bytes)
        kv = self._kv_memory.free_bytes if self._planned.probe.turns is None else 0
        rest = self._governor.free_bytes + self._workspace.nbytes + self._rest_bytes - needed
        return _Spare(kv + self._kv_memory.lent_bytes, rest)

    def _fitting(self, spare: _Spare) -> frozenset[int]:
        """The stages that borrow: as before and more of them, or as many of those before as fit."""
        plan, room = self._planned.plan, spare.kv + spare.rest
        kept, possible = self._borrowers, sorted(set(range(len(plan.stages))) - plan.resident - self._borrowers)
        if slots_of(plan, kept) > room:
            kept, possible = frozenset(), sorted(kept)
        room -= slots_of(plan, kept)
        added = spread([plan.stages[idx] for idx in possible], room, len(possible))
        return kept | {possible[idx] for idx in added}

    async def _lend_more(self, spare: _Spare) -> None:
        """Lets further stages borrow what is spare."""
        before, before_bytes = self._borrowers, (self._kv_memory.lent_bytes, self._rest_bytes)
        self._borrowers = self._fitting(spare)
        self._borrow_for(spare)  # at once, because requests may take what is free while this waits
        try:
            with self._pipeline.load_order.held_back():
                await self._pipeline.wait_for_reads()
                await self._resident.set(self._planned.plan.resident | self._borrowers)
        except HermesError as error:
            self._borrowers = before
            with self._pipeline.load_order.held_back():
                await self._resident.set(self._planned.plan.resident | before)
            self._borrow(*before_bytes)
            if not isinstance(error, MemoryBudgetError):
                raise
            self._spares.clear()
            logger.warning("memory for sequences is not lent to weights: %s", error)

    async def _return(self, spare: _Spare) -> None:
        """Lets as many stages leave as have no room in what is spare."""
        borrowers = self._fitting(spare)
        with self._pipeline.load_order.held_back():
            await self._pipeline.wait_for_reads()
            self._borrowers = borrowers
            await self._resident.set(self._planned.plan.resident | borrowers)
        self._borrow_for(spare)

    def _borrow_for(self, spare: _Spare) -> None:
        """Borrows the bytes of all borrowers, first of KV memory."""
        nbytes = slots_of(self._planned.plan, self._borrowers)
        kv_bytes = min(nbytes, spare.kv)
        self._borrow(kv_bytes, nbytes - kv_bytes)

    def _borrow(self, kv_bytes: int, rest_bytes: int) -> None:
        """Sets how much is borrowed."""
        self._kv_memory.lend(HOLDER, kv_bytes)
        if not rest_bytes and self._of_rest is None:
            return
        lease = self._of_rest or self._governor.empty_lease(HOLDER)
        more = rest_bytes - lease.nbytes
        if more > 0:
            left_over = min(more, self._governor.free_bytes)
            lease.grow_nowait(left_over)
            self._workspace.give(more - left_over, lease)
        else:
            of_workspace = min(-more, self._planned.plan.workspace_bytes - self._workspace.nbytes)
            lease.give(of_workspace, self._workspace)
            lease.shrink(-more - of_workspace)
        self._of_rest = lease
        if not rest_bytes:
            lease.release()
            self._of_rest = None
