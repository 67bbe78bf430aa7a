"""What the machine would still give, read from trees of files as the kernel has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hermes_async.errors import ConfigError
from hermes_async.memory.available import (
    automatic_budget,
    free_bytes,
    headroom,
    process_peak_rss_bytes,
    process_rss_bytes,
    stalled_share,
)

MIB = 2**20


class Machine:
    """A root directory with /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def available(self, num_bytes: int) -> None:
        self.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 5 kB\nMemAvailable: {num_bytes // 1024} kB\n")

    def v2(
        self, group: str, limit: str | int, used: int, inactive_file: int = 0, active_file: int = 0, mapped: int = 0
    ) -> None:
        base = f"sys/fs/cgroup/{group}"
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.current", f"{used}\n")
        self.write(
            f"{base}/memory.stat",
            f"anon 12345\nfile_mapped {mapped}\ninactive_file {inactive_file}\nactive_file {active_file}\n",
        )

    def v1(
        self, group: str, limit: int, used: int, inactive_file: int = 0, active_file: int = 0, mapped: int = 0
    ) -> None:
        base = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{used}\n")
        self.write(
            f"{base}/memory.stat",
            f"cache 1\ninactive_file 5\ntotal_mapped_file {mapped}\n"
            f"total_inactive_file {inactive_file}\ntotal_active_file {active_file}\n",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def less_headroom(num_bytes: int) -> int:
    return num_bytes - max(48 * MIB, int(num_bytes * 0.05))


def test_without_cgroups_it_is_the_memory_available(machine: Machine) -> None:
    machine.available(1000 * MIB)
    assert automatic_budget(machine.root) == less_headroom(1000 * MIB)


def test_v2_limit_less_use(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.v2("service", 500 * MIB, 200 * MIB)
    assert automatic_budget(machine.root) == less_headroom(300 * MIB)


def test_v2_page_cache_can_be_reclaimed(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.v2("service", 500 * MIB, 400 * MIB, inactive_file=300 * MIB)
    assert automatic_budget(machine.root) == less_headroom(400 * MIB)


def test_page_cache_that_was_used_twice_can_be_reclaimed_but_not_what_is_mapped(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.v2("service", 500 * MIB, 400 * MIB, inactive_file=100 * MIB, active_file=200 * MIB, mapped=50 * MIB)
    assert automatic_budget(machine.root) == less_headroom(350 * MIB)
    machine.write("proc/self/cgroup", "9:memory:/service\n")
    machine.v1("service", 500 * MIB, 400 * MIB, inactive_file=100 * MIB, active_file=200 * MIB, mapped=40 * MIB)
    assert automatic_budget(machine.root) == less_headroom(360 * MIB)


@pytest.mark.parametrize("room", [10, 40, 90, 150, 640, 1000, 20_000])
def test_what_an_engine_takes_beside_its_budget_has_room(machine: Machine, room: int) -> None:
    machine.available(room * MIB)
    budget = automatic_budget(machine.root)
    assert budget == max(0, room * MIB - headroom(room * MIB))
    assert headroom(room * MIB) >= 48 * MIB
    assert budget >= 0.95 * room * MIB - 48 * MIB


def test_v2_a_group_above_is_tighter(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/slice/service\n")
    machine.v2("slice/service", "max", 50 * MIB)
    machine.v2("slice", 300 * MIB, 160 * MIB)
    assert automatic_budget(machine.root) == less_headroom(140 * MIB)


def test_v2_no_limit(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/\n")
    machine.v2("", "max", 50 * MIB)
    assert automatic_budget(machine.root) == less_headroom(1000 * MIB)


def test_v2_the_memory_available_is_tighter(machine: Machine) -> None:
    machine.available(100 * MIB)
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.v2("service", 500 * MIB, 0)
    assert automatic_budget(machine.root) == less_headroom(100 * MIB)


V1_GROUPS = "11:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/docker/abc\n"


def test_v1_limit_less_use(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", V1_GROUPS)
    machine.v1("docker/abc", 500 * MIB, 450 * MIB, inactive_file=50 * MIB)
    machine.v1("", 2**63 - 4096, 800 * MIB)
    assert automatic_budget(machine.root) == less_headroom(100 * MIB)


def test_v1_in_a_container_the_group_is_at_the_mount_s_root(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", V1_GROUPS)
    machine.v1("", 300 * MIB, 100 * MIB)
    assert automatic_budget(machine.root) == less_headroom(200 * MIB)


def test_v1_memory_with_other_controllers_in_one_line(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "3:cpu,memory:/x\n")
    machine.v1("x", 300 * MIB, 100 * MIB)
    assert automatic_budget(machine.root) == less_headroom(200 * MIB)


def test_v1_and_v2_together(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "9:memory:/x\n0::/y\n")
    machine.v1("x", 300 * MIB, 100 * MIB)
    machine.v2("y", 150 * MIB, 0)
    assert automatic_budget(machine.root) == less_headroom(150 * MIB)


@pytest.mark.parametrize(
    ("processes", "kept"),
    [
        ({"": [os.getpid()]}, 32),
        ({"": [], "/inner": [os.getpid()]}, 32),
        ({"": [os.getpid(), 1]}, 48),
        ({"": [os.getpid()], "/inner": [], "/inner/most": [7]}, 48),
        ({"": [os.getpid(), 0]}, 48),  # in another namespace
        ({}, 48),
    ],
)
def test_less_is_kept_free_for_a_process_that_is_alone(
    machine: Machine, processes: dict[str, list[int]], kept: int
) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "9:memory:/x\n")
    machine.v1("x", 300 * MIB, 100 * MIB)
    for group, numbers in processes.items():
        machine.write(f"sys/fs/cgroup/memory/x{group}/cgroup.procs", "".join(f"{number}\n" for number in numbers))
    assert automatic_budget(machine.root) == (200 - kept) * MIB


def test_more_used_than_allowed_leaves_nothing(machine: Machine) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.v2("service", 100 * MIB, 200 * MIB)
    assert automatic_budget(machine.root) == 0


@pytest.mark.parametrize("text", ["", "no number\n"])
def test_files_that_say_nothing_are_passed_over(machine: Machine, text: str) -> None:
    machine.available(1000 * MIB)
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.v2("service", 500 * MIB, 200 * MIB)
    machine.write("sys/fs/cgroup/service/memory.max", text)
    assert automatic_budget(machine.root) == less_headroom(1000 * MIB)


def test_a_system_that_tells_nothing(machine: Machine) -> None:
    with pytest.raises(ConfigError, match="auto"):
        automatic_budget(machine.root)


def test_this_machine() -> None:
    assert automatic_budget() >= 0
    assert process_rss_bytes() > 0
    assert process_peak_rss_bytes() > 0


def test_pressure_as_the_kernel_tells_it(tmp_path: Path) -> None:
    assert stalled_share(tmp_path) == 0.0
    (tmp_path / "proc" / "pressure").mkdir(parents=True)
    file = tmp_path / "proc" / "pressure" / "memory"
    file.write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=123\nfull avg10=3.00 avg60=0 avg300=0 total=1\n")
    assert stalled_share(tmp_path) == 0.125
    file.write_text("nonsense")
    assert stalled_share(tmp_path) == 0.0


def test_the_room_of_this_machine() -> None:
    assert free_bytes() > 0
