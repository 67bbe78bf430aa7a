"""What `doctor` finds on machines that a test describes, and the advice for each."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hermes_async.errors import ConfigError
from hermes_async.profiler import findings
from hermes_async.profiler.disk_check import DiskCheck
from hermes_async.profiler.findings import EXTRAS, Finding, disk, is_usable, limits, machine, software
from tests.project import PYPROJECT

MIB, GIB = 2**20, 2**30
GOOD_CPU = "model name\t: One\nflags\t: avx2 avx512f amx_bf16\n"


@pytest.fixture
def machine_of(tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Findings by name, on a machine with these files and this memory in MiB."""

    def found(available: int = 8000, swap: int = 0, **files: str) -> dict[str, Finding]:
        meminfo = f"MemTotal: {9000 * 1024} kB\nMemAvailable: {available * 1024} kB\nHugePages_Total: 0\n"
        paths = {
            "proc/meminfo": f"{meminfo}SwapTotal: {swap * 1024} kB\nSwapFree: {swap * 1024} kB\n",
            "proc/cpuinfo": files.get("cpuinfo", GOOD_CPU),
            "proc/self/cgroup": files.get("cgroup", "0::/\n"),
            "sys/fs/cgroup/memory.max": files.get("memory_max", "max"),
            "sys/fs/cgroup/memory.current": str(100 * MIB),
            "sys/fs/cgroup/memory.stat": "",
            "sys/fs/cgroup/cpu.max": files.get("cpu_max", "max 100000"),
            "sys/kernel/mm/transparent_hugepage/enabled": files.get("huge_pages", "always [madvise] never"),
        }
        for path, text in paths.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return by_name(machine(tmp_path))

    return found


