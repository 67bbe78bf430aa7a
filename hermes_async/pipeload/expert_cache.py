"""The experts of a mixture in memory: read when a sweep asks for them, and kept as long as there is room."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from hermes_async.pipeload.expert_policy import MOST_AHEAD, NEARLY_ALL, NEW_BUFFERS, USE_KEPT, slot_sizes
from hermes_async.pipeload.governor import Lease, MemoryGovernor
from hermes_async.pipeload.stage import Stage, StageState
from hermes_async.storage.buffers import Buffer, BufferLock


@dataclass(slots=True)
class ExpertStatistics:
    """Of all sweeps so far.

    Attributes:
        num_hits: Experts that were in memory, or on their way there, when a sweep asked for them.
        num_misses: Experts that had to be read when a sweep asked for them.
        num_read_ahead: Experts that were read before a sweep asked for them.
        read_bytes: Of all experts that were read.
    """

    num_hits: int = 0
    num_misses: int = 0
    num_read_ahead: int = 0
    read_bytes: int = 0


class ExpertCache:
    """Which experts are in memory, and which are read next.

    A sweep asks for experts of a layer, and leaves each when it is computed. Meanwhile the expert stays in memory. All
    others may have to give their place to one that was asked for: first the one that is least likely to be used when
    its layer is visited again. That likelihood is the mean of an expert's uses over the visits of its layer, of which
    the last ones count most. Of experts that are equal in this, the one goes that came last. So if all experts are used
    in every sweep, those that are in memory stay there.

    A sweep that asks for nearly all experts of a layer will ask for nearly all of the next one. These are read ahead,
    unless that costs an expert that is more likely to be used.

    No deadlock: experts are read in the order in which they were asked for, and those that are in memory are computed
    first, which makes their places free. So the read that is first in the order gets a place, if there is one at all.

    Source: the replacement policy is LRFU (Lee et al., IEEE Transactions on Computers 50, 2001), by layer.

    Args:
        layers: The experts of each layer, in the order in which the layers are computed.
        memory: Grants their places.
        lock: Locks their memory; None locks nothing.
    """

    def __init__(
        self, layers: Sequence[Sequence[Stage]], memory: MemoryGovernor, lock: BufferLock | None = None
    ) -> None:
        self.layers = tuple(map(tuple, layers))
        self.experts = tuple(expert for layer in self.layers for expert in layer)
        self.memory = memory
        self._buffer_lock = lock or BufferLock()
        self.statistics = ExpertStatistics()
        sizes = slot_sizes([[expert.layout.slot_bytes for expert in layer] for layer in self.layers])
        self._slot_bytes = [size for layer, size in zip(self.layers, sizes, strict=True) for _ in layer]
        self._index = {expert: idx for idx, expert in enumerate(self.experts)}
        self._layer_of = [idx for idx, layer in enumerate(self.layers) for _ in layer]
        starts = list(accumulate(map(len, self.layers), initial=0))
        self._own = [slice(start, stop) for start, stop in pairwise(starts)]
        # All mutable state; `_lock` guards it, because the compute thread asks for experts and leaves them. Of each
        # expert: its uses, a sum over the visits of its layer, and the most that this sum can be; how many calls need
        # it; whether it is in memory or on its way there; whether it can be computed or freed; whether the sweep is
        # expected to ask for it; and the number of its load. Then the layer that the sweep is at, whether more is
        # expected of it, the experts to read, in order, how many were read ahead, and those whose read failed.
        self._lock = threading.Lock()
        count = len(self.experts)
        self._uses, self._most_uses = np.zeros(count), np.full(count, np.finfo(float).tiny)
        self._num_asking = np.zeros(count, dtype=np.int32)
        self._is_loaded, self._is_ready = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        self._is_expected = np.zeros(count, dtype=bool)
        self._load_number = np.zeros(count)
        self._num_loads = 0
        self._visited: int | None = None
        self._expects_next = False
        self._asked: deque[int] = deque()
        self._expected: deque[int] = deque()
        self._num_ahead = 0
        self._failed: list[Stage] = []
        # Of the event loop: the free buffers by size, those that have pages and those that have none.
        self._free: dict[int, list[Buffer]] = defaultdict(list)
        self._unused: dict[int, list[Buffer]] = defaultdict(list)

    @property
    def num_loaded(self) -> int:
        """Experts in memory or on their way there."""
        return int(np.count_nonzero(self._is_loaded))

    @property
    def loaded_bytes(self) -> int:
        """The memory that they take."""
        return self.memory.budget_bytes - self.memory.free_bytes

    # --- on the compute thread ---

    def ask(self, experts: Sequence[Stage]) -> bool:
        """A call needs these experts of a layer. They are kept until they are left or forgotten.

        Returns:
            Whether there is anything to read.
        """
        if not experts:
            return False
        wanted = [self._index[expert] for expert in experts]
        layer = self._layer_of[wanted[0]]
        with self._lock:
            if layer != self._visited:
                self._visit(layer)
            for idx in wanted:
                self._num_asking[idx] += 1
                if self._num_asking[idx] > 1:
                    continue
                self._uses[idx] += 1
                if self._is_loaded[idx]:
                    self.statistics.num_hits += 1
                else:
                    self.statistics.num_misses += 1
                    self._asked.append(idx)
            self._expect_after(layer)
            return self._has_more

    def leave(self, expert: Stage) -> bool:
        """All calls that asked for an expert have computed it. Returns whether there is anything to read."""
        idx = self._index[expert]
        with self._lock:
            self._num_asking[idx] = 0
            self._is_expected[idx] = False
            return self._has_more

    def forget(self, experts: Iterable[Stage]) -> bool:
        """A call does not need these experts after all. Returns whether there is anything to read."""
        with self._lock:
            for expert in experts:
                idx = self._index[expert]
                self._num_asking[idx] = max(0, self._num_asking[idx] - 1)
            return self._has_more

    def holds(self, expert: Stage) -> bool:
        """Whether an expert that was asked for is in memory or on its way there, and stays until it is left.

        False also of one that is still READY because it is about to be freed.
        """
        return bool(self._is_loaded[self._index[expert]])

    @property
    def num_asked(self) -> int:
        """Experts that some call needs now."""
        return int(np.count_nonzero(self._num_asking))

    @property
    def _has_more(self) -> bool:
        return bool(self._asked or self._expected)

    def _visit(self, layer: int) -> None:
        """The sweep has come to a layer."""
        own = self._own[layer]
        self._uses[own] *= USE_KEPT
        self._most_uses[own] = self._most_uses[own] * USE_KEPT + 1
        expected = self._is_expected[own].copy()
        self._is_expected[:] = False
        self._is_expected[own] = expected  # other calls of the sweep may ask for those that this one does not
        self._visited, self._expects_next, self._num_ahead = layer, False, 0
        self._expected.clear()

    def _expect_after(self, layer: int) -> None:
        """Expects all experts of the next layer, if nearly all of this one were asked for."""
        asked = np.count_nonzero(self._num_asking[self._own[layer]])
        if self._expects_next or layer + 1 == len(self.layers) or asked < NEARLY_ALL * len(self.layers[layer]):
            return
        self._expects_next = True
        own = self._own[layer + 1]
        self._is_expected[own] = True
        self._expected.extend(range(own.start, own.stop))

    # --- on the event loop ---

    def end_sweep(self) -> list[Stage]:
        """Nothing is expected any more. Returns the experts whose read failed; they must be freed."""
        with self._lock:
            self._visited = None
            self._is_expected[:] = False
            self._expected.clear()
            failed, self._failed = self._failed, []
            return self._gone(failed)

    def next_asked(self) -> tuple[Stage, list[Stage]] | None:
        """The expert to read first of those that were asked for, and the experts that must be freed for it.

        None if there is none, or no place for it. What must be freed counts as gone from now on.
        """
        with self._lock:
            while self._asked:
                idx = self._asked[0]
                # It may be forgotten, read ahead meanwhile, or have failed in that.
                if self._num_asking[idx] == 0 or self.experts[idx].state is not StageState.EMPTY:
                    self._asked.popleft()
                    continue
                can_go = self._is_ready & (self._num_asking == 0)
                victims = self._victims(idx, can_go & ~self._is_expected)
                victims = self._victims(idx, can_go) if victims is None else victims
                return None if victims is None else (self.experts[idx], self._gone(victims))
            return None

    def next_expected(self) -> tuple[Stage, list[Stage]] | None:
        """As `next_asked`, of the experts that the sweep is expected to ask for."""
        with self._lock:
            while self._expected and self._num_ahead < MOST_AHEAD:
                idx = self._expected[0]
                if self.experts[idx].state is not StageState.EMPTY:
                    self._expected.popleft()
                    continue
                can_go = self._is_ready & (self._num_asking == 0) & ~self._is_expected
                likelihoods = self._likelihoods()
                victims = self._victims(idx, can_go & (likelihoods <= likelihoods[idx]))
                return None if victims is None else (self.experts[idx], self._gone(victims))
            return None

    def _gone(self, victims: list[Stage]) -> list[Stage]:
        """Whoever asks for one of these from now on has it read again, even before it was freed."""
        for victim in victims:
            idx = self._index[victim]
            self._is_loaded[idx] = self._is_ready[idx] = False
        return victims

    def _likelihoods(self) -> NDArray[np.float64]:
        """Of each expert, that it is used when its layer is visited."""
        return self._uses / self._most_uses

    def _victims(self, idx: int, can_go: NDArray[np.bool_]) -> list[Stage] | None:
        """Experts that make room for another one; None if those that can go are too few."""
        missing = self._slot_bytes[idx] - self.memory.free_bytes
        chosen: list[Stage] = []
        if missing <= 0:
            return chosen
        # The load numbers decide only between likelihoods that are equal.
        worth = np.where(can_go, self._likelihoods() - 1e-9 * self._load_number / (1 + self._num_loads), np.inf)
        while missing > 0:
            victim = int(worth.argmin())
            if worth[victim] == np.inf:
                return None
            worth[victim] = np.inf
            chosen.append(self.experts[victim])
            missing -= self._slot_bytes[victim]
        return chosen

    def take(self, expert: Stage) -> tuple[Buffer, Lease]:
        """An agent reads `expert`, which was next, from now on. What had to be freed for it is freed.

        Raises:
            MemoryBudgetError: The system does not give the memory. Nothing changes.
        """
        idx = self._index[expert]
        nbytes = self._slot_bytes[idx]
        buffer = self._buffer(nbytes)
        lease = self.memory.acquire_nowait(expert.label, nbytes)
        with self._lock:
            self._is_loaded[idx] = True
            self._num_loads += 1
            self._load_number[idx] = self._num_loads
            if self._num_asking[idx] == 0:
                self._num_ahead += 1
                self.statistics.num_read_ahead += 1
        return buffer, lease

    def loaded(self, expert: Stage) -> None:
        """A read has ended well; `expert` is READY."""
        with self._lock:
            self._is_ready[self._index[expert]] = True
            self.statistics.read_bytes += expert.layout.read_bytes

    def failed(self, expert: Stage) -> bool:
        """A read has failed. Returns whether a call needs the expert, and must see the error; else it must be freed."""
        idx = self._index[expert]
        with self._lock:
            is_needed = bool(self._num_asking[idx])
            if is_needed:
                self._failed.append(expert)
            else:
                self._is_loaded[idx] = False
            return is_needed

    def give_back(self, expert: Stage, buffer: Buffer) -> None:
        """An expert was freed."""
        idx = self._index[expert]
        self._free[self._slot_bytes[idx]].append(buffer)
        with self._lock:
            self._is_loaded[idx] = self._is_ready[idx] = False

    def surplus(self, nbytes: int) -> list[Stage]:
        """The experts that must be freed so that the others take at most `nbytes`; between sweeps only.

        Those that are being read are not among them.
        """
        with self._lock:
            worth = np.where(self._is_ready, self._likelihoods(), np.inf)
        surplus = self.memory.budget_bytes - self.memory.free_bytes - nbytes
        leaving: list[Stage] = []
        while surplus > 0 and worth.min() < np.inf:
            victim = int(worth.argmin())
            worth[victim] = np.inf
            leaving.append(self.experts[victim])
            surplus -= self._slot_bytes[victim]
        return leaving

    def _buffer(self, nbytes: int) -> Buffer:
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        self.close_free()  # so that no more memory has pages than is leased
        if not self._unused[nbytes]:
            self._unused[nbytes] = Buffer.side_by_side([nbytes] * NEW_BUFFERS)[::-1]
            self._buffer_lock.add(self._unused[nbytes])  # all at once: a huge page is locked as a whole
        buffer = self._unused[nbytes].pop()
        self._buffer_lock.add([buffer])  # it may be one that was closed
        return buffer

    def close_free(self) -> None:
        """Gives the memory of free buffers back to the system."""
        for nbytes, buffers in self._free.items():
            for buffer in buffers:
                buffer.close()
            self._unused[nbytes] += buffers
            buffers.clear()
