"""What a budget sets aside for sequences: KV caches and workspace, before any weights get what is left.

More memory must never leave less of anything: not fewer tokens of KV, not smaller sweeps, not fewer sequences, and not
less room for weights. So a budget is parted by a function that grows with it and leaves a remainder that grows too; and
what is set aside goes along one chain of ever more KV and ever larger sweeps. Neither depends on how the model is cut,
nor on how much of it the plan holds in the end.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

from hermes_async.config import EngineConfig
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.sweep_room import SweepRoom
from hermes_async.storage.buffers import ALIGNMENT

_AT_FIRST = 2  # a half of what is above the smallest budget is set aside until sweeps are long enough
_LATER = 10  # and then a tenth of it
_OF_WEIGHTS = 10  # for long sweeps at most a tenth of the weights is set aside: longer ones must not keep them out
_PER_PAGE = 3  # pages of activations for a page of KV, once there is KV for two of the shortest sequences


@dataclass(frozen=True, slots=True)
class Share:
    """What is set aside: bytes of KV, tokens and sequences of a sweep, and the workspace that they take."""

    kv_bytes: int
    tokens: int
    sequences: int
    workspace_bytes: int

    @property
    def nbytes(self) -> int:
        return self.kv_bytes + self.workspace_bytes


class Reserve:
    """Parts budgets of one model.

    Args:
        least_kv: Bytes of KV in the smallest budget; all there ever are if `kv_is_fixed`.
        least_weights: Bytes that weights take in the smallest budget, ring and all.
        most_weights: Bytes that weights can use.
        enough_tokens: More tokens a sweep are only worth memory that no weights can use.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        config: EngineConfig,
        sweep_room: SweepRoom,
        *,
        least_kv: int,
        kv_is_fixed: bool,
        least_weights: int,
        most_weights: int,
        enough_tokens: int,
    ) -> None:
        self._sizes = sizes
        self._config = config
        self._sweep_room = sweep_room
        self._least_kv = least_kv
        self._kv_is_fixed = kv_is_fixed
        self._most_weights = most_weights
        self._counts = sweep_room.token_counts()
        self._allowances = [self._allowance(count) for count in self._counts]
        self._enough = self._allowances[max(0, bisect_right(self._counts, enough_tokens) - 1)]
        self.least = self._at(0, sys.maxsize)
        self._smallest = least_weights + self.least.nbytes

    def of(self, budget: int) -> Share:
        """What a budget sets aside. The rest is for weights, and grows with the budget too."""
        room = max(self._streaming(budget), budget - self._most_weights)
        return self._at(self._step(room, self._apart), self._apart)

    def for_weights(self, budget: int) -> int:
        """What a budget leaves for weights."""
        return min(budget - self._streaming(budget), self._most_weights)

    def _streaming(self, budget: int) -> int:
        """Bytes to set aside while not all weights fit."""
        above = budget - self._smallest
        if not self._sizes.kv_bytes_per_token:
            # Longer texts than a sweep has room for are refused, so the first long one goes before all weights.
            part = min(above, max(self._long_text, above // _LATER))
        else:
            longer = min(self._enough - self._allowances[0], self._sizes.weight_bytes // _OF_WEIGHTS)
            part = min(above // _AT_FIRST, longer + above // _LATER)
        return self.least.nbytes + min(part, self._most_streaming)

    @cached_property
    def _long_text(self) -> int:
        tokens = max(self._sizes.long_text_tokens, self._counts[0])
        place = min(bisect_left(self._counts, tokens), len(self._counts) - 1)
        return self._allowances[place] - self._allowances[0]

    @cached_property
    def _most_streaming(self) -> int:
        """Bytes that are of use while not all weights fit, beside the least; without bounds where KV can grow."""
        if not self._kv_is_fixed:
            return sys.maxsize
        most = self._enough if self._sizes.kv_bytes_per_token else self._allowances[-1]
        return self._with(self._least_kv, most).nbytes - self.least.nbytes

    @cached_property
    def _apart(self) -> int:
        """The step of the chain from which on all weights fit, and sweeps may be longer than enough."""
        if self._most_weights == sys.maxsize:
            return sys.maxsize
        # At least half of what is above the smallest budget goes to weights, or all of it but what a long text takes.
        budgets = range(self._smallest, self._smallest + 2 * self._most_weights + self._allowances[-1] + 2)
        first = budgets[bisect_left(budgets, self._most_weights, key=lambda budget: budget - self._streaming(budget))]
        return self._step(first - self._most_weights, sys.maxsize)

    def _step(self, room: int, apart: int) -> int:
        """The last of the chain that fits into so many bytes."""
        steps = range(1 + _PER_PAGE * (room + self._allowances[-1]) // ALIGNMENT)
        return max(0, bisect_right(steps, room, key=lambda step: self._at(step, apart).nbytes) - 1)

    def _at(self, step: int, apart: int) -> Share:
        """A step of the chain: no step has less of anything than the one before.

        At first KV grows page by page, and the activations that sweeps may have with it. When they are long enough KV
        grows alone, and from step `apart` on both grow again.
        """
        pages = self._least_kv // ALIGNMENT
        allowance = self._allowances[0] + ALIGNMENT * (step + (_PER_PAGE - 1) * max(0, min(step, apart) - pages))
        if not self._sizes.kv_bytes_per_token:
            apart = 0
        if step <= apart:
            allowance = min(allowance, self._enough)
        else:
            before = self._allowances[0] + ALIGNMENT * (apart + (_PER_PAGE - 1) * max(0, apart - pages))
            allowance = min(before, self._enough) + ALIGNMENT * (step - apart)
        kv_bytes = self._least_kv + (0 if self._kv_is_fixed else step * ALIGNMENT)
        return self._with(kv_bytes, allowance)

    def _with(self, kv_bytes: int, allowance: int) -> Share:
        tokens = self._counts[max(0, bisect_right(self._allowances, allowance) - 1)]
        sequences = self._sweep_room.most_sequences(tokens, kv_bytes)
        return Share(kv_bytes, tokens, sequences, self._sweep_room.workspace_bytes(tokens, sequences, kv_bytes))

    def _allowance(self, tokens: int) -> int:
        """Bytes of activations, if as many of the tokens had outputs as ever may: so it goes with tokens alone."""
        return self._sweep_room.workspace_bytes(tokens, min(tokens, self._config.max_sequences), self._least_kv)
