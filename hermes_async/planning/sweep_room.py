"""What goes into a sweep: tokens, sequences, outputs, and the workspace that they take."""

from __future__ import annotations

import sys
from bisect import bisect_right
from functools import cache

from hermes_async.config import EngineConfig
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.storage.buffers import align_up

_MOST_TOKENS = 2048  # of a sweep
_SMALL_SWEEP = 64  # below it every number of tokens is considered
_SEQUENCE_TOKENS = 32  # for which a sequence must have KV memory to be worth a place in a sweep


def num_outputs(tokens: int, sequences: int) -> int:
    """Of a sweep at the most: a token of each sequence, and as many drafted ones."""
    return min(tokens, 2 * sequences)


class SweepRoom:
    """For one model and configuration."""

    def __init__(self, sizes: ModelSizes, config: EngineConfig) -> None:
        self._sizes = sizes
        self._config = config
        self.most_tokens = cache(self._most_tokens)  # the same for many ways

    def token_counts(self) -> list[int]:
        """Tokens of a sweep to consider, smallest first."""
        if self._config.max_tokens_per_sweep is not None:
            return [self._config.max_tokens_per_sweep]
        least, long_text = self._sizes.least_sweep_tokens, self._sizes.long_text_tokens
        if not self._sizes.kv_bytes_per_token:  # whole images, and texts of lengths that are about as common
            return sorted({*range(least, _MOST_TOKENS + 1, least), least, max(least, long_text)})
        return sorted({*range(least, _SMALL_SWEEP), *range(max(least, _SMALL_SWEEP), _MOST_TOKENS + 1, 16), least})

    def most_sequences(self, tokens: int, kv_bytes: int) -> int:
        """Of a sweep with so many tokens; no more than there is KV for."""
        most = self._config.max_sequences
        if self._sizes.kv_bytes_per_token:
            most = min(most, max(1, kv_bytes // (_SEQUENCE_TOKENS * self._sizes.kv_bytes_per_token)))
        return min(tokens, most)

    def workspace_bytes(self, tokens: int, sequences: int, kv_bytes: int) -> int:
        """Without what casting a stage takes."""
        return align_up(self._sizes.workspace_bytes(tokens, num_outputs(tokens, sequences), kv_bytes))

    def by_outputs(self, tokens: int, sequences: int, kv_bytes: int) -> tuple[int, ...]:
        """`Plan.tokens_by_outputs` for the workspace of a sweep with `tokens` and as many outputs as it may have."""
        outputs = range(1, 1 + num_outputs(tokens, sequences))
        return tuple(self.most_tokens(count, tokens, sequences, kv_bytes) for count in outputs)

    def _most_tokens(self, outputs: int, tokens: int, sequences: int, kv_bytes: int) -> int:
        """Tokens of a sweep with so many outputs, in the workspace of one with `tokens` and as many as it may have.

        Logits are wanted of few positions while a prompt is computed, which leaves room for more of its tokens.
        """
        if self._config.max_tokens_per_sweep is not None or not self._sizes.kv_bytes_per_token:
            return tokens
        room = self._sizes.workspace_bytes(tokens, num_outputs(tokens, sequences), kv_bytes)
        most = min(_MOST_TOKENS, self._sizes.context_length or sys.maxsize)
        counts = range(tokens, max(tokens, most) + 1)
        found = bisect_right(counts, room, key=lambda count: self._sizes.workspace_bytes(count, outputs, kv_bytes))
        block = self._sizes.kv_block_tokens
        return max(tokens, counts[found - 1] // block * block)
