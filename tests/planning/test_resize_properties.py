"""An engine that goes on with another budget: more of it never leaves less for KV."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hermes_async.errors import MemoryBudgetError
from hermes_async.planning.plan import Plan
from hermes_async.planning.resize import resized
from tests.planning.test_planner_properties import KIB, FakeModel, models, relaxed


@relaxed
@given(models, st.integers(0, 8000 * KIB), st.integers(0, 8000 * KIB), st.integers(0, 2000 * KIB))
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
        parts = plan.resident_bytes + plan.ring_bytes + plan.kv_bytes + plan.workspace_bytes
        assert parts + model.draft_bytes <= plan.memory_budget


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
