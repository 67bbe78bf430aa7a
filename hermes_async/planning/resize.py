"""The plan of a running engine for another budget, and the difference between two plans."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError
from hermes_async.planning.cost_model import sessions_for_all_experts
from hermes_async.planning.expert_use import all_expert_bytes
from hermes_async.planning.plan import Plan
from hermes_async.planning.planner import expert_explanation, slot_bytes_of, spread


@dataclass(frozen=True, slots=True)
class PlanChange:
    """The difference between two plans with the same stages.

    Apply it in this order, so that the larger of both budgets is never exceeded: stages leave, KV and experts shrink,
    buffers are added, stages come, buffers are removed, KV and experts grow.

    Attributes:
        leaving: Indices of the stages that are resident only before.
        coming: Indices of the stages that are resident only afterwards.
        num_added_buffers: Buffers of `slot_bytes` that the ring gets, or loses if negative.
        expert_bytes: For experts in the meantime. If the ring is removed, its buffers are still there then.
    """

    leaving: frozenset[int]
    coming: frozenset[int]
    leaving_bytes: int
    coming_bytes: int
    num_added_buffers: int
    slot_bytes: int
    expert_bytes: int

    @classmethod
    def between(cls, before: Plan, after: Plan) -> PlanChange:
        leaving, coming = before.resident - after.resident, after.resident - before.resident
        beside_ring = after.expert_bytes - max(0, before.ring_bytes - after.ring_bytes)
        return cls(
            leaving=leaving,
            coming=coming,
            leaving_bytes=sum(before.stages[idx].slot_bytes for idx in leaving),
            coming_bytes=sum(after.stages[idx].slot_bytes for idx in coming),
            num_added_buffers=after.num_buffers - before.num_buffers,
            slot_bytes=max(before.slot_bytes, after.slot_bytes),
            expert_bytes=min(before.expert_bytes, after.expert_bytes, max(after.least_expert_bytes, beside_ring)),
        )


def resized(current: Plan, budget: int, *, kv_least: int, kv_most: int, other_bytes: int) -> Plan:
    """The plan of a running engine for another budget: the same stages, with more or fewer of them resident.

    Ring and workspace stay as they are. KV memory grows to a tenth of the budget if it is less, and shrinks only if the
    budget requires it. Stages come before experts, which get what is left. If all stages were resident and no longer
    fit with that KV, the plan gets a ring. If experts are read one by one, and all stages fit beside the ring, the plan
    loses the ring. Stages with tied tensors stay resident.

    Args:
        kv_least: The fewest bytes for KV: those in use, and those that one sequence must have.
        kv_most: The most bytes for KV.
        other_bytes: Everything else in the budget, such as a draft model.

    Raises:
        MemoryBudgetError: Too small for what the engine cannot free; the error has the smallest budget that works.
    """
    stages = current.stages
    tied = frozenset(idx for idx, stage in enumerate(stages) if stage.is_shared)

    def slots(indices: frozenset[int]) -> int:
        return sum(stages[idx].slot_bytes for idx in indices)

    base_bytes = current.partition.base.slot_bytes
    others_bytes = base_bytes + current.workspace_bytes + other_bytes + current.least_expert_bytes
    kv_beside_all = budget - others_bytes - slots(frozenset(range(len(stages))))
    num_buffers, slot_bytes = current.num_buffers, current.slot_bytes
    kv_bytes = budget // 10
    if num_buffers or current.partition.experts:
        kv_bytes = max(current.kv_bytes, kv_bytes)
    if not num_buffers:
        num_buffers = current.num_loading_agents + 1
        slot_bytes = slot_bytes_of([stage for idx, stage in enumerate(stages) if idx not in tied])
    fixed_bytes = others_bytes + slots(tied) + num_buffers * slot_bytes
    kv_bytes = max(kv_least, min(kv_bytes, kv_most, budget - fixed_bytes))
    room = budget - fixed_bytes - kv_bytes
    if current.partition.experts and kv_beside_all - current.ring_bytes >= (kv_least if room < 0 else kv_bytes):
        expert_bytes = min(
            all_expert_bytes(current.expert_layers), kv_beside_all - kv_bytes + current.least_expert_bytes
        )
        return _explained(
            replace(
                current,
                memory_budget=budget,
                resident=frozenset(range(len(stages))),
                num_buffers=0,
                slot_bytes=0,
                kv_bytes=min(kv_most, kv_beside_all + current.least_expert_bytes - expert_bytes),
                expert_bytes=expert_bytes,
            )
        )
    if not (current.num_buffers or current.partition.experts) and kv_beside_all >= (kv_least if room < 0 else kv_bytes):
        return replace(current, memory_budget=budget, kv_bytes=min(kv_most, kv_beside_all))
    if room < 0:
        minimum = fixed_bytes + kv_least
        experts = f"{format_bytes(current.least_expert_bytes)} for experts, " if current.partition.experts else ""
        draft = f" and {format_bytes(other_bytes)} of a draft model" if other_bytes else ""
        raise MemoryBudgetError(
            f"a budget of {format_bytes(budget)} is less than the {format_bytes(minimum)} that this engine cannot give "
            f"back: {format_bytes(base_bytes + slots(tied))} of weights that always stay, {num_buffers} buffers of "
            f"{format_bytes(slot_bytes)}, {experts}{format_bytes(current.workspace_bytes)} of workspace, "
            f"{format_bytes(kv_bytes)} of KV{draft}",
            requested_bytes=minimum,
            budget_bytes=budget,
            minimum_bytes=minimum,
        )
    # Either all resident stages stay and others come, or some leave and none comes.
    kept = current.resident - tied
    free = room - slots(kept)
    if free < 0:
        kept, free, possible = frozenset(), room, sorted(kept)
    else:
        possible = sorted(frozenset(range(len(stages))) - current.resident - tied)
    added = spread([stages[idx] for idx in possible], free, len(possible))
    resident = kept | tied | {possible[idx] for idx in added}
    expert_bytes = current.least_expert_bytes + room - slots(resident - tied)
    return _explained(
        replace(
            current,
            memory_budget=budget,
            resident=resident,
            num_buffers=num_buffers,
            slot_bytes=slot_bytes,
            kv_bytes=kv_bytes,
            expert_bytes=min(all_expert_bytes(current.expert_layers), expert_bytes) if current.partition.experts else 0,
        )
    )


def _explained(plan: Plan) -> Plan:
    plan = replace(plan, sessions_for_all_experts=sessions_for_all_experts(plan))
    origin = "resized: stages and workspace are those that the engine opened with"
    return replace(plan, explanation=(origin, *expert_explanation(plan)))
