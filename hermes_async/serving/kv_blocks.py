"""Which sequence uses which KV block: its own blocks, and the prefixes that sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from hermes_async.modeling.kv_cache import BLOCK_TOKENS, KVPool, SequenceKV, num_blocks
from hermes_async.pipeload.governor import Lease, MemoryGovernor


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


@dataclass(eq=False, slots=True)
class Reservation:
    """The KV of one sequence: first its shared blocks, then its own blocks.

    Attributes:
        lease: Of its own blocks.
        num_reused: Tokens that it found in the cache, computed or being computed.
    """

    kv: SequenceKV
    shared: list[SharedBlock]
    lease: Lease
    num_reused: int = 0

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


class KVBlocks:
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
    def most_bytes(self) -> int:
        """Bytes that one sequence could have if there were no others; less after the budget has shrunk."""
        return min(self.pool.num_blocks * self.pool.layout.block_bytes, self._governor.budget_bytes)

    @property
    def is_short(self) -> bool:
        """Whether a sequence waits for room."""
        return self._governor.shortfall_bytes > 0

    def num_shared(self, token_ids: Sequence[int], *, computed: bool = False) -> int:
        """How many of these first tokens of a sequence are in shared blocks, or in computed ones."""
        return len(self._match(token_ids, computed=computed)) * BLOCK_TOKENS

    def reserve(self, holder: str, token_ids: Sequence[int], capacity: int) -> Reservation | None:
        """Reserves memory for a sequence that begins with `token_ids` and grows to `capacity` tokens.

        It drops unused prefixes if needed, the least recently used first. None if the sequence does not fit now.
        """
        shared = self._match(token_ids)
        reservation = self._make(holder, shared, capacity)
        if reservation is None:
            return None
        kv = reservation.kv
        reservation.num_reused = len(shared) * BLOCK_TOKENS
        self.num_hits += bool(shared)
        self.num_hit_tokens += reservation.num_reused
        reservation.skip_computed(len(token_ids) - 1)
        if self.share:
            for idx in range(len(shared), len(token_ids) // BLOCK_TOKENS):
                if not self._add(reservation, idx, token_ids, computed=False):
                    break
        assert len(kv.blocks) >= len(reservation.shared)
        return reservation

    def reserve_own(self, holder: str, token_ids: Sequence[int], capacity: int) -> Reservation | None:
        """As `reserve`, but takes only computed blocks and adds none: the caller fills the others."""
        shared = self._match(token_ids, computed=True)
        reservation = self._make(holder, shared, capacity)
        if reservation is not None:
            reservation.num_reused = reservation.kv.length = len(shared) * BLOCK_TOKENS
        return reservation

    async def wait_for_room(self, holder: str, num_missing: int) -> None:
        """Waits at the governor until `num_missing` blocks are free. Prefixes that become unused are dropped for it.

        Raises:
            MemoryBudgetError: More than all KV memory.

        Cancellation: the wait leaves the governor's queue and holds nothing.
        """
        self.drop_unused(max(0, num_missing - self._num_free()))
        lease = await self._governor.acquire(holder, num_missing * self.pool.layout.block_bytes)
        lease.release()  # `reserve` or `extend` takes it again at once, together with the blocks

    def extend(self, reservation: Reservation, length: int, capacity: int) -> bool:
        """Keeps the first `length` tokens, all shared ones among them, and makes room for `capacity` tokens in all.

        False if that does not fit now; only unused prefixes may have been dropped then.
        """
        kv = reservation.kv
        assert len(reservation.shared) * BLOCK_TOKENS <= length <= kv.length
        missing = max(0, num_blocks(capacity) - len(kv.blocks))
        if not self._make_room(missing):
            return False
        reservation.lease.grow_nowait(missing * self.pool.layout.block_bytes)
        kv.blocks += self.pool.allocate(missing)
        reservation.num_reused = kv.length = length
        return True

    def commit(self, reservation: Reservation, token_ids: Sequence[int]) -> None:
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

    def trim(self, reservation: Reservation) -> None:
        """Frees the blocks after the sequence's length."""
        kept = num_blocks(reservation.kv.length)
        own = max(kept, len(reservation.shared))
        self._free_own(reservation, own)
        while len(reservation.shared) > kept:
            reservation.kv.blocks.pop()
            self._let_go(reservation.shared.pop())

    def fork(self, holder: str, reservation: Reservation) -> Reservation:
        """A reservation of the same shared blocks, for a new sequence; takes no memory."""
        num_full = min(len(reservation.shared), reservation.kv.length // BLOCK_TOKENS)
        shared = reservation.shared[:num_full]
        for block in shared:
            self._hold(block)
        kv = SequenceKV(self.pool, [block.idx for block in shared], num_full * BLOCK_TOKENS)
        return Reservation(kv, shared, self._governor.empty_lease(holder), kv.length)

    def release(self, reservation: Reservation) -> None:
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

    def _make(self, holder: str, shared: list[SharedBlock], capacity: int) -> Reservation | None:
        for block in shared:
            self._hold(block)  # before `_make_room`, which drops unused blocks
        wanted = num_blocks(capacity) - len(shared)
        if not self._make_room(wanted):
            for block in reversed(shared):
                self._let_go(block)
            return None
        lease = self._governor.acquire_nowait(holder, wanted * self.pool.layout.block_bytes)
        kv = SequenceKV(self.pool, [*(block.idx for block in shared), *self.pool.allocate(wanted)])
        return Reservation(kv, list(shared), lease)

    def _make_room(self, count: int) -> bool:
        missing = count - self._num_free()
        if missing > len(self._unused):
            return False
        self.drop_unused(max(0, missing))
        return self._governor.can_grant(count * self.pool.layout.block_bytes)

    def _free_own(self, reservation: Reservation, kept: int) -> None:
        """Frees all blocks after the first `kept`. They are the sequence's own."""
        surplus = reservation.kv.blocks[kept:]
        del reservation.kv.blocks[kept:]
        self.pool.free(surplus)
        reservation.lease.shrink(len(surplus) * self.pool.layout.block_bytes)

    def _num_free(self) -> int:
        return min(self.pool.num_blocks - self.pool.num_used, self._governor.free_bytes // self.pool.layout.block_bytes)

    def _add(self, reservation: Reservation, idx: int, token_ids: Sequence[int], *, computed: bool) -> bool:
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
