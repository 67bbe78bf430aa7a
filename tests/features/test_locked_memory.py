"""Weights and buffers that no swap takes, within the limit on locked memory. The kernel's own count is the oracle."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import pytest

from hermes_async import format_bytes
from tests.features.locking import LARGE, LITTLE
from tests.models import TinyMixture

_, HARD_LIMIT = resource.getrlimit(resource.RLIMIT_MEMLOCK)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux locks pages as they are used"),
    pytest.mark.skipif(HARD_LIMIT != resource.RLIM_INFINITY and HARD_LIMIT < LARGE, reason="the limit is lower"),
]


@pytest.fixture(scope="module")
def found(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    mixture = TinyMixture(tmp_path_factory.mktemp("mixture"))
    command = [sys.executable, "-m", "tests.features.locking", tiny_model.path, mixture.path]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    results: dict[str, Any] = json.loads(ended.stdout)
    return results


def check_locked(state: dict[str, Any]) -> None:
    """All that is planned to be locked is, and no more."""
    weights = sum(state["holders"].get(name, 0) for name in ("resident weights", "ring buffers", "experts"))
    assert 0 < weights <= state["locked"] <= state["planned"]
    assert state["refusal"] == ""
    assert "locked " in state["text"]


def check_not_locked(state: dict[str, Any], limit: int | None = None) -> None:
    assert state["planned"] == state["locked"] == 0
    assert bool(state["refusal"]) == ("locked " in state["text"]) == (limit is not None)
    if limit is not None:
        assert f"{format_bytes(limit)}" in state["refusal"]
        assert "RLIMIT_MEMLOCK" in state["refusal"]


def test_weights_and_the_ring_are_locked_until_the_engine_is_left(found: dict[str, Any]) -> None:
    for lock_memory in ("auto", True):
        state, after = found[f"plenty {lock_memory}"]
        check_locked(state)
        assert after == 0


def test_what_the_limit_forbids_is_not_locked_and_the_plan_says_so(found: dict[str, Any]) -> None:
    check_not_locked(found["little auto"][0], LITTLE)
    check_not_locked(found["little False"][0])
    assert found["little auto"][0]["token_ids"] == found["plenty auto"][0]["token_ids"]


def test_to_lock_more_than_the_limit_is_an_error_that_names_it(found: dict[str, Any]) -> None:
    assert "lock_memory=True" in found["little True"]
    assert "64.0 KiB" in found["little True"]
    assert "RLIMIT_MEMLOCK" in found["little True"]


def test_stages_and_buffers_that_come_and_go_are_locked_and_unlocked(found: dict[str, Any]) -> None:
    *states, after = found["resized"]
    for state in states:
        check_locked(state)
        assert state["locked"] == state["needed"] == state["planned"]
        assert state["token_ids"] == states[0]["token_ids"]
    assert len({state["locked"] for state in states}) == len(states)
    assert after == 0
    # The ring comes when all weights were in memory.
    whole, streamed, after = found["smaller at its limit"]
    check_locked(whole)
    check_locked(streamed)
    assert streamed["holders"]["ring buffers"] > 0
    assert after == 0


def test_a_budget_whose_memory_cannot_be_locked(found: dict[str, Any]) -> None:
    before, refusal, same, smaller, after = found["resized beyond True"]
    assert "RLIMIT_MEMLOCK" in refusal
    assert {**same, "text": ""} == {**before, "text": ""}
    check_locked(smaller)
    assert after == 0
    before, larger, smaller, after = found["resized beyond auto"]
    check_locked(before)
    for state in (larger, smaller):  # all is unlocked, and stays so
        assert state["budget"] != before["budget"]
        assert state["planned"] == state["locked"] == 0
        assert "RLIMIT_MEMLOCK" in state["refusal"]
    assert after == 0


def test_the_weights_of_a_draft_model_are_locked_too(found: dict[str, Any]) -> None:
    state, after = found["draft"]
    check_locked(state)
    assert state["locked"] == state["planned"] > state["needed"]
    assert after == 0


def test_experts_are_locked_as_they_come(found: dict[str, Any]) -> None:
    *states, after = found["mixture"]
    assert len(states) == 3
    for state in states:
        check_locked(state)
        assert state["token_ids"] == states[0]["token_ids"]
    assert after == 0
    state, after = found["mixture at its limit"]
    check_locked(state)
    assert after == 0


def test_if_others_lock_what_was_left_nothing_is_locked_any_more(found: dict[str, Any]) -> None:
    planned, before, state = found["less left"]
    assert 0 < before < planned
    assert state["locked"] == LITTLE  # the other's
    assert state["planned"] == 0
    assert "another part of this process" in state["refusal"]
    assert state["token_ids"] == found["mixture"][0]["token_ids"]
