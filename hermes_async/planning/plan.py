"""A plan: how a budget is divided between resident stages, the ring, KV caches and workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hermes_async.config import format_bytes, format_count
from hermes_async.planning.machine_speeds import MachineSpeeds

if TYPE_CHECKING:
    from hermes_async.pipeload.stage import StageLayout


class Partitioned(Protocol):
    """A model divided into stages; see `hermes_async.modeling.partition.Partition`."""

    @property
    def base(self) -> StageLayout: ...
    @property
    def stages(self) -> tuple[StageLayout, ...]: ...
    @property
    def cast_bytes(self) -> int: ...
    @property
    def layout_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget is divided; `str(plan)` explains it.

    Attributes:
        partition: The stages, in the order in which they are computed.
        resident: Indices of the stages that stay in memory.
        num_loading_agents: Stages that are read at once.
        num_buffers: Buffers of the ring, of `slot_bytes` each.
        kv_bytes: For the KV caches of all sequences.
        tokens_by_outputs: The most tokens of a sweep with one output, two, and so on. An output is a position whose
            logits are wanted, or a sequence without any.
        max_sequences: The most sequences of a sweep.
        minimum_budget: The smallest budget that this model runs in.
        kv_bytes_per_token: What each token of a sequence adds to its KV cache; 0 for a model that does not generate.
        head: Indices of the stages that are the output head or a part of it.
        looked_up: Indices of the stages that are only an embedding, whose rows are looked up.
        machine: The expected speeds of reading and computing.
        explanation: Why the planner chose this plan, one line for each choice.
        context_length: The most tokens of a sequence; None without a limit.
        kv_bytes_per_sequence: What a KV cache takes whatever its length is, such as recurrent states.
        in_turns: Each sequence of a sweep has a call of the model of its own, instead of a place in a packed row.
        layout_bytes: The part of the workspace in which weights are laid out for kernels of whole numbers. 0 where all
            weights are used as they are stored.
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
    machine: MachineSpeeds
    explanation: tuple[str, ...] = ()
    context_length: int | None = None
    kv_bytes_per_sequence: int = 0
    in_turns: bool = False
    layout_bytes: int = 0

    @property
    def generates(self) -> bool:
        """Whether the model generates, and keeps KV caches."""
        return self.kv_bytes_per_token + self.kv_bytes_per_sequence > 0

    @property
    def max_tokens_per_sweep(self) -> int:
        """The most tokens of a sweep, with any number of outputs."""
        return self.tokens_by_outputs[-1]

    @property
    def max_prompt_tokens(self) -> int:
        """The most tokens of a sweep with one prompt alone."""
        return self.tokens_by_outputs[0]

    @property
    def native_tokens(self) -> int:
        """The most tokens of a sweep that uses torch's own kernels."""
        return self.machine.native_tokens

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
        return tuple(stage for idx, stage in enumerate(self.stages) if idx not in self.resident and stage.group is None)

    @property
    def bytes_by_group(self) -> dict[str, int]:
        """Bytes of optional stages that a sweep reads in addition if it asks for their group, by group."""
        streamed = (stage for idx, stage in enumerate(self.stages) if idx not in self.resident)
        nbytes: dict[str, int] = {}
        for stage in streamed:
            if stage.group is not None:
                nbytes[stage.group] = nbytes.get(stage.group, 0) + stage.read_bytes
        return nbytes

    @property
    def bytes_per_sweep(self) -> int:
        """Bytes that every sweep reads from disk, without embedding rows."""
        return sum(stage.read_bytes for stage in self.streamed)

    @property
    def weight_bytes(self) -> int:
        return self.partition.base.weight_bytes + sum(stage.weight_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        names = (
            *("memory_budget", "minimum_budget", "weight_bytes", "resident_bytes", "num_loading_agents", "num_buffers"),
            *("slot_bytes", "ring_bytes", "bytes_per_sweep", "kv_bytes", "workspace_bytes", "layout_bytes"),
            *("max_tokens_per_sweep", "max_prompt_tokens", "max_sequences", "context_length"),
        )
        return {name: getattr(self, name) for name in names} | {
            "num_stages": len(self.stages),
            "num_resident_stages": len(self.resident),
            "batching": ("turns" if self.in_turns else "packed") if self.generates else None,
            "bytes_by_group": self.bytes_by_group,
            "speeds": self.machine.source,
            "reasons": list(self.explanation),
        }

    def __str__(self) -> str:
        slots = f"{format_count(self.num_buffers, 'buffer')} of {format_bytes(self.slot_bytes)}"
        ring = f"{slots} for {format_count(self.num_loading_agents, 'loading agent')}"
        each = "" if self.context_length is None else f", of up to {format_count(self.context_length, 'token')} each"
        tokens, sequences = (
            format_count(self.max_tokens_per_sweep, "token"),
            format_count(self.max_sequences, "sequence"),
        )
        alone = f", {self.max_prompt_tokens} of a prompt alone" if len(set(self.tokens_by_outputs)) > 1 else ""
        weights, minimum = format_bytes(self.weight_bytes), format_bytes(self.minimum_budget)
        outside = format_bytes(self.partition.base.weight_bytes)
        num_stages = format_count(len(self.stages), "stage")
        rows = [
            ("budget", self.memory_budget, f"of {weights} of weights; the smallest that works is {minimum}"),
            ("resident", self.resident_bytes, f"{len(self.resident)} of {num_stages}, and {outside} outside of them"),
            ("ring", self.ring_bytes, ring if self.num_buffers else "everything is resident"),
            ("KV caches", self.kv_bytes, f"for all sequences together{each}"),
            ("workspace", self.workspace_bytes, f"up to {tokens} of {sequences} a sweep{alone}"),
            ("each sweep", self.bytes_per_sweep, "are read from disk"),
            *((group, nbytes, "more in a sweep that needs it") for group, nbytes in self.bytes_by_group.items()),
        ]
        lines = [
            f"{name:10}  {format_bytes(size):>9}  {text}" for name, size, text in rows if size or name != "KV caches"
        ]
        return "\n".join([*lines, *(f"{'because':10}  {line}" for line in self.explanation)])
