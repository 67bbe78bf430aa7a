"""An engine that goes on with another budget: more of it never leaves less for KV."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hermes_async.errors import MemoryBudgetError
from hermes_async.planning.plan import Plan
from hermes_async.planning.resize import PlanChange, resized
from tests.planning.test_planner_properties import KIB, FakeModel, any_models, mixtures, relaxed


@relaxed
@given(any_models, st.integers(0, 8000 * KIB), st.integers(0, 8000 * KIB), st.integers(0, 2000 * KIB))
def test_a_smaller_loss_never_leaves_less_for_kv(model: FakeModel, first: int, lost: int, less: int) -> None:
    opened = model.plan(model.minimum() + first + lost)
    least = min(opened.kv_bytes, 16 * model.kv_bytes_per_token)

    def after(budget: int) -> Plan:
        return resized(opened, budget, kv_least=least, kv_most=opened.kv_bytes, other_bytes=model.draft_bytes)

    budget = opened.memory_budget - lost
    try:
        poor = after(budget - less)
    except MemoryBudgetError:
        return
    rich = after(budget)
    assert rich.kv_bytes >= poor.kv_bytes >= least
    for plan in (poor, rich):
        assert plan.fixed_bytes + plan.kv_bytes + model.draft_bytes <= plan.memory_budget


def test_all_weights_stay_only_where_kv_keeps_its_tenth() -> None:
    model = FakeModel((500 * KIB,) * 12, 500 * KIB, 4 * KIB, KIB, 4096, KIB, KIB, 0)
    opened = model.plan(20_000 * KIB)
    assert not opened.num_buffers
    held = opened.resident_bytes + opened.workspace_bytes

    def after(budget: int) -> Plan:
        return resized(opened, budget, kv_least=256 * KIB, kv_most=opened.kv_bytes, other_bytes=0)

    tight, wide = after(held + 300 * KIB), after(held * 10 // 9 + 8 * KIB)
    assert tight.num_buffers and tight.kv_bytes >= tight.memory_budget // 10
    assert not wide.num_buffers and wide.kv_bytes >= wide.memory_budget // 10


@relaxed
@given(mixtures, st.integers(0, 8000 * KIB), st.integers(1, 4000 * KIB), st.integers(1, 4000 * KIB))
def test_experts_shrink_before_stages_and_grow_after_them(
    model: FakeModel, more: int, less: int, regained: int
) -> None:
    opened = model.plan(model.minimum() + more)
    plans = [opened]
    for budget in (opened.memory_budget - less, opened.memory_budget - less + regained):
        try:
            plan = resized(
                plans[-1], budget, kv_least=opened.kv_bytes, kv_most=opened.kv_bytes, other_bytes=model.draft_bytes
            )
        except MemoryBudgetError as error:
            assert error.minimum_bytes is not None and error.minimum_bytes > budget
            return
        plans.append(plan)
    if not opened.partition.experts:
        return
    for before, after in pairwise(plans):
        change, kv_bytes = PlanChange.between(before, after), opened.kv_bytes
        assert after.least_expert_bytes <= after.expert_bytes
        if change.leaving:
            assert after.expert_bytes < after.least_expert_bytes + max(stage.slot_bytes for stage in after.stages)
        assert bool(after.num_buffers) or after.resident == frozenset(range(len(after.stages)))
        # The larger of both budgets is never exceeded while the change is made.
        meanwhile = before.resident_bytes - change.leaving_bytes + change.coming_bytes + change.expert_bytes
        meanwhile += max(before.ring_bytes, after.ring_bytes) + after.workspace_bytes + kv_bytes + model.draft_bytes
        assert meanwhile <= max(before.memory_budget, after.memory_budget)
        # What is left after the stages that leave fits into the smaller budget.
        staying = before.resident_bytes - change.leaving_bytes + change.expert_bytes + before.ring_bytes
        assert staying + after.workspace_bytes + kv_bytes + model.draft_bytes <= after.memory_budget
