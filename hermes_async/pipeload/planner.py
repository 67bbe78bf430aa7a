"""The Pipeline Planner: divides the budget between resident stages, the ring, KV caches and workspace.

Source: Hermes (arXiv 2409.04249), section IV (Pipeline Planner), extended by a fixed resident set: a cyclic scan that
keeps R of S bytes in memory reads S - R bytes each time round, and no other choice of what to keep reads less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

from hermes_async.config import EngineConfig, format_bytes
from hermes_async.errors import ConfigError, MemoryBudgetError
from hermes_async.pipeload.stage import StageLayout
from hermes_async.storage.buffers import align_up

_READ_OVERHEAD_BYTES = 2 * 1024 * 1024
"""What starting one read costs, told in bytes that could have been read: a millisecond at 2 GiB/s."""

LEAST_KV_TOKENS = 256
"""There is always room for the KV of one sequence so long, or as long as the context."""

_SWEEP_TOKENS = (2048, 1536, 1024, 768, 512, 384, 256, 128, 64, 32, 16)
_WORKSPACE_SHARE = 1 / 5


class Partitioned(Protocol):
    """A model cut into stages; see `hermes_async.modeling.partition.Partition`."""

    @property
    def base(self) -> StageLayout: ...
    @property
    def stages(self) -> tuple[StageLayout, ...]: ...
    @property
    def cast_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the planner has to know of a model.

    Attributes:
        largest_layer_bytes: Of its transformer layers.
        weight_bytes: All its weights.
        kv_bytes_per_token: Of one sequence; 0 for a model that does not generate.
        kv_block_tokens: KV memory is given out for so many tokens at a time.
        draft_bytes: Of a draft model, which is in memory beside the model.
        context_length: Most tokens of a sequence, None without a limit.
        workspace_bytes: What a sweep's activations take at the most, by its tokens, its outputs and the KV bytes.
        least_sweep_tokens: A sweep must have room for so many.
    """

    largest_layer_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int
    context_length: int | None
    workspace_bytes: Callable[[int, int, int], int]
    kv_block_tokens: int = 1
    draft_bytes: int = 0
    least_sweep_tokens: int = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget is divided; `str(plan)` explains it.

    Attributes:
        memory_budget: Bytes.
        partition: The stages, in the order in which they are computed.
        resident: Which stages stay in memory, by index.
        num_loading_agents: Stages read at once.
        num_buffers: Of the ring.
        slot_bytes: Of one buffer of the ring.
        kv_bytes: Left for KV caches.
        workspace_bytes: Set aside for activations.
        max_tokens_per_sweep: Prompt and decode tokens packed into one sweep.
        max_sequences: Sequences in one sweep.
        minimum_budget: The smallest budget that this model runs in.
    """

    memory_budget: int
    partition: Partitioned
    resident: frozenset[int]
    num_loading_agents: int
    num_buffers: int
    slot_bytes: int
    kv_bytes: int
    workspace_bytes: int
    max_tokens_per_sweep: int
    max_sequences: int
    minimum_budget: int

    @property
    def max_outputs(self) -> int:
        """Positions of one sweep whose logits are wanted: a token of each sequence, and as many drafted ones."""
        return _num_outputs(self.max_tokens_per_sweep, self.max_sequences)

    @property
    def stages(self) -> tuple[StageLayout, ...]:
        return self.partition.stages

    @property
    def ring_bytes(self) -> int:
        return self.num_buffers * self.slot_bytes

    @property
    def resident_bytes(self) -> int:
        """Weights that are loaded once, the base included."""
        return self.partition.base.slot_bytes + sum(self.stages[idx].slot_bytes for idx in self.resident)

    @property
    def bytes_per_sweep(self) -> int:
        """What every sweep reads from disk, without embedding rows."""
        return sum(stage.read_bytes for idx, stage in enumerate(self.stages) if idx not in self.resident)

    @property
    def weight_bytes(self) -> int:
        return self.partition.base.weight_bytes + sum(stage.weight_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, int]:
        """The figures, for JSON."""
        return {
            "memory_budget": self.memory_budget,
            "minimum_budget": self.minimum_budget,
            "weight_bytes": self.weight_bytes,
            "num_stages": len(self.stages),
            "num_resident_stages": len(self.resident),
            "resident_bytes": self.resident_bytes,
            "num_loading_agents": self.num_loading_agents,
            "num_buffers": self.num_buffers,
            "slot_bytes": self.slot_bytes,
            "ring_bytes": self.ring_bytes,
            "bytes_per_sweep": self.bytes_per_sweep,
            "kv_bytes": self.kv_bytes,
            "workspace_bytes": self.workspace_bytes,
            "max_tokens_per_sweep": self.max_tokens_per_sweep,
            "max_sequences": self.max_sequences,
        }

    def __str__(self) -> str:
        if self.num_buffers:
            ring = (
                f"ring        {format_bytes(self.ring_bytes):>9}  {self.num_buffers} buffers of "
                f"{format_bytes(self.slot_bytes)} for {self.num_loading_agents} loading agents"
            )
        else:
            ring = "ring              0 B  everything is resident"
        kv = [f"KV caches   {format_bytes(self.kv_bytes):>9}  for all sequences together"] if self.kv_bytes else []
        return "\n".join((
            f"budget      {format_bytes(self.memory_budget):>9}  of {format_bytes(self.weight_bytes)} of weights; the "
            f"smallest that works is {format_bytes(self.minimum_budget)}",
            f"resident    {format_bytes(self.resident_bytes):>9}  {len(self.resident)} of {len(self.stages)} stages, "
            f"and {format_bytes(self.partition.base.weight_bytes)} outside of them",
            ring,
            *kv,
            f"workspace   {format_bytes(self.workspace_bytes):>9}  up to {self.max_tokens_per_sweep} tokens of "
            f"{self.max_sequences} sequences a sweep",
            f"each sweep  {format_bytes(self.bytes_per_sweep):>9}  are read from disk",
        ))  # fmt: skip


def plan(budget: int, cut: Callable[[int | None], Partitioned], sizes: ModelSizes, config: EngineConfig) -> Plan:
    """Chooses how to run a model in `budget` bytes.

    Args:
        cut: Partitions the model into stages of at most so many bytes; None for all of it in memory.

    Raises:
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ConfigError: Options contradict each other.
    """
    if isinstance(config.kv_budget, int) and config.kv_budget >= budget:
        raise ConfigError(
            f"kv_budget={config.kv_budget} is not less than the whole memory budget of {budget} bytes, "
            "of which it is a part"
        )
    if config.kv_budget is not None and not sizes.kv_bytes_per_token:
        raise ConfigError(f"kv_budget={config.kv_budget}: this model does not generate, and keeps no KV caches")
    whole = cut(None)
    choices = _Choices(budget - sizes.draft_bytes, sizes, config)
    minimum, smallest = min(choices.minimum(cut), choices.minimum_resident(whole))
    minimum += sizes.draft_bytes
    everything = choices.all_resident(whole, minimum)
    if everything is not None:
        return replace(everything, memory_budget=budget)
    if minimum > budget:
        raise MemoryBudgetError(
            f"a memory budget of {format_bytes(budget)} is too small for this model: the smallest that works is "
            f"{minimum} bytes ({format_bytes(minimum)}): {smallest}"
            + (f", and {format_bytes(sizes.draft_bytes)} for the draft model" if sizes.draft_bytes else ""),
            requested_bytes=minimum,
            budget_bytes=budget,
            minimum_bytes=minimum,
        )
    return replace(choices.best_streamed(cut, minimum), memory_budget=budget)


class _Choices:
    def __init__(self, budget: int, sizes: ModelSizes, config: EngineConfig) -> None:
        self.budget = budget
        self.sizes = sizes
        self.config = config
        context = sizes.context_length or LEAST_KV_TOKENS
        block = sizes.kv_block_tokens
        self.min_kv = align_up(-(-min(context, LEAST_KV_TOKENS) // block) * block * sizes.kv_bytes_per_token)

    def limits(self) -> list[int]:
        """Stage sizes to consider: a whole layer, and halves of that down to where reads get too small."""
        if self.config.max_resident_layers is not None:
            return [self.sizes.largest_layer_bytes]
        smallest = max(16 * 1024, self.sizes.weight_bytes // 256)
        limits = [max(smallest, self.sizes.largest_layer_bytes)]
        while limits[-1] > smallest:
            limits.append(max(smallest, limits[-1] // 2))
        return limits

    def minimum(self, cut: Callable[[int | None], Partitioned]) -> tuple[int, str]:
        """The smallest budget that works, and what it is made of."""
        agents = self.config.num_loading_agents or 1
        buffers = self._num_buffers(agents)
        tokens, sequences = self._smallest_sweep()
        best: tuple[int, str] | None = None
        for limit in self.limits():
            partition = cut(limit)
            slot = slot_bytes_of(partition.stages)
            kv = self._least_kv()
            workspace = self._workspace(partition, tokens, sequences, kv)
            total = partition.base.slot_bytes + buffers * slot + kv + workspace
            if best is None or total < best[0]:
                best = (
                    total,
                    (
                        f"{format_bytes(partition.base.slot_bytes)} of weights that always stay, {buffers} buffers of "
                        f"{format_bytes(slot)}, {format_bytes(kv)} of KV and {format_bytes(workspace)} of workspace"
                    ),
                )
        assert best is not None
        return best

    def minimum_resident(self, partition: Partitioned) -> tuple[int, str]:
        """As `minimum`, with all of the model in memory; huge where that is not allowed."""
        if self._capped(partition):
            return sys.maxsize, ""
        weights = partition.base.slot_bytes + sum(stage.slot_bytes for stage in partition.stages)
        kv = self._least_kv()
        workspace = self._workspace(partition, *self._smallest_sweep(), kv)
        return weights + kv + workspace, (
            f"{format_bytes(weights)} of weights, {format_bytes(kv)} of KV and {format_bytes(workspace)} of workspace"
        )

    def all_resident(self, partition: Partitioned, minimum: int) -> Plan | None:
        """The plan that reads everything once, if it fits."""
        if self._capped(partition):
            return None
        weights = partition.base.slot_bytes + sum(stage.slot_bytes for stage in partition.stages)
        least = self._least_kv()
        shares = (least,) if self._kv_is_fixed() else (self.budget - weights - least, least)
        for (tokens, sequences), most in product(self._sweeps(), shares):
            workspace = self._workspace(partition, tokens, sequences, max(least, most))
            if weights + least + workspace <= self.budget:
                return Plan(
                    self.budget,
                    partition,
                    frozenset(range(len(partition.stages))),
                    num_loading_agents=self._agents()[0],
                    num_buffers=0,
                    slot_bytes=0,
                    kv_bytes=min(max(least, most), self.budget - weights - workspace),
                    workspace_bytes=workspace,
                    max_tokens_per_sweep=tokens,
                    max_sequences=sequences,
                    minimum_budget=minimum,
                )
        return None

    def best_streamed(self, cut: Callable[[int | None], Partitioned], minimum: int) -> Plan:
        """The plan that reads the least in each sweep, the cost of starting reads counted in."""
        best: tuple[float, Plan] | None = None
        for limit in self.limits():
            partition = cut(limit)
            for agents in self._agents():
                candidate = self._streamed(partition, agents, minimum)
                if candidate is None:
                    continue
                streamed = len(candidate.stages) - len(candidate.resident)
                cost = candidate.bytes_per_sweep + streamed * _READ_OVERHEAD_BYTES / agents
                if best is None or cost < best[0]:
                    best = cost, candidate
        if best is None:
            raise ConfigError(f"no plan fits {self.config} into {format_bytes(self.budget)}")
        return best[1]

    def _streamed(self, partition: Partitioned, agents: int, minimum: int) -> Plan | None:
        slot = slot_bytes_of(partition.stages)
        buffers = self._num_buffers(agents)
        fixed = partition.base.slot_bytes + buffers * slot
        least = self._least_kv()
        shares = (least,) if self._kv_is_fixed() else (max(least, self._kv_share(fixed)), least)
        for kv, (tokens, sequences) in product(shares, self._sweeps()):
            workspace = self._workspace(partition, tokens, sequences, kv)
            room = self.budget - fixed - kv - workspace
            smallest = (tokens, sequences) == self._smallest_sweep()
            # Prompts should go in few sweeps; beyond that, resident weights are worth more.
            if room >= 0 and (smallest or workspace <= self.budget * _WORKSPACE_SHARE):
                break
        else:
            return None
        most = (
            len(partition.stages)
            if self.config.max_resident_layers is None
            else (self.config.max_resident_layers - buffers)
        )
        resident = spread(partition.stages, room, max(0, most))
        left = room - sum(partition.stages[idx].slot_bytes for idx in resident)
        # More KV can need more workspace, which is taken from what is left too.
        grown = self._workspace(partition, tokens, sequences, kv + left)
        if not self._kv_is_fixed() and grown - workspace <= left:
            kv, workspace = kv + left - (grown - workspace), grown
        return Plan(
            self.budget,
            partition,
            resident,
            num_loading_agents=agents,
            num_buffers=buffers,
            slot_bytes=slot,
            kv_bytes=kv,
            workspace_bytes=workspace,
            max_tokens_per_sweep=tokens,
            max_sequences=sequences,
            minimum_budget=minimum,
        )

    def _agents(self) -> Sequence[int]:
        if self.config.num_loading_agents is not None:
            return (self.config.num_loading_agents,)
        return (2, 1)

    def _num_buffers(self, agents: int) -> int:
        """One being computed and one for each agent to fill, unless fewer layers may be in memory."""
        return min(agents + 1, self.config.max_resident_layers or agents + 1)

    def _capped(self, partition: Partitioned) -> bool:
        most = self.config.max_resident_layers
        return most is not None and most < len(partition.stages)

    def _least_kv(self) -> int:
        return max(self.min_kv, align_up(self._kv_asked()))

    def _kv_asked(self) -> int:
        assert not isinstance(self.config.kv_budget, str)
        return self.config.kv_budget or 0

    def _kv_is_fixed(self) -> bool:
        return bool(self._kv_asked()) or not self.sizes.kv_bytes_per_token

    def _kv_share(self, fixed: int) -> int:
        return min(self.budget // 10, max(0, self.budget - fixed) // 2)

    def _smallest_sweep(self) -> tuple[int, int]:
        return self._sweeps()[-1]

    def _sweeps(self) -> list[tuple[int, int]]:
        """Tokens and sequences of a sweep to consider, largest first."""
        if self.config.max_tokens_per_sweep is not None:
            tokens = self.config.max_tokens_per_sweep
            return [(tokens, min(tokens, self.config.max_sequences))]
        least = self.sizes.least_sweep_tokens
        choices = [*(tokens for tokens in _SWEEP_TOKENS if tokens > least), least]
        return [(tokens, min(tokens, self.config.max_sequences)) for tokens in choices]

    def _workspace(self, partition: Partitioned, tokens: int, sequences: int, kv_bytes: int) -> int:
        outputs = _num_outputs(tokens, sequences)
        return align_up(self.sizes.workspace_bytes(tokens, outputs, kv_bytes) + partition.cast_bytes)


def _num_outputs(tokens: int, sequences: int) -> int:
    return min(tokens, 2 * sequences)


def spread(stages: Sequence[StageLayout], room: int, most: int) -> frozenset[int]:
    """Picks stages to keep resident in `room` bytes, spread evenly over the depth, then fills what is left.

    Between two streamed stages the resident ones then give the loading agents time, which evens out the load.
    """
    total = sum(stage.slot_bytes for stage in stages)
    share = min(1.0, room / total) if total else 0.0
    chosen: set[int] = set()
    taken, passed = 0, 0
    for idx, stage in enumerate(stages):
        passed += stage.slot_bytes
        if taken + stage.slot_bytes <= min(room, passed * share + stage.slot_bytes / 2) and len(chosen) < most:
            chosen.add(idx)
            taken += stage.slot_bytes
    for idx in sorted(set(range(len(stages))) - chosen, key=lambda idx: -stages[idx].slot_bytes):
        if taken + stages[idx].slot_bytes <= room and len(chosen) < most:
            chosen.add(idx)
            taken += stages[idx].slot_bytes
    return frozenset(chosen)


def slot_bytes_of(stages: Sequence[StageLayout]) -> int:
    """Of a buffer that any of the stages fits into."""
    return max((stage.slot_bytes for stage in stages), default=0)
