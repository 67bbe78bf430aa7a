"""What processes tell each other of their engines, with a tree of files as the kernel has them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from hermes_async.memory.other_processes import OtherProcess, ProcessClaims, ProcessRegistry, memory_cgroups

MIB = 1 << 20
CLAIMED = ProcessClaims(budget=500 * MIB, fixed=100 * MIB, num_automatic=1, num_undecided=0, baseline=300 * MIB)


class Processes:
    """A /proc, and what each process calls itself there."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc = root / "proc"
        self.folder = root / "shm"
        self._monkeypatch = monkeypatch

    def start(self, pid: int, *, at: int = 5, rss: int = 0, group: str = "/ours") -> None:
        folder = self.proc / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stat").write_text(f"{pid} (a (name) b) S {' '.join(['0'] * 18)} {at} 1 2\n")
        (folder / "statm").write_text(f"1 {rss // resource.getpagesize()} 1 1 0 1 0\n")
        (folder / "cgroup").write_text(f"4:memory:{group}\n0::/\n")

    def seen_from(self, pid: int, space: int = 1) -> ProcessRegistry:
        self._monkeypatch.setattr(os, "getpid", lambda: pid)
        link = self.proc / "self/ns/pid"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"pid:[{space}]")
        return ProcessRegistry(self.folder, self.proc)


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    found = Processes(tmp_path, monkeypatch)
    found.start(10, rss=450 * MIB)
    found.start(11)
    found.seen_from(10).publish(CLAIMED)
    return found


def test_others_see_what_one_claims_and_holds(processes: Processes) -> None:
    groups = {"memory": "/ours", "": ""}
    assert processes.seen_from(11).others() == [OtherProcess(10, CLAIMED, 150 * MIB, groups)]
    assert processes.seen_from(10).others() == []


@pytest.mark.parametrize(("rss", "held"), [(100, 0), (800, 500), (2000, 500)])
def test_no_more_is_held_than_claimed(processes: Processes, rss: int, held: int) -> None:
    processes.start(10, rss=rss * MIB)
    assert processes.seen_from(11).others()[0].held == held * MIB


def test_a_process_that_has_no_engine_any_more_is_not_seen(processes: Processes) -> None:
    processes.seen_from(10).publish(None)
    assert processes.seen_from(11).others() == []
    assert list(processes.folder.iterdir()) == []


def test_a_process_that_ended_is_not_seen_also_when_another_has_its_number(processes: Processes) -> None:
    processes.start(10, at=6)
    assert processes.seen_from(11).others() == []
    assert list(processes.folder.iterdir()) == []


def test_files_are_private_and_what_a_killed_process_has_not_finished_is_removed(processes: Processes) -> None:
    (processes.folder / ".1-9.abc.unfinished").touch()
    (file,) = (each for each in processes.folder.iterdir() if not each.name.startswith("."))
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(processes.seen_from(11).others()) == 1
    assert list(processes.folder.iterdir()) == [file]


def test_numbers_mean_something_in_one_namespace(processes: Processes) -> None:
    assert processes.seen_from(11, space=2).others() == []
    assert len(processes.seen_from(11).others()) == 1


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "null", '{"started": "5"}', '{"started": "5", "budget": 1, "new": 2}']
)
def test_what_cannot_be_read_is_passed_over(processes: Processes, text: str) -> None:
    next(processes.folder.iterdir()).write_text(text)
    assert processes.seen_from(11).others() == []


def test_a_folder_of_somebody_else_is_not_used(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    seen = processes.seen_from(11)
    assert seen.others() == []
    seen.publish(CLAIMED)
    assert [file.name for file in processes.folder.iterdir()] == ["1-10"]


def test_a_link_is_not_followed(processes: Processes, tmp_path: Path) -> None:
    processes.folder.rename(tmp_path / "elsewhere")
    processes.folder.symlink_to(tmp_path / "elsewhere")
    assert processes.seen_from(11).others() == []


def test_without_a_place_to_write_nobody_is_seen(tmp_path: Path) -> None:
    none = ProcessRegistry(tmp_path / "no" / "folder")
    none.publish(CLAIMED)
    none.publish(None)
    assert none.others() == []


def test_without_a_proc_nobody_is_seen(tmp_path: Path) -> None:
    none = ProcessRegistry(tmp_path / "shm", tmp_path / "proc")
    none.publish(CLAIMED)
    assert none.others() == []


def test_groups_above_are_shared() -> None:
    one = OtherProcess(10, CLAIMED, 0, memory_cgroups("9:cpu,memory:/a/b\n0::/c\n3:cpu:/x\n"))
    assert all(one.is_in("memory", group) for group in ("", "/a", "/a/b"))
    assert not any(one.is_in("memory", group) for group in ("/a/b/c", "/a/bb", "/x"))
    assert one.is_in("", "/c")
    assert not one.is_in("", "/a")
