"""What commands show on a terminal while no token comes."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from hermes_async import (
    Engine,
    EngineConfig,
    EngineSnapshot,
    MemorySnapshot,
    ReadError,
    RequestSnapshot,
    SamplingParams,
    StageSnapshot,
)
from hermes_async.cli import progress as progress_module
from hermes_async.cli.progress import EngineProgress, Row, rows_of, with_progress
from tests.engines import until

MIB = 1 << 20


def request(activity: Any, prompt: int = 0, computed: int = 0) -> RequestSnapshot:
    return RequestSnapshot(
        "id",
        activity,
        prompt_tokens=prompt,
        computed_tokens=computed,
        output_tokens=0,
        max_output_tokens=9,
        in_session=False,
    )


def snapshot(*requests: RequestSnapshot, loaded: int = 2, num_forwards: int = 0, sweeping: bool = False) -> Any:
    activities: list[Any] = ["ready"] * loaded + ["loading"] * (2 - loaded)
    stages = [StageSnapshot(f"layer {idx}", activity, True, 4 * MIB) for idx, activity in enumerate(activities)]
    stages.append(StageSnapshot("layer 2", "empty", False, 4 * MIB))
    return EngineSnapshot(
        at=0.0,
        engine="open",
        sweeping=sweeping,
        sweep=6,
        stage_idx=1,
        stages=tuple(stages),
        memory=MemorySnapshot(0, 0, 0, 0, 0, 0, other_bytes=0, free_bytes=0, kv_budget_bytes=0),
        requests=requests,
        num_forwards=num_forwards,
        num_sessions=0,
        tokens_generated=0,
        prompt_tokens_computed=0,
        bytes_read=0,
        read_seconds=0.0,
        compute_seconds=0.0,
        stall_seconds=0.0,
        expert_hits=0,
        expert_misses=0,
        num_experts=0,
        num_experts_in_memory=0,
        bytes_per_sweep=0,
        expert_bytes_per_sweep=0,
        disk_sweep_seconds=0.0,
        disk_measured=True,
    )


@pytest.mark.parametrize(
    ("seen", "rows"),
    [
        (snapshot(), []),
        (snapshot(request("generating"), sweeping=True), []),
        (snapshot(loaded=1), [Row("loading the weights that stay", 4 * MIB, 8 * MIB, "4.00 MiB of 8.00 MiB")]),
        (
            snapshot(request("prefilling", 900, 512), sweeping=True),
            [
                Row("reading the prompt", 512, 900, "512 of 900 tokens"),
                Row("computing sweep 7", 2, 3, "stage 2 of 3"),
            ],
        ),
        (
            snapshot(request("prefilling", 900, 512), request("prefilling", 100), request("waiting", 5)),
            [
                Row("reading 2 prompts", 512, 1000, "512 of 1000 tokens"),
                Row("waiting for memory or a place: 1 request"),
            ],
        ),
        (snapshot(request("waiting", 5)), [Row("waiting for memory or a place")]),
        (snapshot(request("preparing")), [Row("tokenizing")]),
        (snapshot(request("restoring", 5)), [Row("reading the history of a session from disk")]),
        (snapshot(num_forwards=2, sweeping=True), [Row("computing sweep 7", 2, 3, "stage 2 of 3")]),
    ],
)
def test_the_rows_of_a_moment(seen: EngineSnapshot, rows: list[Row]) -> None:
    assert rows_of(seen) == rows


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.anyio
async def test_a_terminal_sees_what_an_engine_does_until_a_command_prints(
    tiny_model: Any, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        go.wait(30)
        return read()

    disk.on_read = on_read
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LOOKS", 0.001)
    engine = Engine(tiny_model.path, memory_budget="8MiB", config=EngineConfig(num_loading_agents=1))

    async def work(progress: EngineProgress) -> tuple[int, ...]:
        await until(lambda: "opening the model" in terminal.getvalue())
        async with engine:
            await until(lambda: "loading the weights that stay" in terminal.getvalue())
            go.set()
            completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
            progress.hide()
            shown = len(terminal.getvalue())
            progress.update()
            await anyio.lowlevel.checkpoint()
            assert len(terminal.getvalue()) == shown
            progress.show()
        return completion.token_ids

    assert await with_progress(engine, work) == tiny_model.references[1]
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()  # the cursor is back


@pytest.mark.anyio
@pytest.mark.parametrize("at_terminal", [False, True])
async def test_nothing_is_shown_where_nobody_looks(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, at_terminal: bool
) -> None:
    stream = Terminal() if at_terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    engine = Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config)

    async def work(progress: EngineProgress) -> None:
        async with engine:
            await engine.complete("w5", SamplingParams(max_tokens=2))
            progress.show()

    await with_progress(engine, work, quiet=at_terminal)
    assert stream.getvalue() == ""


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
async def test_an_error_comes_out_alone(stream: Any, monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    monkeypatch.setattr("sys.stderr", stream)

    async def work(progress: EngineProgress) -> None:
        await anyio.lowlevel.checkpoint()
        raise ReadError("broken", path="x", offset=0)

    with pytest.raises(ReadError, match="broken"):
        await with_progress(Engine(tiny_model.path), work)
