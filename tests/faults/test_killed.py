"""A process that is killed leaves no file of ours that the next start does not remove, and none that is cut off."""

from __future__ import annotations

import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from hermes_async import Engine
from hermes_async.conversion.quantizing import quantize
from hermes_async.storage.own_file import is_unfinished
from tests.cli.forked import ForkedCommands

pytestmark = pytest.mark.anyio

ENGINE = """
import asyncio, sys, time
from pathlib import Path
from hermes_async import Engine, EngineConfig
from hermes_async.engine import trace_file
from tests.engines import BLOCK_BYTES, greedy_params, tokens
trace_file._SECONDS_BETWEEN_WRITES = 0.01

async def main(path, trace, folder):
    config = EngineConfig(
        max_resident_layers=2, max_tokens_per_sweep=16, kv_budget=8 * BLOCK_BYTES, share_prefixes=False,
        parking_dir=folder,
    )
    async with Engine(path, memory_budget="8MiB", config=config, trace=trace) as engine:
        async with engine.session() as chat:
            await chat.complete(tokens(1, 40), greedy_params(4))
            await engine.complete(tokens(2, 120), greedy_params(1))
            assert engine.statistics().num_parked == 1
            print("here", flush=True)
            time.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""

QUANTIZING = """
import sys, time
from pathlib import Path
from hermes_async.conversion.quantizing import quantize

def stop(done, total):
    if list(Path(sys.argv[2]).glob("*.safetensors")):
        print("here", flush=True)
        time.sleep(600)

quantize(sys.argv[1], Path(sys.argv[2]), "int8", shard_bytes=20_000, on_progress=stop)
"""


def kill(forked: ForkedCommands, code: str, *args: object) -> None:
    """Runs `code` in another process until it prints a line, and kills it then."""
    with forked.start(*args, code=code) as process:
        assert process.stdout.readline() == b"here\n"
    assert process.returncode == -signal.SIGKILL


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


async def test_an_engine_that_is_killed(tiny_model: Any, tmp_path: Path, forked: ForkedCommands) -> None:
    parked, traces = tmp_path / "parked", tmp_path / "traces"
    parked.mkdir()
    traces.mkdir()
    trace = traces / "trace.json"
    kill(forked, ENGINE, tiny_model.path, trace, parked)
    assert list(parked.iterdir()) == []
    (left,) = traces.iterdir()
    assert is_unfinished(left.name, trace.name)
    async with Engine(tiny_model.path, memory_budget="8MiB", trace=trace):
        assert not left.exists()
    assert list(traces.iterdir()) == [trace]
    assert modes(traces) == {0o600}


def test_a_conversion_that_is_killed(tiny_model: Any, tmp_path: Path, forked: ForkedCommands) -> None:
    out, at_once = tmp_path / "out", tmp_path / "at once"
    kill(forked, QUANTIZING, tiny_model.path, out)
    assert modes(out) == {0o600}
    quantize(tiny_model.path, out, "int8", shard_bytes=20_000)
    quantize(tiny_model.path, at_once, "int8", shard_bytes=20_000)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in at_once.iterdir()
    }
    assert modes(out) == {0o600}
