"""`hermes-async plan` of a mixture of experts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from hermes_async.cli import app
from tests.models import mixture_config


def test_a_plan_explains_what_is_read_of_experts(
    random_model: Any, save_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(save_model(random_model(mixture_config())))
    monkeypatch.setenv("COLUMNS", "80")

    def told(*args: str) -> str:
        result = CliRunner().invoke(app, ["plan", path, *args])
        assert result.exit_code == 0, result.output
        return result.stdout

    text = told("--memory", "2MiB")
    for part in ("experts  ", "and experts  ", "of 32 experts", "estimated, for routes without skew", "hits", "reads"):
        assert part in text
    record = json.loads(told("--memory", "2MiB", "--json"))
    expert_bytes = 3 * 64 * 64 * 4
    assert record["expert_bytes_per_sweep"] == round(8 * expert_bytes * (1 - record["expert_hit_rate"]))
    one, *more = record["predictions"]
    assert one["bytes_per_sweep"] == record["bytes_per_sweep"] + record["expert_bytes_per_sweep"]
    assert all(other["bytes_per_sweep"] > one["bytes_per_sweep"] for other in more)
    table = told("--sweep")
    assert "hits" in table and "…" not in table and max(map(len, table.splitlines())) <= 80
    records = json.loads(told("--sweep", "--json"))
    rates = [one["predictions"][0]["expert_hit_rate"] for one in records]
    assert rates[-1] is None and 0 <= rates[0] < rates[-2] <= 1  # at the end, all weights are in memory
    assert records[-1]["expert_bytes"] == 0 < records[0]["expert_bytes"]
