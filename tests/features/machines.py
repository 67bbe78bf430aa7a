"""A machine with as much memory as a test says, for engines with automatic budgets."""

from __future__ import annotations

import pytest

from hermes_async.memory import automatic_budget, available, claims
from hermes_async.memory.automatic_budget import Observation
from hermes_async.memory.available import MemoryLimit
from hermes_async.memory.claims import Claim


class Machine:
    """Bytes that it would give."""

    total = 8 << 20


def told(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    """What engines are told when they look, which is always."""

    class Told(Machine):
        pass

    def look(claim: Claim) -> Observation:
        seen = claim.look()
        return Observation(Told.total, 0, others=min(seen.claimed_by_others, seen.for_budgets - seen.fair_share))

    monkeypatch.setattr(automatic_budget, "_observe", look)
    monkeypatch.setattr(automatic_budget, "SECONDS_BETWEEN_OBSERVATIONS", 0.0)
    monkeypatch.setattr(available, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(claims, "memory_limits", lambda: [MemoryLimit(Told.total)])
    monkeypatch.setattr(claims, "process_rss_bytes", lambda: 0)
    return Told
