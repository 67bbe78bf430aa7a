"""The memory of sequences that run in turns: leases for transformers' own caches, which are also parked on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hermes_async.modeling.turn_state import map_tensors, tensors_of
from hermes_async.modeling.turns import TurnCache, TurnLayout, Turns
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.serving.caches import ParkedKV, Reservation, SequenceCaches
from hermes_async.storage.buffers import Buffer
from hermes_async.storage.parking import ParkingFile
from hermes_async.storage.threads import run_in_thread

SLOT_BYTES = 64 << 10
"""The slots of the parking file of a model that runs in turns."""

_STAGING_BYTES = 1 << 20


@dataclass(eq=False)
class TurnReservation(Reservation):
    """The cache of one sequence.

    Attributes:
        lease: Of the memory that it takes at most.
    """

    caches: TurnCaches
    cache: TurnCache
    lease: Lease
    num_reused: int = 0

    @property
    def length(self) -> int:
        return self.cache.length

    def advance(self, length: int, token_ids: Sequence[int]) -> None:
        self.cache.advance(length)

    def refresh(self, most: int) -> None:
        """Begins the sequence again if a call has left its cache incomplete."""
        if not self.cache.can_continue_from(self.length):
            self.cache.forget()

    def can_extend(self, length: int, token_ids: Sequence[int]) -> bool:
        return self.cache.can_continue_from(length)

    def extend(self, holder: str, length: int, capacity: int) -> bool:
        missing = max(0, self.caches.nbytes(capacity) - self.lease.nbytes)
        if not self.caches.can_grant(missing):
            return False
        self.lease.grow_nowait(missing)
        self.lease.holder = holder
        self.cache.length = self.num_reused = length
        return True

    def trim(self, holder: str) -> bool:
        if not (self.caches.traits.chunks and self.length and self.cache.can_continue_from(self.length)):
            return False
        self.lease.shrink(max(0, self.lease.nbytes - self.caches.nbytes(self.length)))
        self.lease.holder = holder
        return True

    def fork(self, holder: str) -> TurnReservation | None:
        nbytes = self.caches.nbytes(self.length)
        if not self.caches.can_grant(nbytes):
            return None
        lease = self.caches.lease(holder, nbytes)
        return TurnReservation(self.caches, self.cache.fork(), lease, self.length)

    def release(self) -> None:
        self.cache.forget()
        self.lease.release()

    async def park(self, parking: ParkingFile) -> ParkedKV:
        tensors = tensors_of(self.cache.contents)
        staging = _Staging(parking.slot_bytes)
        slots: list[int] = []
        try:
            for start in range(0, staging.num_slots(tensors), staging.most_slots):
                views = await run_in_thread(staging.fill, tensors, start)
                slots += await parking.write(views)
        except BaseException:
            parking.free(slots)
            raise
        finally:
            staging.close()
        outline = map_tensors(self.cache.contents, partial(torch.empty_like, device="meta"))
        return ParkedKV(slots, self.cache.with_contents(outline))

    async def unpark(self, parked: ParkedKV, length: int, token_ids: Sequence[int], parking: ParkingFile) -> None:
        assert parked.turn is not None
        if not parked.turn.can_continue_from(length):
            return
        contents = map_tensors(parked.turn.contents, partial(torch.empty_like, device="cpu"))
        tensors, staging = tensors_of(contents), _Staging(parking.slot_bytes)
        try:
            for start in range(0, len(parked.slots), staging.most_slots):
                slots = parked.slots[start : start + staging.most_slots]
                await parking.read(slots, staging.views[: len(slots)])
                await run_in_thread(staging.empty, tensors, start)
        finally:
            staging.close()
        self.cache = parked.turn.with_contents(contents)
        self.cache.length = self.num_reused = length


class TurnCaches(SequenceCaches):
    """Gives out the memory of caches of sequences that run in turns.

    Args:
        turns: Runs the model.
        governor: Of KV memory.
        drafts: Whether sequences may have drafted tokens.
    """

    def __init__(self, turns: Turns, layout: TurnLayout, governor: MemoryGovernor, *, drafts: bool) -> None:
        self.traits = turns.traits
        self._turns, self._layout, self._governor, self._drafts = turns, layout, governor, drafts

    def nbytes(self, capacity: int) -> int:
        return self._layout.nbytes(capacity)

    def reserve(
        self,
        holder: str,
        token_ids: Sequence[int],
        capacity: int,
        parked: ParkedKV | None = None,
        *,
        input_bytes: int = 0,
    ) -> TurnReservation | None:
        nbytes = self.nbytes(capacity) + input_bytes
        if not self.can_grant(nbytes):
            return None
        return TurnReservation(self, self._turns.new_cache(drafts=self._drafts), self.lease(holder, nbytes))

    def missing_bytes(
        self, token_ids: Sequence[int], capacity: int, kept: Reservation | None, parked: ParkedKV | None
    ) -> int:
        held = kept.lease.nbytes if isinstance(kept, TurnReservation) else 0
        return max(0, self.nbytes(capacity) - held)

    def can_grant(self, nbytes: int) -> bool:
        """Whether so many bytes are free, and nobody waits for them."""
        return self._governor.can_grant(nbytes)

    def lease(self, holder: str, nbytes: int) -> Lease:
        """Takes a lease; `can_grant` must hold."""
        return self._governor.acquire_nowait(holder, nbytes)


class _Staging:
    """Copies the bytes of tensors, one after another, to and from a piece of page-aligned memory.

    Attributes:
        views: The memory, one view for each slot.
    """

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self.most_slots = max(1, _STAGING_BYTES // slot_bytes)
        self._buffer = Buffer(self.most_slots * slot_bytes)
        self._memory = self._buffer.tensor(0, torch.uint8, (self._buffer.nbytes,))
        self.views = [self._buffer.view[idx * slot_bytes : (idx + 1) * slot_bytes] for idx in range(self.most_slots)]

    def num_slots(self, tensors: Sequence[torch.Tensor]) -> int:
        """How many slots the tensors take."""
        return -(-sum(tensor.nbytes for tensor in tensors) // self._slot_bytes)

    def fill(self, tensors: Sequence[torch.Tensor], first_slot: int) -> list[memoryview]:
        """Copies from the tensors; the views from `first_slot` on, as many as there is memory for."""
        end = 0
        with torch.inference_mode():
            for part, memory in self._pieces(tensors, first_slot):
                memory.copy_(part)
                end += len(part)
        return self.views[: -(-end // self._slot_bytes)]

    def empty(self, tensors: Sequence[torch.Tensor], first_slot: int) -> None:
        """Copies into the tensors, which are contiguous."""
        with torch.inference_mode():
            for part, memory in self._pieces(tensors, first_slot):
                part.copy_(memory)

    def close(self) -> None:
        self._buffer.close()

    def _pieces(self, tensors: Sequence[torch.Tensor], first_slot: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of each tensor that belong into the memory now, and their place there."""
        start, offset = first_slot * self._slot_bytes, 0
        for tensor in tensors:
            first, last = max(start, offset), min(start + len(self._memory), offset + tensor.nbytes)
            if first < last:
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                yield flat[first - offset : last - offset], self._memory[first - start : last - start]
            offset += tensor.nbytes
