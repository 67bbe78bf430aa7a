"""The Pipeline Planner: divides a budget between resident stages, the ring, KV caches and workspace.

Candidates are all stage sizes with all numbers of loading agents. The cost model gives the seconds of each. Of the
candidates that are close to the fastest, and read little, the planner takes the simplest.

Source: Hermes (arXiv 2409.04249), section IV (Pipeline Planner), extended by a fixed resident set. All stages are used
in a cycle, so with R resident bytes every sweep reads at least all other bytes, whatever is kept.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hermes_async.config import EngineConfig, format_bytes, format_count
from hermes_async.errors import ConfigError, MemoryBudgetError
from hermes_async.pipeload.stage import StageLayout
from hermes_async.planning.cost_model import generation_seconds, sessions_for_all_experts, steady_seconds
from hermes_async.planning.expert_use import ExpertSizes, all_expert_bytes, expert_sizes, least_expert_bytes
from hermes_async.planning.machine_speeds import MachineSpeeds
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.plan import Partitioned, Plan
from hermes_async.planning.workspace import BudgetDivision
from hermes_async.storage.buffers import align_up

_CLOSE = 1.01  # a simpler plan may take this multiple of the time of the fastest plan,
_FEW_BYTES = 1.05  # and read this multiple of the fewest bytes a sweep
_UNDIVIDED = 1.1  # a buffer above the stage limit by more than this factor holds a module that cannot be divided
_PROMPT_TOKENS = _NEW_TOKENS = 64  # of the sessions by which plans are compared


def plan(
    budget: int,
    partition: Callable[[int | None], Partitioned],
    sizes: ModelSizes,
    config: EngineConfig,
    machine: MachineSpeeds,
) -> Plan:
    """Chooses how to run a model in `budget` bytes.

    Args:
        partition: Divides the model, given the most bytes of a stage; None if all stages are resident.

    Raises:
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ConfigError: Options contradict each other.
    """
    kv_budget = config.kv_budget
    if isinstance(kv_budget, int) and kv_budget >= budget:
        raise ConfigError(
            f"kv_budget={kv_budget} must be less than the memory budget of {budget} bytes, of which it is a part"
        )
    if kv_budget is not None and not sizes.generates:
        raise ConfigError(f"kv_budget={kv_budget}: this model does not generate, and keeps no KV caches")
    if config.kernels == "fastest":
        machine = machine.with_fastest_kernels()
    whole = partition(None)
    layout_bytes = align_up(whole.layout_bytes) if config.kernels == "fastest" else 0
    beside_bytes = align_up(whole.cast_bytes) + layout_bytes
    whole_bytes = whole.base.slot_bytes + sum(stage.slot_bytes for stage in whole.stages) + beside_bytes
    if config.max_resident_layers is not None and config.max_resident_layers < len(whole.stages):
        whole_bytes = sys.maxsize
    agent_counts = (config.num_loading_agents,) if config.num_loading_agents else sorted({1, *machine.agent_counts})
    partitions = _partitions(partition, sizes, config)
    expert_layers = expert_sizes(partitions[0].experts)
    rings = [_Ring.of(one, expert_sizes(one.experts), agents, config) for one in partitions for agents in agent_counts]
    smallest = min(rings, key=lambda ring: ring.weights_bytes)
    division = BudgetDivision(
        sizes, config, least_weights=min(smallest.weights_bytes, whole_bytes), most_weights=whole_bytes
    )
    minimum = division.minimum + sizes.draft_bytes
    if minimum > budget:
        least = division.least
        weights = f"{format_bytes(whole_bytes)} of weights"
        if smallest.weights_bytes <= whole_bytes:
            weights = (
                f"{format_bytes(smallest.always_bytes)} of weights that always stay, {smallest.num_buffers} buffers of "
                f"{format_bytes(smallest.slot_bytes)}"
            )
            if smallest.expert_layers:
                weights += f", {format_bytes(smallest.least_expert_bytes)} for experts"
        raise MemoryBudgetError(
            f"a memory budget of {format_bytes(budget)} is too small for this model: the smallest that works is "
            f"{minimum} bytes ({format_bytes(minimum)}): {weights}, {format_bytes(least.kv_bytes)} of KV and "
            f"{format_bytes(least.workspace_bytes)} of workspace"
            + (f", and {format_bytes(sizes.draft_bytes)} for the draft model" if sizes.draft_bytes else ""),
            requested_bytes=minimum,
            budget_bytes=budget,
            minimum_bytes=minimum,
        )
    memory = division.sequences(budget - sizes.draft_bytes)
    weights_bytes = division.weights_bytes(budget - sizes.draft_bytes)
    resident = Plan(
        memory_budget=budget,
        partition=whole,
        resident=frozenset(range(len(whole.stages))),
        num_loading_agents=config.num_loading_agents or 2,
        num_buffers=0,
        slot_bytes=0,
        kv_bytes=memory.kv_bytes,
        workspace_bytes=memory.workspace_bytes + beside_bytes,
        tokens_by_outputs=division.tokens_by_outputs(memory),
        max_sequences=memory.num_sequences,
        minimum_budget=minimum,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        head=sizes.head_of(whole.stages),
        looked_up=sizes.looked_up_of(whole.stages),
        machine=machine,
        explanation=(
            "all weights fit: they are read once, and no sweep waits for the disk",
            *sizes.weights_explanation,
            *_layout_explanation(layout_bytes, config, could=whole.layout_bytes > 0),
            *machine.explanation,
        ),
        context_length=sizes.context_length,
        layout_bytes=layout_bytes,
        kv_bytes_per_sequence=sizes.kv_bytes_per_sequence,
        in_turns=sizes.in_turns,
        expert_layers=expert_layers,
        num_experts_per_token=sizes.num_experts_per_token,
    )
    if weights_bytes >= whole_bytes:
        return resident
    plans = [ring.plan(resident, weights_bytes, sizes) for ring in rings if ring.weights_bytes <= weights_bytes]
    costs = [_cost(one, sizes, config) for one in plans]
    # Of the plans close to the fastest that read little, the first one has the largest stages, and of these the fewest
    # agents. Where computing is the limit, all may be as fast, but disks are slower than expected more often than not.
    close = [idx for idx, cost in enumerate(costs) if cost <= _CLOSE * min(costs)]
    read_bytes = [one.bytes_per_sweep + one.expert_bytes_per_sweep(1) for one in plans]
    fewest_bytes = min(read_bytes[idx] for idx in close)
    idx = next(idx for idx in close if read_bytes[idx] <= _FEW_BYTES * fewest_bytes)
    chosen = replace(plans[idx], sessions_for_all_experts=sessions_for_all_experts(plans[idx]))
    explanation = (
        *_explanation(plans, costs, idx, config),
        *expert_explanation(chosen),
        *sizes.weights_explanation,
        *machine.explanation,
    )
    return replace(chosen, explanation=explanation)


@dataclass(frozen=True, slots=True)
class _Ring:
    """A candidate: the stages of a model, and the buffers that they pass through."""

    partition: Partitioned
    expert_layers: tuple[ExpertSizes, ...]
    num_agents: int
    num_buffers: int
    slot_bytes: int
    max_resident: int | None  # stages

    @classmethod
    def of(
        cls, partition: Partitioned, expert_layers: tuple[ExpertSizes, ...], num_agents: int, config: EngineConfig
    ) -> _Ring:
        # One buffer's stage is computed while each agent fills another buffer.
        num_buffers, max_resident = num_agents + 1, None
        if config.max_resident_layers is not None:
            num_buffers = min(num_buffers, config.max_resident_layers)
            max_resident = config.max_resident_layers - num_buffers
        return cls(
            partition,
            expert_layers,
            num_agents=num_agents,
            num_buffers=num_buffers,
            slot_bytes=slot_bytes_of(partition.stages),
            max_resident=max_resident,
        )

    @property
    def always_bytes(self) -> int:
        return self.partition.base.slot_bytes + align_up(self.partition.cast_bytes)

    @property
    def ring_bytes(self) -> int:
        return self.num_buffers * self.slot_bytes

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights if all stages are streamed, and as few experts as possible are kept."""
        return self.always_bytes + self.ring_bytes + self.least_expert_bytes

    @property
    def least_expert_bytes(self) -> int:
        return least_expert_bytes(self.expert_layers, self.num_agents)

    def plan(self, resident: Plan, weights_bytes: int, sizes: ModelSizes) -> Plan:
        """The plan `resident`, with this ring and `weights_bytes` for weights.

        Every sweep needs all stages, and an expert only if a token is routed to it. So memory goes to stages first, and
        to experts what is left. If all stages stay, there is no ring.
        """
        stages = self.partition.stages
        cast_bytes = align_up(self.partition.cast_bytes) - align_up(resident.partition.cast_bytes)
        num_buffers, slot_bytes = self.num_buffers, self.slot_bytes
        most = len(stages) if self.max_resident is None else self.max_resident
        chosen = spread(stages, weights_bytes - self.weights_bytes, most)
        room = weights_bytes - self.always_bytes - self.least_expert_bytes
        if self.expert_layers and self.max_resident is None and sum(stage.slot_bytes for stage in stages) <= room:
            chosen, num_buffers, slot_bytes = frozenset(range(len(stages))), 0, 0
        expert_bytes = self.least_expert_bytes
        if self.max_resident is None:
            expert_bytes += room - num_buffers * slot_bytes - sum(stages[idx].slot_bytes for idx in chosen)
        return replace(
            resident,
            partition=self.partition,
            expert_layers=self.expert_layers,
            resident=chosen,
            num_loading_agents=self.num_agents,
            num_buffers=num_buffers,
            slot_bytes=slot_bytes,
            expert_bytes=min(all_expert_bytes(self.expert_layers), expert_bytes),
            workspace_bytes=resident.workspace_bytes - resident.layout_bytes + cast_bytes,
            layout_bytes=0,
            head=sizes.head_of(stages),
            looked_up=sizes.looked_up_of(stages),
        )


