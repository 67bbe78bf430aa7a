"""Traces: what the agents did, in a file that Perfetto and `timeline` read, also where it was cut off."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.testing import CliRunner

from hermes_async import ConfigError, Engine
from hermes_async.cli import app, pictures
from hermes_async.cli.timeline import read
from hermes_async.pipeload.trace import WAITS_FOR_KV, WAITS_FOR_MEMORY, Span, Timeline, Trace
from tests.engines import BLOCK_BYTES, greedy_params, tokens
from tests.inside import inside

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


async def traced(model: Any, file: Path) -> Any:
    """Two requests, one after another; returns the statistics and plan."""
    async with Engine(model.path, memory_budget="8MiB", config=model.config, trace=file) as engine:
        for idx in (1, 2):
            completion = await engine.complete(model.prompts[idx], model.params)
            assert completion.token_ids == model.references[idx]
        return engine.statistics(), engine.plan


async def test_what_a_trace_holds(tiny_model: Any, file: Path) -> None:
    statistics, plan = await traced(tiny_model, file)
    events = json.loads(file.read_text())  # noqa: ASYNC240
    assert all({"ph", "pid", "tid", "name"} <= event.keys() for event in events)
    timeline = read(file)
    agents = [f"loading agent {idx}" for idx in range(plan.num_loading_agents)]
    assert set(timeline.rows) == {*agents, "waits for memory", "inference agent", "daemon agent", "sweeps"}
    assert len(timeline.rows["sweeps"]) == statistics.sweeps
    streamed = [stage.name for idx, stage in enumerate(plan.stages) if idx not in plan.resident]
    computed = [span.name for span in timeline.rows["inference agent"] if span.name in streamed]
    assert computed == streamed * statistics.sweeps
    loads = [span for agent in agents for span in timeline.rows[agent]]
    for name in streamed:
        assert sum(span.name == name for span in loads) >= statistics.sweeps
    for spans in timeline.rows.values():  # an agent does one thing after another
        assert all(one.end <= other.start + 1e-6 for one, other in pairwise(spans))
    weights = [value for _, value in timeline.counters["weights"]]
    assert max(weights) <= plan.resident_bytes + plan.ring_bytes
    assert weights[-1] == 0 <= min(weights)


async def test_a_trace_shows_who_waits_for_memory(tiny_model: Any) -> None:
    trace = Trace()
    config = replace(tiny_model.config, kv_budget=4 * BLOCK_BYTES, share_prefixes=False)  # one long sequence at a time
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config, trace=trace) as engine:
        async with anyio.create_task_group() as group:
            for name in ("first", "second"):
                group.start_soon(partial(engine.complete, tokens(1, 45), greedy_params(10), request_id=name))
        rows = Timeline.of(trace.drain()).rows
    (wait,) = rows[WAITS_FOR_KV]  # of the request whose prompt was prepared last
    assert wait.name in ("KV of request first", "KV of request second")
    assert {span.name for span in rows[WAITS_FOR_MEMORY]} <= {span.name for span in rows["inference agent"]}


async def test_without_a_file_nothing_is_traced(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        assert not inside(engine).is_traced


async def test_a_file_that_cannot_be_written(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the trace file .*nowhere.* cannot be written: No such file"):
        await traced(tiny_model, tmp_path / "nowhere" / "trace.json")


@pytest.mark.parametrize("call", ["fsync", "replace"])
async def test_a_disk_that_is_full_ends_the_trace_alone(
    tiny_model: Any, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    await traced(tiny_model, file)
    message = f"the trace {file} cannot be written: No space left on device"
    assert [record.message for record in caplog.records] == [message]
    assert list(file.parent.iterdir()) == []


async def test_an_older_trace_is_written_over(tiny_model: Any, file: Path) -> None:
    file.touch()  # noqa: ASYNC240
    await traced(tiny_model, file)
    file.write_text(file.read_text() + " " * 10**6)  # noqa: ASYNC240
    await traced(tiny_model, file)
    assert read(file).rows
    file.write_text(json.dumps(json.loads(file.read_text())))  # noqa: ASYNC240 - as `profile --trace` does
    await traced(tiny_model, file)
    assert read(file).rows


def put_something_else(kind: str, file: Path) -> Path:
    """At `file`; returns the file that must stay as it is."""
    if kind == "fifo":
        os.mkfifo(file)
        return file
    if kind == "directory":
        file.mkdir()
        return file
    if kind == "dangling link":
        file.symlink_to(file.parent / "nothing")
        return file
    kept = file.parent / "kept" if "link" in kind else file
    kept.write_bytes(b"[1, 2, 3]" if kind == "json" else b"weights")
    if kind == "link":
        file.symlink_to(kept)
    elif kind == "hard link":
        file.hardlink_to(kept)
    return kept


SOMETHING_ELSE = ["file", "json", "link", "dangling link", "hard link", "fifo", "directory"]


@pytest.mark.parametrize("kind", SOMETHING_ELSE)
async def test_a_trace_is_written_over_nothing_else(tiny_model: Any, file: Path, kind: str) -> None:
    kept = put_something_else(kind, file)
    before = kept.read_bytes() if kept.is_file() else None
    with pytest.raises(ConfigError, match=r"the trace file .*trace\.json cannot be written: "):
        await traced(tiny_model, file)
    assert (kept.read_bytes() if kept.is_file() else None) == before
    assert not (file.parent / "nothing").exists()


async def test_a_shard_is_no_trace_file(tiny_model: Any) -> None:
    before = (tiny_model.path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="no trace file of hermes-async is there; remove it, or give another name"):
        await traced(tiny_model, (tiny_model.path / "model.safetensors"))
    assert (tiny_model.path / "model.safetensors").read_bytes() == before


def cut_off(file: Path) -> None:
    """As after a crash, in the midst of an event."""
    file.write_text(file.read_text()[:-100])


def timeline(*args: object) -> Any:
    return CliRunner().invoke(app, ["timeline", *(str(arg) for arg in args)])


async def test_pictures(tiny_model: Any, file: Path, tmp_path: Path) -> None:
    await traced(tiny_model, file)
    picture = tmp_path / "plot.png"
    for args in ((), ("--start", 0), ("--start", 0, "--seconds", 3600)):
        result = timeline(file, "-o", picture, *args)
        assert result.exit_code == 0
        told = rf"{re.escape(str(picture))} shows \d+\.\d+ s to \d+\.\d+ s of {re.escape(str(file))}: \d+ spans\n"
        assert re.fullmatch(told, result.output)
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    cut_off(file)
    assert timeline(file, "-o", tmp_path / "plot.svg").exit_code == 0


@pytest.mark.parametrize("content", ["", "no trace", "{}", '[{"ph": "X"}]', None])
def test_what_is_no_trace(file: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        file.write_text(content)
    result = timeline(file, "-o", tmp_path / "plot.png")
    assert result.exit_code == 1
    assert result.output.startswith(f"hermes-async: error: {file} ")
    assert result.output.count(os.linesep) == 1


async def test_pictures_that_cannot_be_drawn(tiny_model: Any, file: Path, tmp_path: Path) -> None:
    await traced(tiny_model, file)
    for args, message in (
        ((tmp_path / "plot.xyz",), "cannot be written"),
        ((tmp_path / "nowhere" / "plot.png",), "cannot be written"),
        ((tmp_path / "plot.png", "--start", 3600, "--seconds", 1), "has nothing between 3600.000 s and 3601.000 s"),
    ):
        result = timeline(file, "-o", *args)
        assert result.exit_code == 1
        assert result.output.startswith("hermes-async: error: ")
        assert message in result.output


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "eps"])
def test_a_picture_is_written_over_a_picture_of_ours_alone(tmp_path: Path, suffix: str) -> None:
    def draw(path: Path) -> None:
        pictures.save(pictures.pyplot().figure(figsize=(1, 1)), path)

    picture = tmp_path / f"plot.{suffix}"
    for _ in range(2):
        draw(picture)
    made = picture.read_bytes()
    for kind in (
        SOMETHING_ELSE if suffix == "png" else ["file"]
    ):  # the formats differ only in how our pictures are marked
        other = tmp_path / f"other.{suffix}"
        kept = put_something_else(kind, other)
        before = kept.read_bytes() if kept.is_file() else None
        with pytest.raises(ConfigError, match=f"the picture {re.escape(str(other))} cannot be written: "):
            draw(other)
        assert (kept.read_bytes() if kept.is_file() else None) == before
        other.rmdir() if kind == "directory" else other.unlink()
    assert picture.read_bytes() == made


def test_a_part_of_a_timeline_begins_with_what_was_before() -> None:
    whole = Timeline(
        {"a": [Span("x", 0, 1), Span("y", 2, 3)], "b": [Span("z", 9, 10)]}, {"weights": [(0, 5), (1, 7), (2.5, 9)]}
    )
    part = whole.between(2, 4)
    assert part.rows == {"a": [Span("y", 2, 3)]}
    assert part.counters == {"weights": [(2, 7), (2.5, 9)]}
