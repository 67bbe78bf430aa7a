"""What an engine that runs does with another budget: the same stages, and more or fewer of them resident."""

from __future__ import annotations

from dataclasses import replace

from hermes_async.config import format_bytes
from hermes_async.errors import MemoryBudgetError
from hermes_async.planning.plan import Plan
from hermes_async.planning.planner import slot_bytes_of, spread


def resized(current: Plan, budget: int, *, kv_least: int, kv_most: int, other_bytes: int) -> Plan:
    """The plan of an engine that goes on with another budget: the same stages, and more or fewer of them resident.

    Ring and workspace stay as they are. KV memory keeps what it has, or a tenth of the budget if that is more, unless
    the budget would not do without a part of it. Where nothing was streamed so far and has to be now, to leave KV as
    much as that, a ring is made; a stage whose tensors another module is tied to stays.

    Args:
        kv_least: Bytes that sequences hold now, or that one must have room for.
        kv_most: Bytes that there is a place for.
        other_bytes: Of what else is in the budget, such as a draft model.

    Raises:
        MemoryBudgetError: Less than what cannot be given back; the error has the smallest that works.
    """
    stages = current.stages
    base, weights = current.partition.base.slot_bytes, sum(stage.slot_bytes for stage in stages)
    fixed = base + current.workspace_bytes + other_bytes
    kv_beside_all = budget - fixed - weights
    shared = {idx for idx, stage in enumerate(stages) if stage.is_shared}
    always = base + sum(stages[idx].slot_bytes for idx in shared)
    buffers, slot = current.num_buffers, current.slot_bytes
    if not buffers:
        buffers = current.num_loading_agents + 1
        slot = slot_bytes_of([stage for idx, stage in enumerate(stages) if idx not in shared])
    fixed += always - base + buffers * slot
    kv = max(current.kv_bytes, budget // 10) if current.num_buffers else budget // 10
    kv = max(kv_least, min(kv, kv_most, budget - fixed))
    minimum = fixed + kv_least
    room = budget - fixed - kv
    if not current.num_buffers and kv_beside_all >= (kv_least if room < 0 else kv):
        return replace(current, memory_budget=budget, kv_bytes=min(kv_most, kv_beside_all))
    if room < 0:
        raise MemoryBudgetError(
            f"a budget of {format_bytes(budget)} is less than the {format_bytes(minimum)} that this engine cannot give "
            f"back: {format_bytes(always)} of weights that always stay, {buffers} buffers of {format_bytes(slot)}, "
            f"{format_bytes(current.workspace_bytes)} of workspace, {format_bytes(kv)} of KV"
            + (f" and {format_bytes(other_bytes)} of a draft model" if other_bytes else ""),
            requested_bytes=minimum,
            budget_bytes=budget,
            minimum_bytes=minimum,
        )
    kept = sorted(current.resident - shared)
    if sum(stages[idx].slot_bytes for idx in kept) > room:
        resident = {kept[idx] for idx in spread([stages[idx] for idx in kept], room, len(kept))}
    else:
        left = room - sum(stages[idx].slot_bytes for idx in kept)
        others = [idx for idx in range(len(stages)) if idx not in current.resident | shared]
        resident = {*kept, *(others[idx] for idx in spread([stages[idx] for idx in others], left, len(others)))}
    return replace(
        current,
        memory_budget=budget,
        resident=frozenset(resident | shared),
        num_buffers=buffers,
        slot_bytes=slot,
        kv_bytes=kv,
        reasons=("resized while it runs: stages, ring and workspace are those that it opened with",),
    )
