"""What users see of experts that are read one by one: statistics, snapshots, metrics, traces and maps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from hermes_async import Engine, EngineConfig, EngineSnapshot, EngineStatistics, Plan
from hermes_async.cli import app
from hermes_async.cli.answer import statistics_line
from hermes_async.cli.expert_map import ExpertMap
from hermes_async.cli.timeline import Bar, bars_of, read
from hermes_async.pipeload.trace import Span, Timeline
from hermes_async.server.metrics import RequestMetrics
from tests.engines import greedy_params, settle, tokens
from tests.server.running import counts_of

MODULES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
NUM_EXPERTS = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of an engine after some sweeps, and the file of its trace."""

    statistics: EngineStatistics
    snapshot: EngineSnapshot
    metrics: dict[str, float]
    plan: Plan
    after: EngineStatistics
    trace: Path


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Of an engine with room for some of the experts."""
    path = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=NUM_EXPERTS, num_experts_per_tok=2, vocab_size=96,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).eval().save_pretrained(path)
    trace = path / "trace.json"

    async def main() -> Seen:
        engine = Engine(
            path,
            memory_budget="2MiB",
            config=EngineConfig(num_loading_agents=2, kv_budget="64KiB", max_tokens_per_sweep=16),
            trace=trace,
        )
        async with engine:
            await engine.complete(tokens(1, 20), greedy_params(12))
            await settle(engine)
            statistics, snapshot, plan = engine.statistics(), engine.snapshot(), engine.plan
            metrics = counts_of(RequestMetrics(engine).text().decode())
        return Seen(statistics, snapshot, metrics, plan, engine.statistics(), trace)

    return anyio.run(main)


def test_statistics(seen: Seen) -> None:
    now = seen.statistics
    assert now.num_experts == len(seen.plan.experts) == 2 * NUM_EXPERTS
    assert 0 < now.num_experts_in_memory < now.num_experts
    assert 0 < now.expert_bytes <= seen.plan.expert_bytes == now.holders["experts"]
    assert min(now.expert_hits, now.expert_misses) > 0
    assert now.expert_hit_rate == now.expert_hits / (now.expert_hits + now.expert_misses)
    (read_bytes,) = {expert.read_bytes for expert in seen.plan.experts}
    assert now.bytes_read_by_kind["experts"] == read_bytes * (now.expert_misses + now.experts_read_ahead)
    assert now.bytes_read_by_kind.keys() >= {"resident weights", "embedding rows", "experts"}
    assert sum(now.bytes_read_by_kind.values()) == now.bytes_read
    assert f"read; {now.expert_hit_rate:.0%} of the experts were in memory when they were needed; peak" in (
        statistics_line(now)
    )


def test_counts_stay_when_the_engine_was_left(seen: Seen) -> None:
    assert (seen.after.num_experts_in_memory, seen.after.expert_bytes) == (0, 0)
    assert (seen.after.expert_hits, seen.after.expert_misses) == (
        seen.statistics.expert_hits,
        seen.statistics.expert_misses,
    )


def test_a_snapshot(seen: Seen) -> None:
    now, statistics = seen.snapshot, seen.statistics
    assert now.memory.expert_bytes == seen.plan.expert_bytes
    assert now.memory.other_bytes == 0
    assert now.expert_bytes_per_sweep == seen.plan.expert_bytes_per_sweep(1) > 0
    assert (now.expert_hits, now.expert_misses) == (statistics.expert_hits, statistics.expert_misses)
    assert (now.num_experts, now.num_experts_in_memory) == (statistics.num_experts, statistics.num_experts_in_memory)


def test_metrics(seen: Seen) -> None:
    now = seen.statistics
    expected = {
        "expert_hits_total": now.expert_hits,
        "expert_misses_total": now.expert_misses,
        "experts_read_ahead_total": now.experts_read_ahead,
        "num_experts": now.num_experts,
        "num_experts_in_memory": now.num_experts_in_memory,
        "expert_bytes": now.expert_bytes,
    }
    assert {name: seen.metrics[f"hermes_async_{name}"] for name in expected} == expected
    for kind, nbytes in seen.statistics.bytes_read_by_kind.items():
        assert seen.metrics[f'hermes_async_kind_bytes_read_total{{kind="{kind}"}}'] == nbytes


def test_a_map_agrees_with_the_statistics(seen: Seen) -> None:
    timeline = read(seen.trace)
    assert timeline.experts == dict.fromkeys(MODULES, NUM_EXPERTS)
    sweeps, statistics = timeline.rows["sweeps"], seen.statistics
    expert_map = ExpertMap.of(timeline, sweeps[0].start, sweeps[-1].end)
    assert expert_map.num_sweeps == statistics.sweeps
    assert (expert_map.num_hits, expert_map.num_misses) == (statistics.expert_hits, statistics.expert_misses)
    assert sum(uses.sum() for uses in expert_map.uses) == statistics.expert_hits + statistics.expert_misses
    assert sum(kept.sum() for kept in expert_map.kept) == statistics.num_experts_in_memory
    for uses, shares, kept in zip(expert_map.uses, expert_map.shares, expert_map.kept, strict=True):
        assert (shares[uses > 0] > 0).all()
        assert not (kept & (shares == 0)).any()
        assert shares.max() <= 1
    first = ExpertMap.of(timeline, sweeps[0].start, sweeps[0].end)
    assert first.num_sweeps == 1
    assert max(uses.max() for uses in first.uses) == 1
    most = max(value for _, value in timeline.counters["experts"])
    assert most == statistics.num_experts_in_memory * seen.plan.experts[0].weight_bytes
    assert timeline.counters["experts"][-1][1] == 0


def run_timeline(*args: object) -> Any:
    return CliRunner().invoke(app, ["timeline", *(str(arg) for arg in args)])


def test_a_map_as_text_and_as_a_picture(seen: Seen, tmp_path: Path) -> None:
    text = run_timeline(seen.trace, "--experts").output.splitlines()
    asked = seen.statistics.expert_hits + seen.statistics.expert_misses
    assert text[0] == (
        f"16 experts in 2 layers, {seen.statistics.sweeps} sweeps; {seen.statistics.expert_hit_rate:.0%} of {asked} "
        "were in memory when they were needed"
    )
    block = r"0 \|[ .:\-=+*#%@]{8}\| NOTE\n1 \|[ .:\-=+*#%@]{8}\| NOTE"
    used, kept = block.replace("NOTE", "[1-8] of 8"), block.replace("NOTE", r"\d at the end, \d+% on average")
    assert re.fullmatch(rf'used, by layer and expert \("@": in \d+% of the sweeps\)\n{used}', "\n".join(text[1:4]))
    assert re.fullmatch(rf'in memory, by layer and expert \("@": all the time\)\n{kept}', "\n".join(text[4:]))
    picture = tmp_path / "map.png"
    result = run_timeline(seen.trace, "--experts", "-o", picture)
    assert result.output.endswith(f"of {seen.trace}: {seen.statistics.sweeps} sweeps\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run_timeline(seen.trace, "-o", picture).exit_code == 0


def test_what_has_no_map(seen: Seen, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('[{"ph": "M", "name": "experts", "args": {"a": 1000000000000}}]')
    for args, code, message in (
        ((wrong, "--experts"), 1, "is no trace of hermes-async: ValueError: a module has from 1 to 65536 experts"),
        ((other, "--experts"), 1, "has no experts that are read one by one"),
        ((seen.trace, "--experts", "--start", 3600), 1, "has no sweep between 3600.000 s and"),
        ((seen.trace,), 2, "it is needed, except with --experts"),
    ):
        result = run_timeline(*args)
        assert (result.exit_code, message in result.output) == (code, True)


def test_short_experts_of_a_layer_are_one_bar_of_each_kind() -> None:
    one, other = MODULES
    names = [f"wait for {one}.0", f"{one}.1", f"{one}.0", f"wait for {one}.5", f"{one}.5", f"{other}.0", "lm_head"]
    spans = [Span(name, idx, idx + 1) for idx, name in enumerate(names)]
    shown = Timeline({"inference agent": spans}, experts=dict.fromkeys(MODULES, NUM_EXPERTS))
    long = [bar.kind for bar in bars_of(shown, "inference agent", shortest=0.5)]
    assert long == ["wait", *["compute experts"] * 2, "wait", *["compute experts"] * 2, "compute"]
    assert list(bars_of(shown, "inference agent", shortest=1.0)) == [
        Bar("wait", f"{one}: 2", 0, 2),
        Bar("compute experts", f"{one}: 3", 2, 5),
        Bar("compute experts", f"{other}: 1", 5, 6),
        Bar("compute", "lm_head", 6, 7),
    ]
