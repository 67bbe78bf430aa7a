"""Divides a budget between sequences (KV caches and workspace) and weights."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

from hermes_async.config import EngineConfig
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.storage.buffers import ALIGNMENT, align_up

LEAST_KV_TOKENS = 256
"""There is always room for the KV of one sequence of this length, or of the context length if that is less."""

_MOST_TOKENS = 2048  # of a sweep
_LONG_SWEEP = 256  # tokens of a sweep that generates; larger sweeps get only memory that weights cannot use
_SMALL_SWEEP = 64  # up to here every number of tokens is a candidate
_ACTIVATION_PAGES = 2  # for each page of KV
_SEQUENCE_TOKENS = 32  # a sequence counts if it has KV memory for this number of tokens


@dataclass(frozen=True, slots=True)
class SequenceMemory:
    """KV memory, and the workspace of sweeps with at most these numbers of tokens, sequences and outputs."""

    kv_bytes: int
    num_tokens: int
    num_sequences: int
    num_outputs: int
    workspace_bytes: int

    @property
    def nbytes(self) -> int:
        return self.kv_bytes + self.workspace_bytes


class BudgetDivision:
    """Divides the budgets of one model between sequences and weights.

    A larger budget never gives less of anything: KV memory, tokens of a sweep, sequences, or weights. So the part of
    the sequences grows with the budget, but more slowly. It grows in steps, and each step has at least as much of
    everything as the step before. Neither depends on the partition of the model.

    Args:
        least_weights: Bytes of weights in the smallest budget, the ring included.
        most_weights: Bytes of weights if all are resident.
    """

    def __init__(self, sizes: ModelSizes, config: EngineConfig, *, least_weights: int, most_weights: int) -> None:
        self._sizes = sizes
        self._config = config
        self._most_weights = most_weights
        assert not isinstance(config.kv_budget, str)
        self._kv_grows = sizes.generates and not config.kv_budget
        blocks = -(-min(sizes.context_length or LEAST_KV_TOKENS, LEAST_KV_TOKENS) // sizes.kv_block_tokens)
        one_sequence = blocks * sizes.kv_block_tokens * sizes.kv_bytes_per_token + sizes.kv_bytes_per_sequence
        self._least_kv = align_up(max(one_sequence, sizes.least_kv_bytes, config.kv_budget or 0))
        # Activation bytes for each number of tokens, with the most sequences.
        self._token_counts = self._possible_token_counts()
        self._activations = [
            self._memory(self._least_kv, count, config.max_sequences).workspace_bytes for count in self._token_counts
        ]
        # A model that does not generate has no limit here, because a text that does not fit into a sweep is refused.
        num_long = bisect_right(self._token_counts, _LONG_SWEEP) if sizes.generates else None
        self._long_sweep = self._activations[: num_long or None][-1]
        self.least = self._memory(self._least_kv, self._token_counts[0], self._num_sequences(self._least_kv))
        self.minimum = least_weights + self.least.nbytes

    def sequences(self, budget: int) -> SequenceMemory:
        """The part of sequences in `budget`. It includes what weights cannot use."""
        room = max(self._sequence_bytes(budget), budget - self._most_weights)
        steps = range(1 + max(room, self._activations[-1]) // ALIGNMENT)
        num_fitting = bisect_right(steps, room, key=lambda step: self._step(step).nbytes)
        return self._step(num_fitting - 1) if num_fitting else self.least

    def weights_bytes(self, budget: int) -> int:
        """The part of weights in `budget`."""
        return min(budget - self._sequence_bytes(budget), self._most_weights)

    def tokens_by_outputs(self, memory: SequenceMemory) -> tuple[int, ...]:
        """The most tokens of a sweep by its outputs, in the workspace of `memory`.

        A prompt needs logits of few positions, which leaves room for more of its tokens.
        """
        outputs = range(1, 1 + memory.num_outputs)
        if self._config.max_tokens_per_sweep is not None or not self._sizes.generates:
            return tuple(memory.num_tokens for _ in outputs)
        room = self._sizes.workspace_bytes(memory.num_tokens, memory.num_outputs, memory.kv_bytes)
        most = min(_MOST_TOKENS, self._sizes.context_length or sys.maxsize)
        counts = range(memory.num_tokens, max(memory.num_tokens, most) + 1)
        block, tokens = self._sizes.kv_block_tokens, []
        for num_outputs in outputs:
            fit = bisect_right(
                counts, room, key=lambda count: self._sizes.workspace_bytes(count, num_outputs, memory.kv_bytes)
            )
            tokens.append(max(memory.num_tokens, counts[fit - 1] // block * block))
        return tuple(tokens)

    def _sequence_bytes(self, budget: int) -> int:
        """The part of sequences while not all weights fit.

        Of the bytes above the smallest budget, a tenth goes to KV. Long sweeps get activations of at most a tenth of
        the weights' size. Both together get at most half of these bytes. If the model does not generate, a text that
        does not fit into a sweep is refused, so a long text comes before weights.
        """
        above = budget - self.minimum
        if self._sizes.generates:
            long_sweep = min(self._long_sweep - self._activations[0], self._sizes.weight_bytes // 10)
            part = min(above // 2, long_sweep + above // 10)
        else:
            idx = bisect_left(self._token_counts, self._sizes.long_text_tokens)
            long_text = self._activations[min(idx, len(self._activations) - 1)] - self._activations[0]
            part = min(above, max(long_text, above // 10))
        if not self._kv_grows:  # then only the activations grow, up to those of a long sweep
            part = min(part, self._memory_within(self._least_kv, self._long_sweep).nbytes - self.least.nbytes)
        return self.least.nbytes + part

    @cached_property
    def _resident_step(self) -> int:
        """The step at which all weights fit. From here on, sweeps may have more tokens than `_LONG_SWEEP`."""
        if self._most_weights == sys.maxsize:
            return sys.maxsize
        # Of the bytes above the smallest budget, weights get at least half, or all except those of a long text.
        budgets = range(self.minimum, self.minimum + 2 * self._most_weights + self._activations[-1] + 2)
        idx = bisect_left(budgets, self._most_weights, key=lambda budget: budget - self._sequence_bytes(budget))
        room = budgets[idx] - self._most_weights
        return bisect_right(range(1 + room // ALIGNMENT), room, key=lambda step: self._capped(step).nbytes) - 1

    def _step(self, step: int) -> SequenceMemory:
        """The memory after `step` steps. Each adds a page of KV, and two of activations while sweeps may grow."""
        if step <= self._resident_step:
            return self._capped(step)
        activations = min(self._activations_of(self._resident_step), self._long_sweep)
        activations += (step - self._resident_step) * _ACTIVATION_PAGES * ALIGNMENT
        return self._memory_within(self._kv_of(step), activations)

    def _capped(self, step: int) -> SequenceMemory:
        """The memory after `step` steps if no sweep is longer than a long one."""
        return self._memory_within(self._kv_of(step), min(self._activations_of(step), self._long_sweep))

    def _kv_of(self, step: int) -> int:
        return self._least_kv + (step * ALIGNMENT if self._kv_grows else 0)

    def _activations_of(self, step: int) -> int:
        return self._activations[0] + step * _ACTIVATION_PAGES * ALIGNMENT

    def _memory_within(self, kv_bytes: int, activations: int) -> SequenceMemory:
        num_tokens = self._token_counts[max(0, bisect_right(self._activations, activations) - 1)]
        return self._memory(kv_bytes, num_tokens, self._num_sequences(kv_bytes))

    def _num_sequences(self, kv_bytes: int) -> int:
        if not self._sizes.generates:
            return self._config.max_sequences
        sequence = _SEQUENCE_TOKENS * self._sizes.kv_bytes_per_token + self._sizes.kv_bytes_per_sequence
        return min(self._config.max_sequences, max(1, kv_bytes // max(1, sequence)))

    def _memory(self, kv_bytes: int, num_tokens: int, num_sequences: int) -> SequenceMemory:
        num_outputs = min(num_tokens, 2 * num_sequences)  # a token of each sequence, and as many drafted ones
        workspace_bytes = align_up(self._sizes.workspace_bytes(num_tokens, num_outputs, kv_bytes))
        return SequenceMemory(kv_bytes, num_tokens, min(num_tokens, num_sequences), num_outputs, workspace_bytes)

    def _possible_token_counts(self) -> list[int]:
        """Candidates for the most tokens of a sweep, ascending."""
        least = self._sizes.least_sweep_tokens
        if self._config.max_tokens_per_sweep is not None:
            return [self._config.max_tokens_per_sweep]
        if not self._sizes.generates:  # whole images, or texts
            return sorted({*range(least, _MOST_TOKENS + 1, least), max(least, self._sizes.long_text_tokens)})
        large = range(max(least, _SMALL_SWEEP), _MOST_TOKENS + 1, 16)
        return sorted({least, *range(least, _SMALL_SWEEP), *large})