def _partitions(
    partition: Callable[[int | None], Partitioned], sizes: ModelSizes, config: EngineConfig
) -> list[Partitioned]:
    """Candidate partitions, largest stages first: whole layers, halves, quarters, until reads get too small.

    If a module cannot be divided, every buffer has its size. Then stages of that size are a candidate too.
    """
    whole_layers = partition(sizes.largest_layer_bytes)
    limits = [max(slot_bytes_of(whole_layers.stages), 1) if whole_layers.experts else sizes.largest_layer_bytes]
    stages_bytes = sum(stage.weight_bytes for stage in whole_layers.stages)
    smallest = max(16 * 1024, (stages_bytes if whole_layers.experts else sizes.weight_bytes) // 256)
    while limits[-1] > smallest and config.max_resident_layers is None:
        limits.append(max(smallest, limits[-1] // 2))
    slots = {limit: slot_bytes_of(partition(limit).stages) for limit in limits}
    if config.max_resident_layers is None:
        limits += [slot for limit, slot in slots.items() if slot > _UNDIVIDED * limit]
    # Of partitions that need the same memory, keep the one with the largest stages: it has the fewest reads.
    by_memory: dict[tuple[int, int], Partitioned] = {}
    for limit in sorted(set(limits)):
        one = partition(limit)
        by_memory[slot_bytes_of(one.stages), one.cast_bytes] = one
    return [by_memory[memory] for memory in sorted(by_memory, reverse=True)]


def _cost(plan: Plan, sizes: ModelSizes, config: EngineConfig) -> float:
    """The seconds by which plans are compared.

    The geometric mean over several cases, which gives them equal weight. For a model that generates: one session alone,
    and `config.max_sequences` sessions, in rounds of as many as run at once. For another model: texts from short to
    long.
    """
    if not sizes.generates:
        lengths = [min(length, plan.max_tokens_per_sweep) for length in sizes.text_lengths]
        texts_s = [steady_seconds(plan, num_tokens=length, num_outputs=0) for length in lengths]
        return math.prod(texts_s) ** (1 / len(texts_s))
    prompt_tokens = min(_PROMPT_TOKENS, max(1, (sizes.context_length or sys.maxsize) - 1))
    alone_s = generation_seconds(plan, 1, prompt_tokens, _NEW_TOKENS)
    together_s = generation_seconds(plan, plan.max_sequences, prompt_tokens, _NEW_TOKENS)
    return math.sqrt(alone_s * together_s * config.max_sequences / plan.max_sequences)


def _explanation(plans: Sequence[Plan], costs: Sequence[float], chosen: int, config: EngineConfig) -> list[str]:
    """One line for each choice, with the costs of the nearest other plans."""
    plan = plans[chosen]

    def compared(idx: int) -> str:
        percent = 100 * (costs[idx] / costs[chosen] - 1)
        if abs(percent) < 0.05:
            return "would take as long"
        return f"would take {abs(percent):.1f} % {'longer' if percent > 0 else 'less'}"

    def neighbors(is_alike: Callable[[Plan], bool]) -> tuple[list[int], list[int]]:
        """The nearest plans before and after the chosen one that are alike in something."""
        same = [idx for idx, one in enumerate(plans) if is_alike(one)]
        return [idx for idx in same if idx < chosen][-1:], [idx for idx in same if idx > chosen][:1]

    larger, smaller = neighbors(lambda one: one.num_loading_agents == plan.num_loading_agents)
    fewer, more = neighbors(lambda one: one.partition is plan.partition)
    sizes = [f"larger ones ({format_bytes(plans[idx].slot_bytes)}) {compared(idx)}" for idx in larger]
    sizes += [f"smaller ones ({format_bytes(plans[idx].slot_bytes)}) {compared(idx)}" for idx in smaller]
    agents = [f"{plans[idx].num_loading_agents} {compared(idx)}" for idx in fewer]
    for idx in more:
        ring = f", and cost {format_bytes(plans[idx].ring_bytes - plan.ring_bytes)}" if plan.num_buffers else ""
        agents.append(f"{plans[idx].num_loading_agents} {compared(idx)}{ring}: left out")
    resident = "spread over the depth: what ring, KV and workspace leave"
    if config.max_resident_layers is not None:
        sizes = [f"whole layers, as max_resident_layers={config.max_resident_layers} asks for"]
        resident = "as max_resident_layers asks for"
    name = format_count(plan.num_loading_agents, "loading agent")
    tokens = f"{format_count(plan.max_tokens_per_sweep, 'token')} a sweep"
    if plan.max_prompt_tokens > plan.max_tokens_per_sweep:
        tokens += f", {plan.max_prompt_tokens} of a prompt alone"
    workspace = f": their activations take {format_bytes(plan.workspace_bytes)}"
    kv = "as kv_budget asks for" if config.kv_budget else "a tenth of the budget, or more if that is little"
    stages = f"stages of up to {format_bytes(plan.slot_bytes)}: {', '.join(sizes) or 'no other size works'}"
    kept = f"{format_count(len(plan.resident), 'resident stage')}, {resident}; {len(plan.streamed)} streamed"
    if not plan.num_buffers:
        kept = "all weights but the experts stay, so there is no ring"
    return [
        *([stages] if plan.num_buffers else []),
        f"{name}, as asked for" if config.num_loading_agents else f"{name}: {'; '.join(agents) or 'no other fits'}",
        kept,
        *(
            f"stages of {group!r} ({format_bytes(nbytes)}) are read only in sweeps that need them"
            for group, nbytes in plan.bytes_by_group.items()
        ),
        *([f"KV caches: {kv}"] if plan.generates else []),
        tokens + (", as asked for" if config.max_tokens_per_sweep else workspace),
    ]


def expert_explanation(plan: Plan) -> list[str]:
    """How experts are kept and read; empty if none are read one by one."""
    if not plan.partition.experts:
        return []
    known = "measured" if plan.machine.expert_uses else "estimated, for routes without skew"
    kept, total = format_bytes(plan.expert_bytes), format_bytes(all_expert_bytes(plan.expert_layers))
    lines = [
        f"experts: {kept} of {total}, because every sweep needs the other weights, and these get memory first",
        f"a hit rate of {plan.expert_hit_rate(1):.0%} for one token: {known}",
    ]
    if plan.sessions_for_all_experts is not None:
        sessions = format_count(plan.sessions_for_all_experts, "session")
        lines.append(f"from {sessions} on, reading all experts takes no longer than reading those that are used")
    return lines


def _layout_explanation(layout_bytes: int, config: EngineConfig, *, could: bool) -> list[str]:
    """Whether weights that stay are laid out for kernels of whole numbers; empty if no weight can be."""
    if layout_bytes:
        return [
            "4-bit and 8-bit weights are laid out for torch's own kernels when they are loaded, which takes "
            f"{format_bytes(layout_bytes)} more; these round otherwise than transformers"
        ]
    if could and config.kernels != "fastest":
        return ["torch has kernels for these whole numbers, which are faster and round otherwise: kernels='fastest'"]
    return []


def spread(stages: Sequence[StageLayout], room: int, most: int) -> frozenset[int]:
    """Chooses at most `most` stages to keep resident in `room` bytes. More room never keeps less.

    They are spread evenly over the depth: while they are computed, loading agents read the next streamed stages. An
    optional stage is chosen only if all others are.
    """
    always = [idx for idx, stage in enumerate(stages) if stage.group is None]
    chosen = {always[idx] for idx in _spread([stages[idx] for idx in always], room, most)}
    if len(chosen) < len(always):
        return frozenset(chosen)
    optional = [idx for idx, stage in enumerate(stages) if stage.group is not None]
    left = room - sum(stages[idx].slot_bytes for idx in chosen)
    added = _spread([stages[idx] for idx in optional], left, most - len(chosen))
    return frozenset(chosen | {optional[idx] for idx in added})


def _spread(stages: Sequence[StageLayout], room: int, most: int) -> set[int]:
    """Chooses among stages that are all needed as often."""
    # Keep the same share of each size, then whatever still fits. The order is fixed, so more room keeps more.
    sizes = Counter(stage.slot_bytes for stage in stages)
    counts: Counter[int] = Counter()
    left = room
    for _, negative_size in sorted(
        ((idx + 0.5) / count, -size) for size, count in sizes.items() for idx in range(count)
    ):
        if -negative_size <= left and counts.total() < most:
            counts[-negative_size] += 1
            left += negative_size
    taken_share = (room - left) / max(1, sum(stage.slot_bytes for stage in stages))
    chosen: set[int] = set()
    taken, passed = 0, 0
    for idx, stage in enumerate(stages):
        size = stage.slot_bytes
        passed += size
        if counts[size] and taken + size <= passed * taken_share + size / 2:
            chosen.add(idx)
            taken += size
            counts[size] -= 1
    for size, count in counts.items():
        others = [idx for idx, stage in enumerate(stages) if stage.slot_bytes == size and idx not in chosen]
        chosen.update(others[(2 * idx + 1) * len(others) // (2 * count)] for idx in range(count))
    return chosen


def slot_bytes_of(stages: Sequence[StageLayout]) -> int:
    """The size of a buffer that each of the stages fits into."""
    return max((stage.slot_bytes for stage in stages), default=0)
