"""A plan: how a budget is divided between resident stages, the ring, KV caches and workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hermes_async.config import format_bytes, format_count
from hermes_async.pipeload.expert_policy import NEW_BUFFERS
from hermes_async.planning.expert_use import (
    ExpertSizes,
    ExpertUse,
    LayerOfExperts,
    all_expert_bytes,
    expected_use,
    least_expert_bytes,
    uses_of_one_token,
)
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
    def experts(self) -> Sequence[LayerOfExperts]: ...
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
        expert_bytes: For experts that are read one by one, and kept as long as there is room.
        expert_layers: The sizes of each layer's experts, also where they are in memory with all other weights.
        num_experts_per_token: Experts of a layer that each token is routed to; 0 if that is not known.
        sessions_for_all_experts: The fewest sessions with which a sweep takes no longer if it reads all experts that
            are not in memory; None if there are no experts to read, or if `max_sequences` are too few.
        locked_bytes: The most bytes that are locked in memory: resident weights, also those of a draft model, ring and
            experts.
        lock_refusal: Why nothing is locked; empty if something is, or if nobody asked for it.
        lends: Whether stages that are streamed stay in memory that sequences do not need, until they need it.
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
    locked_bytes: int = 0
    lock_refusal: str = ""
    expert_bytes: int = 0
    expert_layers: tuple[ExpertSizes, ...] = ()
    num_experts_per_token: int = 0
    sessions_for_all_experts: int | None = None
    lends: bool = False

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
    def fixed_bytes(self) -> int:
        """All memory of the plan but that for KV caches."""
        return self.resident_bytes + self.ring_bytes + self.expert_bytes + self.workspace_bytes

    @property
    def usable_kv_bytes(self) -> int:
        """What `max_sequences` sequences of the longest context take of the KV memory."""
        if self.context_length is None:
            return self.kv_bytes
        sequence_bytes = self.context_length * self.kv_bytes_per_token + self.kv_bytes_per_sequence
        return min(self.kv_bytes, self.max_sequences * sequence_bytes)

    @property
    def usable_bytes(self) -> int:
        """What an engine with this plan uses of the budget, at most. Only idle sessions and prefixes take more."""
        return min(self.memory_budget, self.fixed_bytes + self.usable_kv_bytes + self.lendable_bytes)

    @property
    def lendable_bytes(self) -> int:
        """The most bytes of weights that stay in memory for sequences while these do not need it."""
        if not self.lends or not self.num_buffers:
            return 0
        streamed = sum(stage.slot_bytes for idx, stage in enumerate(self.stages) if idx not in self.resident)
        return min(streamed, self.memory_budget - self.resident_bytes - self.ring_bytes)

    @property
    def lockable_bytes(self) -> int:
        """The most bytes of the buffers for weights. Buffers for experts are made some at once, of each size."""
        made_ahead = (NEW_BUFFERS - 1) * sum({layer.slot_bytes for layer in self.expert_layers})
        experts = self.expert_bytes + made_ahead if self.partition.experts else 0
        return self.resident_bytes + self.ring_bytes + experts + self.lendable_bytes

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
        """Bytes that every sweep reads from disk, without embedding rows and experts."""
        return sum(stage.read_bytes for stage in self.streamed)

    @property
    def reads_weights(self) -> bool:
        """Whether sweeps read weights: not all of them are in memory."""
        return self.num_buffers > 0 or bool(self.partition.experts)

    def expert_use(self, layer: ExpertSizes, num_tokens: int) -> ExpertUse:
        """How many experts of a layer a sweep of `num_tokens` uses, and how many of them are in memory."""
        uses = uses_of_one_token(layer.num_experts, self.num_experts_per_token, self.machine.expert_uses)
        return expected_use(uses, num_tokens, layer.num_experts * self.kept_share)

    @property
    def cached_share(self) -> float:
        """The share of all experts that memory has room for."""
        if not self.partition.experts:
            return 1.0
        return min(1.0, self.expert_bytes / all_expert_bytes(self.expert_layers))

    @property
    def kept_share(self) -> float:
        """The share of all experts that stay in memory. The places in which agents read are not among them."""
        if self.cached_share == 1:
            return 1.0
        reading_bytes = self.num_loading_agents * max(layer.slot_bytes for layer in self.expert_layers)
        return max(0.0, self.expert_bytes - reading_bytes) / all_expert_bytes(self.expert_layers)

    @property
    def least_expert_bytes(self) -> int:
        """The fewest bytes for experts with which sweeps run."""
        return least_expert_bytes(self.expert_layers, self.num_loading_agents) if self.partition.experts else 0

    def expert_bytes_per_sweep(self, num_tokens: int) -> int:
        """Bytes of experts that a sweep of `num_tokens` is expected to read, in addition to `bytes_per_sweep`."""
        return round(
            sum(layer.read_bytes * self.expert_use(layer, num_tokens).num_read for layer in self.expert_layers)
        )

    def expert_hit_rate(self, num_tokens: int) -> float:
        """The share of the experts used by a sweep of `num_tokens` that are expected to be in memory."""
        uses = [self.expert_use(layer, num_tokens) for layer in self.expert_layers]
        return sum(use.num_hits for use in uses) / sum(use.num_used for use in uses) if uses else 1.0

    @property
    def weight_bytes(self) -> int:
        stages = (self.partition.base, *self.stages, *self.experts)
        return sum(stage.weight_bytes for stage in stages)

    @property
    def experts(self) -> tuple[StageLayout, ...]:
        """All experts of all layers that are read one by one."""
        return tuple(expert for layer in self.partition.experts for expert in layer.layouts)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        names = (
            *("memory_budget", "minimum_budget", "weight_bytes", "resident_bytes", "num_loading_agents", "num_buffers"),
            *("slot_bytes", "ring_bytes", "expert_bytes", "bytes_per_sweep", "kv_bytes", "workspace_bytes"),
            *("layout_bytes", "locked_bytes", "lendable_bytes"),
            *("max_tokens_per_sweep", "max_prompt_tokens", "max_sequences", "context_length"),
            "sessions_for_all_experts",
        )
        return {name: getattr(self, name) for name in names} | {
            "expert_bytes_per_sweep": self.expert_bytes_per_sweep(1),
            "expert_bytes_per_full_sweep": self.expert_bytes_per_sweep(self.max_sequences),
            "expert_hit_rate": self.expert_hit_rate(1) if self.partition.experts else None,
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
        no_ring = "all weights but the experts are resident" if self.experts else "everything is resident"
        each_sweep = "are read from disk" + (", without experts" if self.experts else "")
        expert_bytes, of_sessions = self.expert_bytes_per_sweep(1), "for one token"
        if self.max_sequences > 1:
            of_sessions += f", {format_bytes(self.expert_bytes_per_sweep(self.max_sequences))} for {self.max_sequences}"
        rows = [
            ("budget", self.memory_budget, f"of {weights} of weights; the smallest that works is {minimum}"),
            ("resident", self.resident_bytes, f"{len(self.resident)} of {num_stages}, and {outside} outside of them"),
            ("ring", self.ring_bytes, ring if self.num_buffers else no_ring),
            ("experts", self.expert_bytes, f"room for {self.cached_share:.0%} of {len(self.experts)} experts"),
            ("KV caches", self.kv_bytes, f"for all sequences together{each}"),
            ("workspace", self.workspace_bytes, f"up to {tokens} of {sequences} a sweep{alone}"),
            ("lent", self.lendable_bytes, "at most, of KV caches and workspace to weights, until sequences need it"),
            ("locked", self.locked_bytes, self.lock_refusal or "at most, of weights and buffers; no swap takes these"),
            ("each sweep", self.bytes_per_sweep, each_sweep),
            ("and experts", expert_bytes, f"{of_sessions}, at a hit rate of {self.expert_hit_rate(1):.0%}"),
            *((group, nbytes, "more in a sweep that needs it") for group, nbytes in self.bytes_by_group.items()),
        ]
        unless_empty = ("KV caches", "experts", "lent", "and experts", *(() if self.lock_refusal else ("locked",)))
        rows = [row for row in rows if row[1] or row[0] not in unless_empty]
        width = max(10, *(len(name) for name, _, _ in rows))
        lines = [f"{name:{width}}  {format_bytes(size):>9}  {text}" for name, size, text in rows]
        return "\n".join([*lines, *(f"{'because':{width}}  {line}" for line in self.explanation)])
