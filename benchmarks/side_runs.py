"""Runs the program of one side in a process of its own, with limits on its memory and on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from benchmarks.disk import limited_disk
from benchmarks.environments import ROOT
from benchmarks.memory_group import LoneProcess, MemoryGroup, let_go_on, line_of, memory_group

MIB = 2**20
_SECONDS_TO_END = 60

Record = dict[str, Any]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids that each side gets."""
    return [1 + (seed * 131 + place * 17) % 1000 for place in range(num_tokens)]


def run_program(
    module: str,
    asked: Record,
    python: Path = Path(sys.executable),
    *,
    memory_bytes: int | None,
    disk_limit: int,
    grouped: bool = True,
    timeout_s: float | None = None,
) -> Record:
    """Runs a program that speaks `benchmarks.decode_protocol`, and returns what it told, and what it took.

    Args:
        module: The program, as `python -m` takes it.
        asked: Its argument. `path` is what it reads, and `threads` is how many compute.
        memory_bytes: What it may take above the memory that it has when it has imported everything; None: no limit.
        disk_limit: MiB/s that its reads are held at; 0: not held.
        grouped: Whether it runs in a memory cgroup of its own. Without one, nothing limits its memory.
        timeout_s: It is ended after so many seconds.

    Returns what it told about opening, its `points` so far, and `error`: None, or why there are no more. The process's
    memory: `baseline_bytes`, `peak_used_bytes` without page cache that can be reclaimed, and `peak_bytes` with it.

    Raises:
        MemoryGroupError: No memory cgroup can be made.
    """
    record: Record = {"points": [], "error": None}
    with _memory(grouped) as memory, tempfile.TemporaryFile("w+") as errors:
        process = _started(memory, module, asked, python, errors)
        late = threading.Event()
        timer = _timer(process, timeout_s, late)
        finished, limit_error = False, None
        try:
            if line_of(process.stdout) == "ready":
                record["baseline_bytes"] = memory.used_bytes
                if isinstance(memory, MemoryGroup):
                    if memory_bytes is not None:
                        memory.limit(record["baseline_bytes"] + memory_bytes)
                    memory.forget_peak()  # the page cache of what was imported
                with (
                    limited_disk(Path(asked["path"]), disk_limit * MIB or None, process.pid) as limit_error,
                    memory.sampled(),
                ):
                    finished = _converse(process, record)
            if finished:
                let_go_on(process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        record |= {
            "peak_used_bytes": memory.peak_used_bytes,
            "peak_bytes": memory.peak_bytes,
            "limit_error": limit_error if disk_limit else None,
            "out_of_memory": not finished and memory.num_killed > 0,
        }
        if not finished:
            took = f"it took more than {timeout_s:.0f} s" if late.is_set() else None
            killed = "the kernel ended it: it took more memory than its limit" if record["out_of_memory"] else None
            record["error"] = took or killed or _last_words(errors, process.returncode)
    return record


@contextmanager
def _memory(grouped: bool) -> Iterator[MemoryGroup | LoneProcess]:
    if not grouped:
        yield LoneProcess()
        return
    with memory_group(None) as group:
        yield group


def _started(
    memory: MemoryGroup | LoneProcess, module: str, asked: Record, python: Path, errors: TextIO
) -> subprocess.Popen[str]:
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(asked["threads"]),
        "HF_HUB_OFFLINE": "1",  # everything is there
    }
    return memory.start(["-s", "-P", "-m", module, json.dumps(asked)], python, variables, errors)


def _timer(process: subprocess.Popen[str], timeout_s: float | None, late: threading.Event) -> threading.Timer:
    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s or threading.TIMEOUT_MAX, end)
    timer.daemon = True
    timer.start()
    return timer


def _converse(process: subprocess.Popen[str], record: Record) -> bool:
    """Lets the program begin, and adds what it tells to the record; returns whether it told everything."""
    let_go_on(process)
    while told := line_of(process.stdout):
        one = json.loads(told)
        if not one:
            return True
        if "prompt_tokens" in one:
            record["points"].append(one)
        else:
            record |= one
    return False


def _last_words(errors: TextIO, code: int) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")


def default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