def by_name(found: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_a_good_machine_needs_nothing(
    machine_of: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = machine_of()
    assert {name: finding.status for name, finding in found.items() if finding.status != "ok"} == {}
    assert found["processor"].values["multiplies_bf16"] is True
    assert found["memory"].values["automatic_budget"] == int(8000 * MIB * 0.95)
    assert found["cgroup"].values["limit_bytes"] is None
    assert found["swap"].found == "none"
    assert is_usable(list(found.values()))


def test_an_old_processor(machine_of: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.platform, "machine", lambda: "x86_64")
    found = machine_of(cpuinfo="model name\t: Old\nflags\t: sse2 avx\n")["processor"]
    assert (found.status, found.values["features"]) == ("advice", [])
    assert "Without AVX2" in found.advice
    monkeypatch.setattr(findings.platform, "machine", lambda: "aarch64")
    found = machine_of(cpuinfo="Features\t: fp asimd\n")["processor"]
    assert (found.status, found.values["features"]) == ("ok", ["asimd"])
    assert "does not multiply bf16" in found.advice


def test_a_quota_below_the_number_of_threads(
    machine_of: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    found = machine_of(cpu_max="150000 100000")["cores"]
    assert (found.status, found.values["quota"]) == ("advice", 1.5)
    assert "16 threads" in found.advice and "OMP_NUM_THREADS=1" in found.advice
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine_of(cpu_max="150000 100000")["cores"].status == "ok"


def test_the_limit_of_a_container(machine_of: Callable[..., dict[str, Finding]]) -> None:
    found = machine_of(memory_max=str(2 * GIB))
    assert found["cgroup"].values == {"limit_bytes": 2 * GIB, "free_bytes": 2 * GIB - 100 * MIB, "version": 2}
    assert is_usable(list(found.values()))


@pytest.mark.parametrize("arguments", [{"available": 300}, {"memory_max": str(400 * MIB)}])
def test_too_little_memory_is_a_problem(
    machine_of: Callable[..., dict[str, Finding]], arguments: dict[str, Any]
) -> None:
    found = machine_of(**arguments)
    assert found["memory"].status == "problem"
    assert "too little" in found["memory"].advice
    assert not is_usable(list(found.values()))


def test_swap_and_huge_pages(machine_of: Callable[..., dict[str, Finding]]) -> None:
    found = machine_of(swap=512, huge_pages="always madvise [never]")
    assert found["swap"].values == {"total_bytes": 512 * MIB, "free_bytes": 512 * MIB}
    assert found["huge pages"].status == "advice"
    assert "echo madvise" in found["huge pages"].advice


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    found = by_name(machine(tmp_path))
    assert found["memory"].status == "advice"
    assert "Give a budget" in found["memory"].advice
    assert found["processor"].values["torch_capability"]
    assert found["huge pages"].found == "not known"
    assert "swap" not in found


# --- software ---


def test_versions_within_and_outside_the_tested_range() -> None:
    found = by_name(software(["torch>=2.0,<99", "transformers<5"]))
    assert found["python"].status == found["torch"].status == "ok"
    assert ">=2.0,<99" in found["torch"].advice
    assert (found["transformers"].status, found["transformers"].values["tested"]) == ("advice", "<5")
    assert by_name(software([]))["torch"].status == "advice"


def test_a_missing_library_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = findings.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise findings.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(findings.metadata, "version", version)
    found = list(software(["torch>=2"]))
    assert by_name(found)["torch"].advice == "Install it: pip install torch"
    assert not is_usable(found)


def test_extras_that_are_installed_missing_or_too_old() -> None:
    required = [
        "pytest>=1; extra == 'serve'",
        "no-such-library>=1; extra == 'structured'",
        "pytest>=1; extra == 'structured'",
        "pytest>=999; extra == 'vision'",
    ]
    found = by_name(software(required))
    assert found["extra serve"].values == {"installed": True, "missing": []}
    assert found["extra structured"].values == {"installed": False, "missing": ["no-such-library"]}
    assert "pip install 'hermes_async[structured]'" in found["extra structured"].advice
    assert found["extra vision"].values["missing"] == ["pytest"]
    assert found["extra ray"].found == "not known"


def test_every_extra_for_users_is_declared() -> None:
    assert set(EXTRAS) == set(PYPROJECT["project"]["optional-dependencies"]) - {
        *("all", "bench", "dev", "docs", "test", "real-weights")
    }


# --- the folder and the limits ---


@pytest.mark.parametrize(
    ("measured", "statuses", "word"),
    [
        (DiskCheck(True, 2e9, 1 << 28), {"direct I/O": "ok", "disk rate": "ok"}, "0.54 s"),
        (DiskCheck(False, 20e6, 1 << 26), {"direct I/O": "advice", "disk rate": "advice"}, "keeps most weights"),
        (DiskCheck(True, None, 0), {"direct I/O": "ok", "disk rate": "advice"}, "no space"),
    ],
)
def test_a_disk(
    measured: DiskCheck, statuses: dict[str, str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def check(folder: Path) -> DiskCheck:
        asked.append(folder)
        return measured

    monkeypatch.setattr(findings, "check_disk", check)
    found = by_name(disk(tmp_path / "not" / "there"))
    assert asked == [tmp_path]
    assert {name: found[name].status for name in statuses} == statuses
    assert word in found["disk rate"].advice
    assert found["folder"].values["folder"] == str(tmp_path)


def test_little_space_and_folders_that_are_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = GIB

    def refuse(folder: Path) -> DiskCheck:
        raise ConfigError(f"{folder} cannot be measured: Permission denied")

    monkeypatch.setattr(findings, "check_disk", refuse)
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda folder: Usage)
    mounts = tmp_path / "proc/self/mountinfo"
    mounts.parent.mkdir(parents=True)
    mounts.write_text("1 0 8:1 / / rw - tmpfs tmpfs rw\n")
    found = by_name(disk(tmp_path, tmp_path))
    assert found["free space"].status == "advice"
    assert "in memory" in found["folder"].advice
    assert found["disk"].status == "advice"
    assert "Permission denied" in found["disk"].found
    mounts.write_text("1 0 8:1 / / rw - nfs server:/share rw\n")
    assert "network" in by_name(disk(tmp_path, tmp_path))["folder"].advice


@pytest.mark.parametrize(
    ("limit", "locked", "files"),
    [
        (1024, "at most 1.00 KiB", "ulimit -n"),
        (1 << 20, "1.00 MiB", "enough"),
        (resource.RLIM_INFINITY, "no", "enough"),
    ],
)
def test_limits_of_the_process(limit: int, locked: str, files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.resource, "getrlimit", lambda which: (limit, limit))
    found = by_name(limits())
    assert locked in found["locked memory"].found
    assert files in found["open files"].advice
