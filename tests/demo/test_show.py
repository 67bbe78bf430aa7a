"""What the demo shows while stories are written side by side."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from hermes_async.cli import app
from hermes_async.demo.show import SideBySide, Story, print_stories, statistics_table
from hermes_async.results import Chunk, EngineStatistics


def demo(*args: object) -> Result:
    return CliRunner().invoke(app, ["demo", *(str(arg) for arg in args)])


def rendered(renderable: object, *, width: int = 80, height: int = 30) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, height=height, force_terminal=True, color_system=None).print(renderable)
    return file.getvalue().splitlines()


def stories(number: int) -> list[Story]:
    return [Story(f"PROMPT {idx}:\n", "a line\n" * 40 + f"the end of {idx}", [1] * idx) for idx in range(number)]


STATISTICS = EngineStatistics(
    bytes_read=3 * 2**20,
    bytes_read_by_kind={"streamed weights": 3 * 2**20},
    bytes_resident=2**20,
    bytes_lent=0,
    bytes_beside_budget=0,
    bytes_in_use=0,
    peak_bytes_in_use=3 * 2**20,
    memory_budget=4 * 2**20,
    baseline_bytes=0,
    process_peak_rss_bytes=0,
    sweeps=10,
    tokens_generated=25,
    drafted_tokens=0,
    accepted_tokens=0,
    tokens_per_sweep=2.5,
    read_seconds=1.0,
    compute_seconds=2.0,
    loop_lag_ms={"p50": 0.0, "p99": 0.0, "max": 0.0},
    stall_seconds=0.25,
    expert_hits=0,
    expert_misses=0,
    experts_read_ahead=0,
    num_experts=0,
    num_experts_in_memory=0,
    expert_bytes=0,
    num_running=0,
    num_paused=0,
    num_waiting=0,
    num_sessions=0,
    num_parked=0,
    num_parkings=0,
    num_forwards=0,
    kv_bytes=0,
    prefix_bytes=0,
    prefix_hits=0,
    prefix_tokens=0,
    num_leases=0,
    num_free_buffers=0,
    holders={},
)


def test_panels_show_the_end_of_each_text_within_the_screen() -> None:
    lines = rendered(SideBySide(stories(4)))
    assert len(lines) <= 30
    assert all(len(line) <= 80 for line in lines)
    for idx in range(4):
        assert any(f"the end of {idx}" in line for line in lines)
    assert "the end of 0" in lines[-len(lines) // 2 - 2]


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)])
def test_panels_stand_side_by_side(number: int, columns: int) -> None:
    assert rendered(SideBySide(stories(number)), width=120)[0].count("╭") == columns


def test_panels_stand_below_each_other_on_a_narrow_screen() -> None:
    assert rendered(SideBySide(stories(2)), width=30)[0].count("╭") == 1


def test_a_story_says_how_far_it_is() -> None:
    story = Story("ROMEO:\n")
    assert story.state == "waiting"
    story.add(Chunk("But soft", (1, 2)))
    assert story.state == "2 tokens"
    story.add(Chunk(", what light", (3,), "length"))
    assert story.state == "3 tokens, length"
    assert story.as_text().plain == "ROMEO:\nBut soft, what light"


def test_plain_texts_are_neither_wrapped_nor_marked_up() -> None:
    file = io.StringIO()
    print_stories(Console(file=file, width=20), [Story("ROMEO:\n", "[bold] and far longer than a line", [1], "stop")])
    assert file.getvalue() == "--- session 1: 1 token, stop\nROMEO:\n[bold] and far longer than a line\n\n"


def test_the_table_has_the_figures() -> None:
    table = "\n".join(rendered(statistics_table(STATISTICS, 8 * 2**20)))
    for figure in ("8.00 MiB", "4.00 MiB", "3.00 MiB (75% of the budget)", "1.00 MiB", "10", "25", "2.50", "0.25 s"):
        assert f" {figure} " in table
    assert " - " in "\n".join(rendered(statistics_table(replace(STATISTICS, sweeps=0), 1)))


# --- the command, on the model that ships ---


def test_demo_streams_more_weights_than_it_has_memory_for() -> None:
    result = demo("--max-tokens", 4, "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    record = json.loads(result.stdout)
    plan, statistics = record["plan"], record["statistics"]
    assert plan["memory_budget"] < plan["weight_bytes"]
    assert 0 < plan["num_resident_stages"] < plan["num_stages"]
    assert plan["bytes_per_sweep"] > 0
    assert statistics["peak_bytes_in_use"] <= plan["memory_budget"]
    assert statistics["tokens_generated"] == 16
    assert statistics["tokens_generated"] / statistics["sweeps"] > 2
    assert [len(session["token_ids"]) for session in record["sessions"]] == [4] * 4
    assert len({session["text"] for session in record["sessions"]}) == 4


def test_demo_is_plain_where_no_terminal_is() -> None:
    result = demo("--max-tokens", 3, "--sessions", 2, "--memory", "5MiB")
    assert result.exit_code == 0
    assert result.stdout.startswith("2 sessions over ")
    assert "session 2: 3 tokens, length" in result.stdout
    assert "tokens per sweep" in result.stdout
    assert not [char for char in result.stdout if ord(char) < 32 and char != "\n"]


def test_demo_writes_the_same_for_a_seed_in_any_budget() -> None:
    def texts(*args: object) -> list[str]:
        record = json.loads(demo("--max-tokens", 4, "--sessions", 2, "--json", *args).stdout)
        return [session["text"] for session in record["sessions"]]

    assert texts("--seed", 5) == texts("--seed", 5, "--memory", "20MiB", "--loading-agents", 1) != texts("--seed", 6)


def test_demo_lets_sessions_wait_where_their_caches_do_not_fit() -> None:
    record = json.loads(demo("--max-tokens", 300, "--sessions", 1, "--json").stdout)
    assert record["plan"]["memory_budget"] < record["plan"]["weight_bytes"]
    record = json.loads(demo("--max-tokens", 2, "--sessions", 12, "--json").stdout)
    assert record["plan"]["memory_budget"] < record["plan"]["weight_bytes"]
    assert record["statistics"]["tokens_generated"] == 24


def test_demo_draws_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=file, force_terminal=True, width=100, height=40)
    )
    assert demo("--max-tokens", 3).exit_code == 0
    assert "╭" in file.getvalue()
    assert "3 tokens, length" in file.getvalue()
    assert "tokens per sweep" in file.getvalue()


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_ctrl_c_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    add = Story.add

    def add_then_interrupt(story: Story, *args: Any) -> None:
        add(story, *args)
        if len(story.token_ids) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Story, "add", add_then_interrupt)
    result = demo("--max-tokens", 500, *flags)
    assert result.exit_code == 130
    if flags:
        sessions = json.loads(result.stdout)["sessions"]
        assert {session["finish_reason"] for session in sessions} == {"abort"}
        assert any(session["text"] for session in sessions)
    else:
        assert "tokens, abort" in result.stdout
        assert "tokens per sweep" in result.stdout


def test_an_error_of_one_session_ends_the_demo() -> None:
    result = demo("--max-tokens", 900, "--memory", "2MiB")
    assert result.exit_code == 1
    assert result.stderr.startswith("hermes-async: error: ")
    assert result.stderr.count("\n") == 1
