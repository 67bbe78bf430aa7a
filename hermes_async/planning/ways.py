"""Ways to stream a model, and a rough reckoning of what each costs: max(read, compute), sweep by sweep."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.plan import Partitioned
from hermes_async.planning.reserve import Share
from hermes_async.planning.speeds import Speeds

# What a plan is chosen by: the time that one session takes, and that which as many as may run at once take.
_PROMPT_TOKENS = 64
NEW_TOKENS = 64


class StageSums:
    """What all stages of a partition take together, if none were resident."""

    def __init__(self, partition: Partitioned, sizes: ModelSizes, speeds: Speeds, agents: int) -> None:
        self._partition, self._agents = partition, agents
        self.sizes, self.speeds = sizes, speeds
        self.num_stages = len(partition.stages)
        self.slot_bytes = sum(stage.slot_bytes for stage in partition.stages)
        self.read_bytes = sum(stage.read_bytes for stage in partition.stages)
        self.head_bytes = sum(stage.read_bytes for stage in partition.stages if sizes.is_head(stage))

    @cached_property
    def read_s(self) -> float:
        counts: dict[int, int] = {}
        for stage in self._partition.stages:
            counts[stage.read_bytes] = counts.get(stage.read_bytes, 0) + 1
        seconds = sum(count * self.speeds.read_seconds(size, self._agents) for size, count in counts.items())
        return seconds / self._agents

    def sweep_seconds(self, share: float, num_tokens: int, num_outputs: int) -> float:
        """A sweep that streams so great a share of the weights: whatever takes longer, reading or computing."""
        layers = self.read_bytes - self.head_bytes
        compute_s = self.speeds.compute_seconds(layers, self.head_bytes, num_tokens, num_outputs)
        return max(share * self.read_s, compute_s + share * self.num_stages * self.speeds.handover_seconds)


@dataclass(frozen=True)
class Way:
    """One way to stream a model: how it is cut, how many agents read, and how much goes into a sweep.

    Attributes:
        limit: Bytes of a stage at the most.
        sums: What all its stages take; on each of several machines, where it is not known which this is.
        agents: Loading agents.
        buffers: Of the ring, `slot` bytes each.
        tokens: Of a sweep at the most, of `sequences`.
        packed_tokens: The same where nothing is drafted, so that of each sequence one position's logits are wanted.
        prompt_tokens: The same for one prompt alone.
        rounds: In which so many sequences at a time come to `EngineConfig.max_sequences`.
        share: What is set aside for them.
        room: Bytes for resident stages.
        most: Stages that may be resident.
    """

    limit: int
    partition: Partitioned
    sums: tuple[StageSums, ...]
    agents: int
    buffers: int
    slot: int
    tokens: int
    packed_tokens: int
    prompt_tokens: int
    sequences: int
    rounds: float
    share: Share
    room: int
    most: int

    @property
    def sweeps_of_long_text(self) -> int:
        return max(1, -(-self.sums[0].sizes.long_text_tokens // self.tokens))

    @property
    def text_lengths(self) -> list[int]:
        """Tokens of the texts, or of the image, that a plan is chosen by without generating; cut at what fits."""
        return [min(length, self.tokens) for length in self.sums[0].sizes.text_lengths]

    @cached_property
    def cost(self) -> float:
        """What sessions would take, in seconds: the geometric mean of what they would on each machine."""
        share = 1 - min(self.room, self.most * self.slot) / max(1, self.sums[0].slot_bytes)
        return geometric_mean([self.cost_of(max(0.0, share), sums) for sums in self.sums])

    def cost_of(self, share: float, sums: StageSums) -> float:
        """The same on one of them, if so great a share of the weights is streamed.

        What one session takes, and what as many as may ever run take, in rounds of those that there is room for at
        once; without generating, the geometric mean of what short texts and long ones take, as many times as a long one
        would be cut.
        """
        sizes = sums.sizes
        if not sizes.kv_bytes_per_token:
            texts_s = [sums.sweep_seconds(share, length, 0) for length in self.text_lengths]
            return self.sweeps_of_long_text * geometric_mean(texts_s)
        prompt_tokens = min(_PROMPT_TOKENS, max(1, (sizes.context_length or sys.maxsize) - 1))
        total = 0.0
        alone, together = (1, 1.0, self.prompt_tokens), (self.sequences, self.rounds, self.packed_tokens)
        for num_sessions, rounds, most in (alone, together):
            whole, rest = divmod(num_sessions * prompt_tokens, most)
            sweeps = [(whole, most), (1 if rest else 0, rest), (NEW_TOKENS - 1, num_sessions)]
            for num_sweeps, num_tokens in sweeps:
                total += rounds * num_sweeps * sums.sweep_seconds(share, num_tokens, min(num_tokens, num_sessions))
        return total


def geometric_mean(costs: Sequence[float]) -> float:
    """By which a plan is chosen that does well in proportion on each of several machines, or with each of the texts."""
    return math.prod(costs) ** (1 / len(costs))
