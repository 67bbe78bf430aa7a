"""The interpreter exits at once, however a program ends that has not left its engine, and as it would without it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STATES = ["idle", "generating", "iterating", "computing", "hanging", "opening hangs"]
CODES = {"return": 0, "stop": 0, "error": 1, "exit": 3, "SIGINT": -signal.SIGINT, "SIGTERM": -signal.SIGTERM}
ERRORS = {"error": "ZeroDivisionError: of the program", "SIGINT": "KeyboardInterrupt"}
NOISE = ["Exception ignored", "Fatal", "terminate called", "Task was destroyed", "hermes_async/"]

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def programs() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and makes one for each program."""
    command = [sys.executable, "-m", "tests.faults.exiting"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture
def run(programs: subprocess.Popen[str], tiny_model: Any, tmp_path: Path) -> Run:
    def run(*case: str) -> tuple[int, str]:
        output, errors = tmp_path / "output", tmp_path / "errors"
        assert programs.stdin is not None and programs.stdout is not None
        programs.stdin.write("\t".join((*case, str(tiny_model.path), str(errors), str(output))) + "\n")
        programs.stdin.flush()
        code = int(programs.stdout.readline())
        assert output.read_text() == "here\n"
        return code, errors.read_text()

    return run


@pytest.mark.parametrize(
    ("loop", "runner", "state", "way"),
    [
        *(("asyncio", "run", state, "error") for state in STATES),
        *(("uvloop", "loop", state, "return") for state in STATES),
        *(("asyncio", "loop", state, "stop") for state in ("idle", "computing", "hanging")),
        *(("uvloop", "run", state, "SIGINT") for state in ("idle", "computing", "hanging")),
        *(("asyncio", "loop", "generating", way) for way in ("exit", "SIGINT", "SIGTERM")),
        ("asyncio", "run", "hanging", "exit"),
        ("asyncio", "run", "leaving", "SIGINT"),
        ("uvloop", "run", "leaving", "error"),
        ("asyncio", "run", "opening was left", "return"),
    ],
)
def test_the_interpreter_exits(run: Run, loop: str, runner: str, state: str, way: str) -> None:
    code, errors = run(loop, runner, state, way)
    assert code == CODES[way], errors
    assert not [line for line in errors.splitlines() if any(noise in line for noise in NOISE)], errors
    assert errors.strip().endswith(ERRORS.get(way, "")), errors
