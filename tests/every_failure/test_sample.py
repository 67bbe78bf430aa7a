"""A fixed sample of all failures; `make torture` tries all of them."""

from __future__ import annotations

import pytest

from tests.every_failure.every_failure import sample, try_faults
from tests.every_failure.scenarios import SCENARIOS, Scenario

NUM_FAULTS = 3


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_some_failures(scenario: Scenario) -> None:
    tried = try_faults(scenario, sample(NUM_FAULTS, SCENARIOS.index(scenario) / len(SCENARIOS)))
    assert tried.broken == []
    assert tried.points["switch"] > 20
    assert tried.num_runs >= NUM_FAULTS - 1  # the last point is not always reached
