"""`hermes-async doctor`, on this machine and on one where no engine can run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hermes_async.profiler import disk_check, findings
from hermes_async.profiler.findings import Finding
from tests.cli.test_commands import hermes

NAMES = {"python", "torch", "transformers", "extra serve", "processor", "cores", "memory", "cgroup", "huge pages"}
NAMES |= {"folder", "free space", "direct I/O", "disk rate", "locked memory", "open files"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_check, "FILE_BYTES", disk_check.READ_BYTES)
    monkeypatch.setattr(disk_check, "READ_S", 0.0)


@pytest.mark.usefixtures("quick")
def test_each_finding_has_a_line_of_advice(tmp_path: Path) -> None:
    result = hermes("doctor", "--folder", tmp_path)
    assert result.exit_code == 0, result.output
    _, *lines, last = result.stdout.splitlines()
    assert last == "An engine can run here."
    assert len(lines) % 2 == 0
    found = {line[9:].partition(":")[0] for line in lines[::2]}
    assert found >= NAMES
    assert all(line.startswith(" " * 9) and line.endswith((".", "'", "enabled", "4096")) for line in lines[1::2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_the_findings_as_json(tmp_path: Path) -> None:
    record = json.loads(hermes("doctor", "--folder", tmp_path, "--json").stdout)
    assert record["usable"] is True
    found = {finding["name"]: finding for finding in record["findings"]}
    assert set(found) >= NAMES
    assert all(finding["status"] in ("ok", "advice") and finding["advice"] for finding in found.values())
    assert found["disk rate"]["bytes_per_s"] > 0
    assert found["folder"]["folder"] == str(tmp_path)


def test_a_problem_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Finding("torch", "not installed", "Install it.", "problem")
    monkeypatch.setattr(findings, "examine", lambda folder: [problem])
    result = hermes("doctor")
    assert (result.exit_code, "PROBLEM  torch: not installed" in result.stdout) == (1, True)
    record = json.loads(hermes("doctor", "--json").stdout)
    assert record["usable"] is False


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_it_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys\nfrom hermes_async.cli import main\ntry: main()\nfinally: sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "doctor", "--json", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
