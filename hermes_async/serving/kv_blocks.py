"""Which sequence uses which KV block: its own blocks, and the prefixes that sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from hermes_async.modeling.kv_cache import BLOCK_TOKENS, KVPool, SequenceKV, num_blocks
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.serving.caches import ParkedKV, Reservation, SequenceCaches
from hermes_async.storage.parking import ParkingFile


@dataclass(eq=False, slots=True)
class SharedBlock:
    """A block for all sequences with the same tokens up to its end. Once computed it never changes.

    Attributes:
        idx: Index in the pool.
        tokens: Its `BLOCK_TOKENS` tokens; the tokens before them are in its parents.
        computed: It has its keys and values. Until then, the first of its users in a sweep computes it.
        num_users: Sequences that hold it. A computed block without users stays until its memory is needed.
    """

    idx: int
    tokens: tuple[int, ...]
    parent: SharedBlock | None
    computed: bool = False
    num_users: int = 0
    children: dict[tuple[int, ...], SharedBlock] = field(default_factory=dict)


@dataclass(eq=False)
class BlockReservation(Reservation):
    """The KV of one sequence: first its shared blocks, then its own blocks.

    Attributes:
        lease: Of its own blocks.
        num_reused: Tokens that it found in the cache, computed or being computed.
    """

    blocks: KVBlocks
    kv: SequenceKV
    shared: list[SharedBlock]
    lease: Lease
    num_reused: int = 0

    @property
    def length(self) -> int:
        return self.kv.length

    def advance(self, length: int, token_ids: Sequence[int]) -> None:
        self.kv.length = length
        self.blocks.commit(self, token_ids)

    def refresh(self, most: int) -> None:
        self.skip_computed(most)

    def can_extend(self, length: int, token_ids: Sequence[int]) -> bool:
        """Not if they differ within shared blocks, or if other sequences share more with `token_ids`."""
        return length >= max(len(self.shared) * BLOCK_TOKENS, self.blocks.num_shared(token_ids))

    def extend(self, holder: str, length: int, capacity: int) -> bool:
        if not self.blocks.extend(self, length, capacity):
            return False
        self.lease.holder = holder
        return True

    def trim(self, holder: str) -> bool:
        self.blocks.trim(self)
        self.lease.holder = holder
        return True

    def fork(self, holder: str) -> BlockReservation:
        return self.blocks.fork(holder, self)

    def release(self) -> None:
        self.blocks.release(self)

    async def park(self, parking: ParkingFile) -> ParkedKV:
        pool = self.blocks.pool
        return ParkedKV(await parking.write([pool.block(idx) for idx in self.kv.blocks[: num_blocks(self.length)]]))

    async def unpark(self, parked: ParkedKV, length: int, token_ids: Sequence[int], parking: ParkingFile) -> None:
        first, end = self.length // BLOCK_TOKENS, num_blocks(length)
        if first < end:
            views = [self.blocks.pool.block(idx) for idx in self.kv.blocks[first:end]]
            await parking.read(parked.slots[first:end], views)
            self.num_reused = length
            self.advance(length, token_ids)

    @property
    def num_own(self) -> int:
        return len(self.kv.blocks) - len(self.shared)

    def skip_computed(self, most: int) -> None:
        """Moves the sequence's length over shared blocks that others have computed, up to `most` tokens."""
        for block in self.shared[self.kv.length // BLOCK_TOKENS :]:
            end = (self.kv.length // BLOCK_TOKENS + 1) * BLOCK_TOKENS
            if not block.computed or end > most:
                return
            self.kv.length = end


class KVBlocks(SequenceCaches):
    """Allocates KV memory, and keeps prefixes while there is room. Event-loop side only.

    Prefixes form a tree of blocks. A prompt takes the blocks that match it, and adds its other full blocks at once: so
    requests that arrive together compute a common prefix once. A block that fills up later is added then. Shared blocks
    are leased once, under "shared prefixes".

    Args:
        share: Whether sequences share blocks.
    """

    def __init__(self, pool: KVPool, governor: MemoryGovernor, *, share: bool = True) -> None:
        self.pool = pool
        self.share = share
        self._governor = governor
        self._lease = governor.empty_lease("shared prefixes")
        # All mutable state: the tree's root, which is no block; the blocks without users, the longest unused first
        # (children before their parents, because a user of a block uses its parents too); and counts.
        self._root = SharedBlock(-1, (), None)
        self._unused: dict[SharedBlock, None] = {}
        self.num_hits = 0
        self.num_hit_tokens = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of all blocks in use, unused prefixes included."""
        return self.pool.num_used * self.pool.layout.block_bytes

    @property
    def unused_prefix_bytes(self) -> int:
        """Bytes of prefixes that no sequence uses now."""
        return len(self._unused) * self.pool.layout.block_bytes

    @property
    def is_short(self) -> bool:
        """Whether a sequence waits for room."""
        return self._governor.shortfall_bytes > 0

    def num_shared(self, token_ids: Sequence[int], *, computed: bool = False) -> int:
        """How many of these first tokens of a sequence are in shared blocks, or in computed ones."""
        return len(self._match(token_ids, computed=computed)) * BLOCK_TOKENS

    def nbytes(self, capacity: int) -> int:
        return self.pool.layout.nbytes(capacity)

    def reserve(
        self,
        holder: str,
        token_ids: Sequence[int],
        capacity: int,
        parked: ParkedKV | None = None,
        *,
        input_bytes: int = 0,
    ) -> BlockReservation | None:
        """As `SequenceCaches.reserve`. It drops unused prefixes if needed, the least recently used first.

        For a sequence on disk it takes only computed blocks and adds none: `unpark` fills the others.
        """
        shared = self._match(token_ids, computed=parked is not None)
        reservation = self._make(holder, shared, capacity)
        if reservation is None:
            return None
        reservation.num_reused = len(shared) * BLOCK_TOKENS
        if parked is not None:
            reservation.kv.length = reservation.num_reused
            return reservation
        self.num_hits += bool(shared)
        self.num_hit_tokens += reservation.num_reused
        reservation.skip_computed(len(token_ids) - 1)
        if self.share:
            for idx in range(len(shared), len(token_ids) // BLOCK_TOKENS):
                if not self._add(reservation, idx, token_ids, computed=False):
                    break
        assert len(reservation.kv.blocks) >= len(reservation.shared)
        return reservation

    def missing_bytes(
        self, token_ids: Sequence[int], capacity: int, kept: Reservation | None, parked: ParkedKV | None
    ) -> int:
        count = num_blocks(capacity)
        if isinstance(kept, BlockReservation):
            count -= len(kept.kv.blocks)
        else:
            count -= self.num_shared(token_ids, computed=parked is not None) // BLOCK_TOKENS
        return count * self.pool.layout.block_bytes

    def make_room(self, nbytes: int) -> None:
        """Drops unused prefixes until so many bytes are free or lent, or none is left."""
        missing = nbytes - self._governor.free_bytes - self._governor.lent_bytes
        self.drop_unused(max(0, -(-missing // self.pool.layout.block_bytes)))

    def extend(self, reservation: BlockReservation, length: int, capacity: int) -> bool:
        """Keeps the first `length` tokens, all shared ones among them, and makes room for `capacity` tokens in all.

        False if that does not fit now; only unused prefixes may have been dropped then.
        """
        kv = reservation.kv
        assert len(reservation.shared) * BLOCK_TOKENS <= length <= kv.length
        missing = max(0, num_blocks(capacity) - len(kv.blocks))
        if not self._make_room(missing):
            return False
        blocks = self.pool.allocate(missing)
        reservation.lease.grow_nowait(missing * self.pool.layout.block_bytes)
        kv.blocks += blocks
        reservation.num_reused = kv.length = length
        return True

    def commit(self, reservation: BlockReservation, token_ids: Sequence[int]) -> None:
        """Shares the blocks that are full now, after `reservation.kv.length` has grown.

        Args:
            token_ids: At least the first `kv.length` tokens of the sequence.
        """
        num_full = reservation.kv.length // BLOCK_TOKENS
        for block in reversed(reservation.shared[:num_full]):
            if block.computed:
                break
            block.computed = True
        if self.share:
            for idx in range(len(reservation.shared), num_full):
                if not self._add(reservation, idx, token_ids, computed=True):
                    return

    def trim(self, reservation: BlockReservation) -> None:
        """Frees the blocks after the sequence's length."""
        kept = num_blocks(reservation.kv.length)
        own = max(kept, len(reservation.shared))
        self._free_own(reservation, own)
        while len(reservation.shared) > kept:
            reservation.kv.blocks.pop()
            self._let_go(reservation.shared.pop())

    def fork(self, holder: str, reservation: BlockReservation) -> BlockReservation:
        """A reservation of the same shared blocks, for a new sequence; takes no memory."""
        num_full = min(len(reservation.shared), reservation.kv.length // BLOCK_TOKENS)
        shared = reservation.shared[:num_full]
        for block in shared:
            self._hold(block)
        kv = SequenceKV(self.pool, [block.idx for block in shared], num_full * BLOCK_TOKENS)
        return BlockReservation(self, kv, shared, self._governor.empty_lease(holder), kv.length)

    def release(self, reservation: BlockReservation) -> None:
        """Gives everything back. No sweep may still use it."""
        self._free_own(reservation, len(reservation.shared))
        for block in reversed(reservation.shared):
            self._let_go(block)
        reservation.kv.blocks.clear()
        reservation.shared.clear()
        reservation.lease.release()

    def drop_unused(self, count: int | None = None) -> None:
        """Drops `count` unused blocks of prefixes, or all, the least recently used first."""
        for block in list(islice(self._unused, count)):
            self._drop(block)

    def close(self) -> None:
        """Frees the pool's memory, and releases the lease of the prefixes."""
        self.drop_unused()
        self.pool.close()
        self._lease.release()

    # --- the tree ---

    def _match(self, token_ids: Sequence[int], *, computed: bool = False) -> list[SharedBlock]:
        """The longest chain of blocks that matches these tokens without the last one, which must be computed."""
        chain: list[SharedBlock] = []
        block = self._root
        for idx in range((len(token_ids) - 1) // BLOCK_TOKENS if self.share else 0):
            tokens = tuple(token_ids[idx * BLOCK_TOKENS : (idx + 1) * BLOCK_TOKENS])
            child = block.children.get(tokens)
            if child is None or (computed and not child.computed):
                break
            chain.append(child)
            block = child
        return chain

    def _make(self, holder: str, shared: list[SharedBlock], capacity: int) -> BlockReservation | None:
        for block in shared:
            self._hold(block)  # before `_make_room`, which drops unused blocks
        wanted = num_blocks(capacity) - len(shared)
        own: list[int] | None = None
        try:
            if self._make_room(wanted):
                own = self.pool.allocate(wanted)
        finally:
            if own is None:
                for block in reversed(shared):
                    self._let_go(block)
        if own is None:
            return None
        lease = self._governor.acquire_nowait(holder, wanted * self.pool.layout.block_bytes)
        kv = SequenceKV(self.pool, [*(block.idx for block in shared), *own])
        return BlockReservation(self, kv, list(shared), lease)

    def _make_room(self, count: int) -> bool:
        missing = max(0, count - self._num_free())
        if missing > len(self._unused):
            return False
        if missing and self._governor.lent_bytes:  # this comes back before prefixes are dropped
            return False
        self.drop_unused(missing)
        return self._governor.can_grant(count * self.pool.layout.block_bytes)

    def _free_own(self, reservation: BlockReservation, kept: int) -> None:
        """Frees all blocks after the first `kept`. They are the sequence's own."""
        surplus = reservation.kv.blocks[kept:]
        del reservation.kv.blocks[kept:]
        self.pool.free(surplus)
        reservation.lease.shrink(len(surplus) * self.pool.layout.block_bytes)

    def _num_free(self) -> int:
        return min(self.pool.num_blocks - self.pool.num_used, self._governor.free_bytes // self.pool.layout.block_bytes)

    def _add(self, reservation: BlockReservation, idx: int, token_ids: Sequence[int], *, computed: bool) -> bool:
        """Puts the sequence's own block `idx` into the tree; False if the tree has such a block already."""
        tokens = tuple(token_ids[idx * BLOCK_TOKENS : (idx + 1) * BLOCK_TOKENS])
        parent = reservation.shared[-1] if reservation.shared else self._root
        if tokens in parent.children:
            return False
        block = SharedBlock(reservation.kv.blocks[idx], tokens, parent, computed, num_users=1)
        parent.children[tokens] = block
        reservation.shared.append(block)
        reservation.lease.give(self.pool.layout.block_bytes, self._lease)
        return True

    def _hold(self, block: SharedBlock) -> None:
        self._unused.pop(block, None)
        block.num_users += 1

    def _let_go(self, block: SharedBlock) -> None:
        block.num_users -= 1
        if block.num_users == 0:
            self._unused[block] = None
            if not block.computed:
                self._drop(block)
            elif self.is_short:
                self.drop_unused(1)

    def _drop(self, block: SharedBlock) -> None:
        assert block.num_users == 0 and not block.children and block.parent is not None
        del block.parent.children[block.tokens]
        del self._unused[block]
        self.pool.free([block.idx])
        self._lease.shrink(self.pool.layout.block_bytes)
