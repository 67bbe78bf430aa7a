"""Who uses which KV block: what sequences hold of their own, and the prefixes that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from hermes_async.modeling.kv_cache import BLOCK_TOKENS, KVPool, SequenceKV, num_blocks
from hermes_async.pipeload.governor import Lease, MemoryGovernor


@dataclass(eq=False, slots=True)
class SharedBlock:
    """A block that any sequence with the same tokens up to its end may use; its contents never change once computed.

    Attributes:
        idx: Of the pool.
        tokens: The `BLOCK_TOKENS` tokens in it; those before are its parents'.
        computed: Its keys and values are there. Until then, whichever of its users comes first in a sweep computes it.
        num_users: Sequences that hold it. Without any it stays, if computed, until its memory is needed.
    """

    idx: int
    tokens: tuple[int, ...]
    parent: SharedBlock | None
    computed: bool = False
    num_users: int = 0
    children: dict[tuple[int, ...], SharedBlock] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Reservation:
    """The KV of one sequence: first its shared blocks, then blocks of its own, for which it has the lease.

    Attributes:
        num_reused: Tokens that were there, or on their way, when it was made.
    """

    kv: SequenceKV
    shared: list[SharedBlock]
    lease: Lease
    num_reused: int = 0

    @property
    def num_own(self) -> int:
        return len(self.kv.blocks) - len(self.shared)


class KVBlocks:
    """Hands out KV memory, and keeps prefixes for as long as there is room.

    Prefixes form a tree of blocks. A request's prompt takes the blocks that are there and adds its own full ones at
    once, so that requests that come together compute a common prefix once too. Blocks that fill up later are added
    when they are full. Shared blocks are leased once, under "shared prefixes".

    Event-loop side only; every method is synchronous.

    Args:
        share: Whether sequences share blocks at all.
    """

    def __init__(self, pool: KVPool, governor: MemoryGovernor, *, share: bool = True) -> None:
        self.pool = pool
        self.share = share
        self._governor = governor
        self._lease = governor.acquire_nowait("shared prefixes", 0)
        # All mutable state: the tree's root, which is no block itself; the blocks in it without a user, longest
        # unused first (whoever uses a block uses its parents, so children come before their parents); and counts.
        self._root = SharedBlock(-1, (), None)
        self._unused: dict[SharedBlock, None] = {}
        self.num_hits = 0
        self.num_hit_tokens = 0

    @property
    def kv_bytes(self) -> int:
        """Of all blocks in use, kept prefixes included."""
        return self.pool.num_used * self.pool.layout.block_bytes

    @property
    def unused_prefix_bytes(self) -> int:
        """Of prefixes that no sequence uses now."""
        return len(self._unused) * self.pool.layout.block_bytes

    @property
    def most_bytes(self) -> int:
        """Of the blocks that one sequence could have if no other had any; less after the budget has shrunk."""
        return (self._num_free() + self.pool.num_used) * self.pool.layout.block_bytes

    def num_shared(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens that a sequence begins with lie in shared blocks."""
        return len(self._match(token_ids)) * BLOCK_TOKENS

    def reserve(self, holder: str, token_ids: Sequence[int], capacity: int) -> Reservation | None:
        """Memory for a sequence that begins with `token_ids` and grows to `capacity` tokens.

        Prefixes that nobody uses are dropped for it, least recently used first. None where it does not fit now;
        nothing has changed then, but for dropped prefixes.
        """
        shared = self._match(token_ids)
        reservation = self._make(holder, shared, capacity)
        if reservation is None:
            return None
        kv = reservation.kv
        reservation.num_reused = len(shared) * BLOCK_TOKENS
        self.num_hits += bool(shared)
        self.num_hit_tokens += reservation.num_reused
        self.skip_computed(reservation, len(token_ids) - 1)
        if self.share:
            for idx in range(len(shared), len(token_ids) // BLOCK_TOKENS):
                if not self._add(reservation, idx, token_ids, computed=False):
                    break
        assert len(kv.blocks) >= len(reservation.shared)
        return reservation

    def reserve_own(self, holder: str, token_ids: Sequence[int], capacity: int) -> Reservation | None:
        """As `reserve`, but only computed blocks are taken over and none added: the caller fills in the rest."""
        shared = self._match(token_ids)
        computed = next((idx for idx, block in enumerate(shared) if not block.computed), len(shared))
        reservation = self._make(holder, shared[:computed], capacity)
        if reservation is not None:
            reservation.num_reused = reservation.kv.length = computed * BLOCK_TOKENS
        return reservation

    def extend(self, reservation: Reservation, length: int, capacity: int) -> bool:
        """Makes room for `capacity` tokens in all, the first `length` (all shared ones among them) kept.

        False where it does not fit now; nothing has changed then, but for dropped prefixes.
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

    def skip_computed(self, reservation: Reservation, most: int) -> None:
        """Moves a sequence's length over shared blocks that were computed meanwhile, up to `most` tokens."""
        kv = reservation.kv
        for block in reservation.shared[kv.length // BLOCK_TOKENS :]:
            end = (kv.length // BLOCK_TOKENS + 1) * BLOCK_TOKENS
            if not block.computed or end > most:
                return
            kv.length = end

    def commit(self, reservation: Reservation, token_ids: Sequence[int]) -> None:
        """Told that `reservation.kv.length` has grown: full blocks can be shared now.

        Args:
            token_ids: The sequence's tokens, at least `kv.length` of them.
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
        """Gives back the blocks behind the sequence's length."""
        kept = num_blocks(reservation.kv.length)
        own = max(kept, len(reservation.shared))
        self._free_own(reservation, own)
        while len(reservation.shared) > kept:
            reservation.kv.blocks.pop()
            self._let_go(reservation.shared.pop())

    def fork(self, holder: str, reservation: Reservation) -> Reservation:
        """The shared blocks of another sequence, for a new one; takes no memory."""
        num_full = min(len(reservation.shared), reservation.kv.length // BLOCK_TOKENS)
        shared = reservation.shared[:num_full]
        for block in shared:
            self._hold(block)
        kv = SequenceKV(self.pool, [block.idx for block in shared], num_full * BLOCK_TOKENS)
        return Reservation(kv, shared, self._governor.acquire_nowait(holder, 0), kv.length)

    def release(self, reservation: Reservation) -> None:
        """Gives everything back. No sweep may still use it."""
        self._free_own(reservation, len(reservation.shared))
        for block in reversed(reservation.shared):
            self._let_go(block)
        reservation.kv.blocks.clear()
        reservation.shared.clear()
        reservation.lease.release()

    def drop_unused(self, count: int | None = None) -> None:
        """Drops prefixes that nobody uses, least recently used first: `count` blocks, or all."""
        for block in list(islice(self._unused, count)):
            self._drop(block)

    def close(self) -> None:
        """Gives the pool's memory and the lease of the prefixes back."""
        self.drop_unused()
        self.pool.close()
        self._lease.release()

    # --- the tree ---

    def _match(self, token_ids: Sequence[int]) -> list[SharedBlock]:
        """The longest chain of blocks that these tokens begin with; the last token is always left to compute."""
        chain: list[SharedBlock] = []
        block = self._root
        for idx in range((len(token_ids) - 1) // BLOCK_TOKENS if self.share else 0):
            tokens = tuple(token_ids[idx * BLOCK_TOKENS : (idx + 1) * BLOCK_TOKENS])
            if (child := block.children.get(tokens)) is None:
                break
            chain.append(child)
            block = child
        return chain

    def _make(self, holder: str, shared: list[SharedBlock], capacity: int) -> Reservation | None:
        for block in shared:
            self._hold(block)  # first, so that making room does not drop them
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
        return True

    def _free_own(self, reservation: Reservation, kept: int) -> None:
        """Frees the sequence's own blocks behind the first `kept` of all."""
        surplus = reservation.kv.blocks[kept:]
        del reservation.kv.blocks[kept:]
        self.pool.free(surplus)
        reservation.lease.shrink(len(surplus) * self.pool.layout.block_bytes)

    def _num_free(self) -> int:
        return min(self.pool.num_blocks - self.pool.num_used, self._governor.free_bytes // self.pool.layout.block_bytes)

    def _add(self, reservation: Reservation, idx: int, token_ids: Sequence[int], *, computed: bool) -> bool:
        """Puts the sequence's own block `idx` into the tree; False where another sequence's is there."""
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

    def _drop(self, block: SharedBlock) -> None:
        assert block.num_users == 0 and not block.children and block.parent is not None
        del block.parent.children[block.tokens]
        del self._unused[block]
        self.pool.free([block.idx])
        self._lease.shrink(self.pool.layout.block_bytes)
