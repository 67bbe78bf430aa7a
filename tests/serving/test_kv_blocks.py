"""Who has which KV block: examples to read, and whatever is reserved, computed, forked and given back in any order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hermes_async.modeling.kv_cache import BLOCK_TOKENS, KVLayout, KVPool, KVShape, num_blocks
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.serving.caches import ParkedKV
from hermes_async.serving.kv_blocks import BlockReservation, KVBlocks, SharedBlock

LAYOUT = KVLayout({0: KVShape(1, 1, 1, 1)}, torch.float32)
BLOCK = LAYOUT.block_bytes
NUM_BLOCKS = 12


@pytest.fixture
def governor() -> MemoryGovernor:
    return MemoryGovernor(NUM_BLOCKS * BLOCK)


@pytest.fixture
def blocks(governor: MemoryGovernor) -> Iterator[KVBlocks]:
    with closing(KVBlocks(KVPool(LAYOUT, NUM_BLOCKS * BLOCK), governor)) as blocks:
        yield blocks


def prompt(*letters: str, rest: int = 1) -> list[int]:
    """A block of tokens for each letter, and the begin of another."""
    return [ord(letter) for letter in letters for _ in range(BLOCK_TOKENS)] + [0] * rest


def reserved(blocks: KVBlocks, token_ids: list[int], capacity: int | None = None) -> BlockReservation:
    reservation = blocks.reserve("KV of someone", token_ids, capacity or len(token_ids))
    assert reservation is not None
    return reservation


def compute(blocks: KVBlocks, reservation: BlockReservation, token_ids: list[int]) -> None:
    """As a sweep does that takes all of the prompt."""
    reservation.kv.length = len(token_ids)
    blocks.commit(reservation, token_ids)


def leased(governor: MemoryGovernor) -> dict[str, int]:
    """By holder, in blocks."""
    return {holder: nbytes // BLOCK for holder, nbytes in governor.statistics().holders.items()}


# Prompts with a common beginning


def test_two_prompts_with_a_common_beginning_share_its_blocks(blocks: KVBlocks) -> None:
    ours, theirs = prompt("a", "b", "c"), prompt("a", "b", "d")
    first = reserved(blocks, ours)
    compute(blocks, first, ours)
    second = reserved(blocks, theirs)
    assert second.kv.blocks[:2] == first.kv.blocks[:2]
    assert not set(second.kv.blocks[2:]) & set(first.kv.blocks)
    assert (second.num_reused, second.kv.length) == (32, 32)
    assert (blocks.num_hits, blocks.num_hit_tokens) == (1, 32)
    assert blocks.pool.num_used == 4 + 2


def test_two_that_come_together_compute_it_once(blocks: KVBlocks) -> None:
    """What the first has not computed yet is on its way: whichever comes first in a sweep computes it."""
    token_ids = prompt("a", "b")
    first, second = reserved(blocks, token_ids), reserved(blocks, token_ids)
    assert second.kv.blocks[:2] == first.kv.blocks[:2]
    assert (second.num_reused, second.kv.length) == (32, 0)
    compute(blocks, first, token_ids)
    second.skip_computed(len(token_ids) - 1)
    assert second.kv.length == 32


def test_the_last_token_is_always_left_to_compute(blocks: KVBlocks) -> None:
    """Its logits are wanted, and for these it has to be in a sweep."""
    token_ids = prompt("a", "b", rest=0)
    compute(blocks, reserved(blocks, token_ids), token_ids)
    second = reserved(blocks, token_ids)
    assert (len(second.shared), second.kv.length) == (1, 16)


def test_the_last_token_is_left_even_where_another_computes_its_block(blocks: KVBlocks) -> None:
    ours = prompt("a", "b", rest=0)
    first, second = reserved(blocks, ours), reserved(blocks, prompt("a", "b"))
    compute(blocks, second, prompt("a", "b"))
    first.skip_computed(len(ours) - 1)
    assert first.kv.length == 16


def test_a_twin_block_stays_private(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    """Two sequences come to the same blocks by themselves: the tree has room for those of one of them."""
    first, second = reserved(blocks, prompt("a"), 48), reserved(blocks, prompt("a"), 48)
    token_ids = prompt("a", "b", "c", rest=0)
    compute(blocks, first, token_ids)
    compute(blocks, second, token_ids)
    assert (len(first.shared), len(second.shared)) == (3, 1)
    assert not set(second.kv.blocks[1:]) & set(first.kv.blocks)
    assert leased(governor) == {"shared prefixes": 3, "KV of someone": 2}
    blocks.release(first)
    blocks.drop_unused()
    blocks.commit(second, token_ids)  # now there is
    assert len(second.shared) == 3


def test_blocks_that_fill_up_later_are_shared_then(blocks: KVBlocks) -> None:
    token_ids = prompt("a")
    first = reserved(blocks, token_ids, 40)
    compute(blocks, first, token_ids)
    assert len(first.shared) == 1
    token_ids = prompt("a", "b")
    compute(blocks, first, token_ids)
    assert len(reserved(blocks, token_ids).shared) == 2


def test_sharing_can_be_switched_off() -> None:
    governor = MemoryGovernor(8 * BLOCK)
    with closing(KVBlocks(KVPool(LAYOUT, 8 * BLOCK), governor, share=False)) as blocks:
        token_ids = prompt("a", "b")
        first = reserved(blocks, token_ids)
        compute(blocks, first, token_ids)
        second = reserved(blocks, token_ids)
        assert not set(first.kv.blocks) & set(second.kv.blocks)
        assert (second.num_reused, blocks.num_hits) == (0, 0)
        assert leased(governor) == {"KV of someone": 6, "shared prefixes": 0}
        blocks.release(first)
        blocks.release(second)
        assert blocks.kv_bytes == 0


# Prefixes that nobody uses


def test_a_prefix_outlives_the_sequences_that_used_it(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    token_ids = prompt("a", "b")
    first = reserved(blocks, token_ids)
    compute(blocks, first, token_ids)
    blocks.release(first)
    assert (blocks.unused_prefix_bytes, blocks.kv_bytes) == (2 * BLOCK, 2 * BLOCK)
    assert leased(governor) == {"shared prefixes": 2}
    assert reserved(blocks, token_ids).kv.length == 32
    assert blocks.unused_prefix_bytes == 0


def test_an_uncomputed_block_of_an_ended_sequence_goes(blocks: KVBlocks) -> None:
    token_ids = prompt("a", "b")
    first = reserved(blocks, token_ids)
    first.kv.length = 20  # a sweep took so many tokens
    blocks.commit(first, token_ids)
    blocks.release(first)
    assert blocks.kv_bytes == BLOCK
    assert len(reserved(blocks, token_ids).shared) == 2
    assert (blocks.num_hits, blocks.num_hit_tokens) == (1, 16)


def test_an_uncomputed_block_stays_for_who_waits_for_it(blocks: KVBlocks) -> None:
    token_ids = prompt("a", "b")
    first, second = reserved(blocks, token_ids), reserved(blocks, token_ids)
    blocks.release(first)
    assert blocks.kv_bytes == 3 * BLOCK
    compute(blocks, second, token_ids)
    assert reserved(blocks, token_ids).kv.length == 32


def test_for_a_new_sequence_the_longest_unused_prefix_is_dropped_first(blocks: KVBlocks) -> None:
    for letter in "abc":
        token_ids = prompt(letter, letter.upper())
        sequence = reserved(blocks, token_ids)
        compute(blocks, sequence, token_ids)
        blocks.release(sequence)
    blocks.release(reserved(blocks, prompt("a", "A")))  # used again
    reserved(blocks, prompt("x"), (NUM_BLOCKS - 5) * BLOCK_TOKENS)  # one block more than is free
    assert [blocks.num_shared(prompt(letter, letter.upper())) for letter in "abc"] == [32, 16, 32]


def test_a_prefix_is_not_dropped_for_the_sequence_that_needs_it(blocks: KVBlocks) -> None:
    token_ids = prompt("a", "b")
    first = reserved(blocks, token_ids)
    compute(blocks, first, token_ids)
    blocks.release(first)
    assert blocks.reserve("too long", token_ids, (NUM_BLOCKS + 1) * BLOCK_TOKENS) is None
    assert blocks.unused_prefix_bytes == 2 * BLOCK
    assert len(reserved(blocks, token_ids, NUM_BLOCKS * BLOCK_TOKENS).shared) == 2


def test_what_does_not_fit_changes_nothing(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    reserved(blocks, prompt("a"), 8 * BLOCK_TOKENS)
    before = leased(governor)
    assert blocks.reserve("another", prompt("b"), 5 * BLOCK_TOKENS) is None
    assert leased(governor) == before
    assert blocks.pool.num_used == 8


def test_memory_of_others_is_respected(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    with governor.acquire_nowait("others", 10 * BLOCK):
        assert blocks.reserve("KV", prompt("a"), 3 * BLOCK_TOKENS) is None
        reserved(blocks, prompt("a"), 2 * BLOCK_TOKENS)
    reserved(blocks, prompt("b"), 3 * BLOCK_TOKENS)


# Sequences that go on: sessions


def test_prefixes_stay_for_what_a_loan_gives_back(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    token_ids = prompt("a", "b")
    old = reserved(blocks, token_ids)
    compute(blocks, old, token_ids)
    blocks.release(old)
    governor.lend("weights", (NUM_BLOCKS - 3) * BLOCK)
    assert blocks.reserve("KV of someone", [1], 2 * BLOCK_TOKENS) is None
    blocks.make_room(2 * BLOCK)
    assert leased(governor) == {"shared prefixes": 2, "weights": NUM_BLOCKS - 3}
    blocks.make_room(NUM_BLOCKS * BLOCK)  # more than the loan
    assert leased(governor) == {"shared prefixes": 0, "weights": NUM_BLOCKS - 3}
    governor.lend("weights", 0)
    assert reserved(blocks, [1], NUM_BLOCKS * BLOCK_TOKENS).num_own == NUM_BLOCKS


def test_trimmed_a_sequence_keeps_what_it_has_computed(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    token_ids = prompt("a", "b")
    turn = reserved(blocks, token_ids, 100)
    assert turn.num_own == 5
    compute(blocks, turn, token_ids)
    blocks.trim(turn)
    assert (len(turn.kv.blocks), turn.num_own) == (3, 1)
    assert leased(governor) == {"shared prefixes": 2, "KV of someone": 1}


def test_trimmed_it_leaves_alone_what_it_has_not(blocks: KVBlocks) -> None:
    token_ids = prompt("a", "b", "c")
    turn = reserved(blocks, token_ids)
    turn.kv.length = 20
    blocks.commit(turn, token_ids)
    blocks.trim(turn)
    assert len(turn.kv.blocks) == 2
    assert blocks.kv_bytes == 2 * BLOCK


def test_extended_it_keeps_its_beginning_and_grows(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    token_ids = prompt("a", "b", rest=5)
    turn = reserved(blocks, token_ids)
    compute(blocks, turn, token_ids)
    blocks.trim(turn)
    table = list(turn.kv.blocks)
    assert blocks.extend(turn, 35, 80)  # two of the five tokens were edited
    assert turn.kv.blocks[:3] == table
    assert (turn.kv.length, turn.num_reused, turn.kv.capacity) == (35, 35, 80)
    assert leased(governor) == {"shared prefixes": 2, "KV of someone": 3}
    assert not blocks.extend(turn, 35, (NUM_BLOCKS + 1) * BLOCK_TOKENS)
    assert turn.kv.capacity == 80


def test_a_fork_takes_no_memory(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    token_ids = prompt("a", "b", rest=5)
    trunk = reserved(blocks, token_ids)
    compute(blocks, trunk, token_ids)
    used = blocks.kv_bytes
    branch = blocks.fork("KV of a branch", trunk)
    assert (branch.kv.blocks, branch.kv.length, blocks.kv_bytes) == (trunk.kv.blocks[:2], 32, used)
    blocks.release(trunk)
    assert blocks.unused_prefix_bytes == 0
    assert blocks.extend(branch, 32, 60)
    assert leased(governor) == {"shared prefixes": 2, "KV of a branch": 2}


def test_for_what_comes_back_from_disk_only_computed_blocks_are_taken_over(blocks: KVBlocks) -> None:
    token_ids = prompt("a", "b", "c")
    first = reserved(blocks, token_ids)
    first.kv.length = 16
    blocks.commit(first, token_ids)
    parked = blocks.reserve("KV of a session", token_ids, 64, ParkedKV())
    assert parked is not None
    assert (len(parked.shared), parked.kv.length, parked.num_reused) == (1, 16, 16)
    assert parked.kv.blocks[0] == first.kv.blocks[0]
    assert not set(parked.kv.blocks[1:]) & set(first.kv.blocks)


def test_closed_nothing_is_left(blocks: KVBlocks, governor: MemoryGovernor) -> None:
    token_ids = prompt("a", "b")
    first = reserved(blocks, token_ids)
    compute(blocks, first, token_ids)
    blocks.release(first)
    blocks.close()
    assert blocks.pool.num_used == 0
    assert governor.statistics().num_leases == 0


# Whatever happens, in any order


class Sequence:
    """What a reservation is for. Its tokens are the prompt, then what was sampled; idle, a session has it."""

    def __init__(self, name: str, reservation: BlockReservation, token_ids: list[int], capacity: int) -> None:
        self.name = name
        self.reservation = reservation
        self.token_ids = token_ids
        self.capacity = capacity
        self.idle = False

    def __repr__(self) -> str:
        return self.name


class Blocks(RuleBasedStateMachine):
    """Sequences come, compute, end and go on; the tokens of each are written, and must still be there after each step.

    A token's key is itself, and its value a hash of all tokens up to it: a block with the right tokens behind the wrong
    ones is the wrong block.
    """

    @initialize(pool=st.integers(4, 16), budget=st.integers(4, 16), fraction=st.integers(0, BLOCK - 1))
    def open(self, pool: int, budget: int, fraction: int) -> None:
        self.governor = MemoryGovernor(budget * BLOCK + fraction)
        self.pool = KVPool(LAYOUT, pool * BLOCK)
        self.blocks = KVBlocks(self.pool, self.governor)
        self.sequences: list[Sequence] = []
        self.others: list[Lease] = []
        self.num_made = 0
        self.unused_before: list[SharedBlock] = []

    def teardown(self) -> None:
        for sequence in self.sequences:
            self.blocks.release(sequence.reservation)
        for lease in self.others:
            lease.release()
        self.blocks.drop_unused()
        assert self.pool.num_used == 0
        assert self.governor.statistics().holders == {"shared prefixes": 0}
        self.blocks.close()
        assert self.governor.statistics().num_leases == 0

    # --- the model ---

    def fits(self, token_ids: list[int], capacity: int, *, computed: bool = False) -> bool:
        """Whether there is room, if all that nobody uses goes but what these tokens begin with."""
        chain = []
        block = self.blocks._root
        for end in range(BLOCK_TOKENS, len(token_ids), BLOCK_TOKENS):
            child = block.children.get(tuple(token_ids[end - BLOCK_TOKENS : end]))
            if child is None or (computed and not child.computed):
                break
            chain.append(child)
            block = child
        return num_blocks(capacity) - len(chain) <= self.num_free(but=chain)

    def num_free(self, but: Collection[SharedBlock] = ()) -> int:
        taken = [block for block in self.tree() if block.num_users or block in but]
        own = [sequence.reservation.num_own for sequence in self.sequences]
        others = sum(lease.nbytes for lease in self.others)
        used = len(taken) + sum(own)
        return min(self.pool.num_blocks - used, (self.governor.budget_bytes - others - used * BLOCK) // BLOCK)

    def tree(self) -> list[SharedBlock]:
        found, left = [], [self.blocks._root]
        while left:
            children = left.pop().children.values()
            found += children
            left += children
        return found

    def write(self, sequence: Sequence, start: int, token_ids: list[int]) -> None:
        """To the sequence's places from `start` on, as tokens that follow its own."""
        history = sequence.token_ids[:start] + token_ids
        keys = torch.tensor([float(token_id) for token_id in token_ids])
        values = torch.tensor(hashes(history)[start:])
        places = range(start, start + len(token_ids))
        table = torch.tensor([sequence.reservation.kv.blocks[place // BLOCK_TOKENS] for place in places])
        offsets = torch.tensor([place % BLOCK_TOKENS for place in places])
        self.pool.write(0, table, offsets, keys.reshape(-1, 1, 1), values.reshape(-1, 1, 1))

    def add(self, reservation: BlockReservation, token_ids: list[int], capacity: int) -> Sequence:
        sequence = Sequence(reservation.lease.holder, reservation, token_ids, capacity)
        self.sequences.append(sequence)
        return sequence

    def new_name(self) -> str:
        self.num_made += 1
        return f"s{self.num_made}"

    def one(self, data: st.DataObject, *, idle: bool | None = None) -> Sequence | None:
        sequences = [sequence for sequence in self.sequences if idle in (None, sequence.idle)]
        return data.draw(st.sampled_from(sequences), "of") if sequences else None

    # --- what happens ---

    # Few letters, so that much is in common.
    letters = st.integers(1, 2)
    rests = st.sampled_from([1, 7, BLOCK_TOKENS])
    prompts = st.builds(
        lambda blocks, last, rest: [letter for letter in blocks for _ in range(BLOCK_TOKENS)] + [last] * rest,
        st.lists(letters, max_size=3),
        letters,
        rests,
    )
    room = st.sampled_from([1, 8, 40])

    @rule(token_ids=prompts, more=room)
    def reserve(self, token_ids: list[int], more: int) -> None:
        capacity = len(token_ids) + more
        possible = self.fits(token_ids, capacity)
        reservation = self.blocks.reserve(self.new_name(), token_ids, capacity)
        assert (reservation is not None) == possible
        if reservation is not None:
            self.add(reservation, list(token_ids), capacity)
            assert reservation.kv.length < len(token_ids)
            assert len(reservation.kv.blocks) == num_blocks(capacity)

    @rule(token_ids=prompts, more=room, data=st.data())
    def reserve_own(self, token_ids: list[int], more: int, data: st.DataObject) -> None:
        """A session comes back from disk with some of these tokens."""
        capacity = len(token_ids) + more
        possible = self.fits(token_ids, capacity, computed=True)
        reservation = self.blocks.reserve(self.new_name(), token_ids, capacity, ParkedKV())
        assert (reservation is not None) == possible
        if reservation is not None:
            sequence = self.add(reservation, list(token_ids), capacity)
            length = reservation.kv.length
            end = data.draw(st.integers(length, len(token_ids) - 1), "end")
            if end > length:
                self.write(sequence, length, token_ids[length:end])
                reservation.kv.length = end
                self.blocks.commit(reservation, token_ids)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), num_tokens=st.sampled_from([5, 16, 40]), letter=letters, num_right=room, num_wrong=room)
    def compute(self, data: st.DataObject, num_tokens: int, letter: int, num_right: int, num_wrong: int) -> None:
        """A sweep takes some tokens of a sequence; behind its last come drafts, right and wrong, and a new one."""
        sequence = self.one(data, idle=False)
        if sequence is None or len(sequence.token_ids) >= sequence.capacity:
            return
        reservation, kv = sequence.reservation, sequence.reservation.kv
        reservation.skip_computed(len(sequence.token_ids) - 1)
        assert kv.length < len(sequence.token_ids)
        computed = sequence.token_ids[kv.length : kv.length + num_tokens]
        end = kv.length + len(computed)
        if end == len(sequence.token_ids):
            num_right = min(num_right - 1, sequence.capacity - end - 1)
            num_wrong = min(num_wrong - 1, sequence.capacity - end - num_right)
            self.write(sequence, kv.length, computed + [letter] * num_right + [9] * num_wrong)
            sequence.token_ids += [letter] * (num_right + 1)
            end += num_right
        else:
            self.write(sequence, kv.length, computed)
        kv.length = end
        self.blocks.commit(reservation, sequence.token_ids)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end_a_turn(self, data: st.DataObject) -> None:
        sequence = self.one(data, idle=False)
        if sequence is not None:
            self.blocks.trim(sequence.reservation)
            sequence.idle = True
            del sequence.token_ids[sequence.reservation.kv.length :]
            assert len(sequence.reservation.kv.blocks) == num_blocks(len(sequence.token_ids))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=prompts, capacity=room)
    def begin_a_turn(self, data: st.DataObject, more: list[int], capacity: int) -> None:
        """Goes on behind what a session has, or behind a part of it: its history may have been edited."""
        sequence = self.one(data, idle=True)
        if sequence is None:
            return
        reservation = sequence.reservation
        shared = len(reservation.shared) * BLOCK_TOKENS
        if shared > reservation.kv.length:  # only a part of a block is computed that is others' too
            return
        length = data.draw(st.integers(shared, reservation.kv.length), "length")
        capacity += length + len(more)
        possible = num_blocks(capacity) - len(reservation.kv.blocks) <= self.num_free()
        assert self.blocks.extend(reservation, length, capacity) == possible
        if possible:
            sequence.token_ids = sequence.token_ids[:length] + more
            sequence.capacity = capacity
            sequence.idle = False

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        trunk = self.one(data)
        reservation = self.blocks.fork(self.new_name(), trunk.reservation)
        branch = self.add(reservation, trunk.token_ids[: reservation.kv.length], reservation.kv.length)
        branch.idle = True

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = self.one(data)
        self.sequences.remove(sequence)
        self.blocks.release(sequence.reservation)
        assert sequence.reservation.lease.released

    @rule(count=st.one_of(st.none(), st.integers(0, 4)))
    def drop_unused(self, count: int | None) -> None:
        before = self.blocks.unused_prefix_bytes // BLOCK
        self.blocks.drop_unused(count)
        assert self.blocks.unused_prefix_bytes // BLOCK == max(0, before - (before if count is None else count))

    @rule(nbytes=st.integers(1, 3 * BLOCK))
    def others_take_memory(self, nbytes: int) -> None:
        if nbytes <= self.governor.free_bytes:
            self.others.append(self.governor.acquire_nowait("others", nbytes))

    @precondition(lambda self: self.others)
    @rule()
    def others_give_memory_back(self) -> None:
        self.others.pop().release()

    # --- what holds after each step ---

    @invariant()
    def every_block_in_use_is_owned_once(self) -> None:
        owned = [block.idx for block in self.tree()]
        for sequence in self.sequences:
            owned += sequence.reservation.kv.blocks[len(sequence.reservation.shared) :]
        assert len(owned) == len(set(owned)) == self.pool.num_used
        assert not set(owned) & set(self.pool._free)
        assert max(owned, default=-1) < self.pool.num_blocks

    @invariant()
    def leases_are_what_is_held(self) -> None:
        holders = {sequence.name: sequence.reservation.num_own * BLOCK for sequence in self.sequences}
        holders["shared prefixes"] = len(self.tree()) * BLOCK
        if self.others:
            holders["others"] = sum(lease.nbytes for lease in self.others)
        statistics = self.governor.statistics()
        assert statistics.holders == holders
        assert statistics.bytes_in_use == sum(holders.values()) <= statistics.budget_bytes
        assert self.blocks.kv_bytes == sum(holders.values()) - holders.get("others", 0)

    @invariant()
    def shared_blocks_are_a_chain_of_the_sequence_s_own_tokens(self) -> None:
        for sequence in self.sequences:
            parent = self.blocks._root
            for idx, block in enumerate(sequence.reservation.shared):
                assert block.parent is parent
                assert parent.children[block.tokens] is block
                assert sequence.reservation.kv.blocks[idx] == block.idx
                tokens = sequence.token_ids[idx * BLOCK_TOKENS : (idx + 1) * BLOCK_TOKENS]
                assert list(block.tokens[: len(tokens)]) == tokens  # of an idle one the last may be cut short
                parent = block

    @invariant()
    def users_are_counted(self) -> None:
        users = dict.fromkeys(self.tree(), 0)
        for sequence in self.sequences:
            for block in sequence.reservation.shared:
                users[block] += 1
        assert {block: block.num_users for block in users} == users
        assert set(self.blocks._unused) == {block for block, number in users.items() if number == 0}
        assert self.blocks.unused_prefix_bytes == len(self.blocks._unused) * BLOCK

    @invariant()
    def what_is_computed_stands_on_what_is_computed(self) -> None:
        for block in self.tree():
            assert block.computed or block.num_users
            assert not block.computed or block.parent is self.blocks._root or block.parent.computed
        for sequence in self.sequences:
            kv = sequence.reservation.kv
            assert kv.length <= min(kv.capacity, len(sequence.token_ids))
            assert all(block.computed for block in sequence.reservation.shared[: kv.length // BLOCK_TOKENS])

    @invariant()
    def the_longest_unused_go_first(self) -> None:
        unused = list(self.blocks._unused)
        for child, parent in ((block, block.parent) for block in unused):
            assert parent not in self.blocks._unused or unused.index(child) < unused.index(parent)
        still_there = set(self.tree())
        candidates = [block for block in self.unused_before if block not in still_there or not block.num_users]
        dropped = [block for block in candidates if block not in still_there]
        assert dropped == candidates[: len(dropped)]
        self.unused_before = unused

    @invariant()
    def every_sequence_has_its_own_keys_and_values(self) -> None:
        for sequence in self.sequences:
            length = sequence.reservation.kv.length
            if length:
                keys, values = sequence.reservation.kv.read(0, 0, length)
                assert keys.flatten().tolist() == sequence.token_ids[:length]
                assert values.flatten().tolist() == hashes(sequence.token_ids[:length])


def hashes(token_ids: list[int]) -> list[float]:
    """Of all tokens up to each."""
    found, value = [], 0
    for token_id in token_ids:
        value = (31 * value + token_id) % 9973
        found.append(float(value))
    return found


Blocks.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_blocks = Blocks.TestCase
