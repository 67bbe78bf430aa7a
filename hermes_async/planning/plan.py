"""A plan: how a budget is divided between resident stages, the ring, KV caches and workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hermes_async.config import format_bytes, format_count
from hermes_async.planning.speeds import Speeds

if TYPE_CHECKING:
    from hermes_async.pipeload.stage import StageLayout


class Partitioned(Protocol):
    """A model cut into stages; see `hermes_async.modeling.partition.Partition`."""

    @property
    def base(self) -> StageLayout: ...
    @property
    def stages(self) -> tuple[StageLayout, ...]: ...
    @property
    def cast_bytes(self) -> int: ...


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
        tokens_by_outputs: Prompt and decode tokens packed into one sweep at the most, if it has one output, two, and so
            on up to the most there may be. An output is a position whose logits are wanted, or a sequence without any.
        max_sequences: Sequences in one sweep.
        minimum_budget: The smallest budget that this model runs in.
        kv_bytes_per_token: Of one sequence; 0 for a model that does not generate.
        head: Which stages are the output head or a part of it, by index.
        looked_up: Which stages are the input embedding alone, of which rows are looked up.
        speeds: What the planner took reading and computing to take.
        reasons: Why it chose as it did, a line each.
        context_length: Most tokens of a sequence; None without a limit.
    """

    memory_budget: int
    partition: Partitioned
    resident: frozenset[int]
    num_loading_agents: int
    num_buffers: int
    slot_bytes: int
    kv_bytes: int
    workspace_bytes: int
    tokens_by_outputs: tuple[int, ...]
    max_sequences: int
    minimum_budget: int
    kv_bytes_per_token: int
    head: frozenset[int]
    looked_up: frozenset[int]
    speeds: Speeds
    reasons: tuple[str, ...] = ()
    context_length: int | None = None

    @property
    def max_tokens_per_sweep(self) -> int:
        """Of one with as many outputs as there may be."""
        return self.tokens_by_outputs[-1]

    @property
    def max_prompt_tokens(self) -> int:
        """Of one that has nothing else."""
        return self.tokens_by_outputs[0]

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
    def streamed(self) -> tuple[StageLayout, ...]:
        """The stages that every sweep reads."""
        return tuple(stage for idx, stage in enumerate(self.stages) if idx not in self.resident)

    @property
    def bytes_per_sweep(self) -> int:
        """What every sweep reads from disk, without embedding rows."""
        return sum(stage.read_bytes for stage in self.streamed)

    @property
    def weight_bytes(self) -> int:
        return self.partition.base.weight_bytes + sum(stage.weight_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
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
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_sequences": self.max_sequences,
            "context_length": self.context_length,
            "speeds": self.speeds.source,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        if self.num_buffers:
            ring = (
                f"ring        {format_bytes(self.ring_bytes):>9}  {format_count(self.num_buffers, 'buffer')} of "
                f"{format_bytes(self.slot_bytes)} for {format_count(self.num_loading_agents, 'loading agent')}"
            )
        else:
            ring = "ring              0 B  everything is resident"
        each = "" if self.context_length is None else f", of up to {format_count(self.context_length, 'token')} each"
        kv = f"KV caches   {format_bytes(self.kv_bytes):>9}  for all sequences together{each}"
        sequences = format_count(self.max_sequences, "sequence")
        alone = f", {self.max_prompt_tokens} of a prompt alone" if len(set(self.tokens_by_outputs)) > 1 else ""
        return "\n".join((
            f"budget      {format_bytes(self.memory_budget):>9}  of {format_bytes(self.weight_bytes)} of weights; the "
            f"smallest that works is {format_bytes(self.minimum_budget)}",
            f"resident    {format_bytes(self.resident_bytes):>9}  {len(self.resident)} of "
            f"{format_count(len(self.stages), 'stage')}, "
            f"and {format_bytes(self.partition.base.weight_bytes)} outside of them",
            ring,
            *([kv] if self.kv_bytes else []),
            f"workspace   {format_bytes(self.workspace_bytes):>9}  up to "
            f"{format_count(self.max_tokens_per_sweep, 'token')} of {sequences} a sweep{alone}",
            f"each sweep  {format_bytes(self.bytes_per_sweep):>9}  are read from disk",
            *(f"because     {reason}" for reason in self.reasons),
        ))  # fmt: skip
