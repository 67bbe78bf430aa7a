"""Some hundred cases of the fuzzer: damaged files end in an error of ours, within the memory allowed."""

from __future__ import annotations

import json
import subprocess
import sys

NUM_CASES = 150
_SECONDS = "100"  # of computation, so that only a case that never ends fails: nothing here measures time


def test_damaged_checkpoints() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--mutations", str(NUM_CASES), "--seed", "3", "--seconds", _SECONDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failures"] == 0
    assert sum(summary["outcomes"].values()) == NUM_CASES
    assert summary["outcomes"]["opened"] > NUM_CASES // 10  # the checkpoints themselves can be opened
    assert summary["outcomes"]["refused"] > NUM_CASES // 4
