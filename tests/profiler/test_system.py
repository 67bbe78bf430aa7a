"""Facts about the machine, read from trees of files as the kernel has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hermes_async.profiler.system import Cores, FileSystem, cpu_features, cpu_model, cpu_quota, file_system, huge_pages

Write = Callable[[str, str], None]

X86 = """processor\t: 0
model name\t: A Processor @ 2.10GHz
flags\t\t: fpu vme sse2 avx avx2 fma f16c avx512f avx512_bf16 amx_tile amx_bf16

processor\t: 1
model name\t: A Processor @ 2.10GHz
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_the_features_of_an_x86_processor(tmp_path: Path, write: Write) -> None:
    write("proc/cpuinfo", X86)
    assert cpu_model(tmp_path) == "A Processor @ 2.10GHz"
    assert cpu_features(tmp_path) == ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def test_the_features_of_an_arm_processor(tmp_path: Path, write: Write) -> None:
    write("proc/cpuinfo", ARM)
    assert cpu_model(tmp_path) == ""
    assert cpu_features(tmp_path) == ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")


def test_a_system_without_such_files_tells_nothing(tmp_path: Path) -> None:
    assert cpu_features(tmp_path) is None
    assert cpu_quota(tmp_path) is None
    assert huge_pages(tmp_path) == ""
    assert file_system(tmp_path, tmp_path) == FileSystem()


def test_the_quota_of_a_cgroup_of_version_2(tmp_path: Path, write: Write) -> None:
    write("proc/self/cgroup", "0::/outer/inner\n")
    write("sys/fs/cgroup/outer/cpu.max", "150000 100000\n")
    write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    write("sys/fs/cgroup/outer/inner/cpu.max", "50000 100000\n")
    assert cpu_quota(tmp_path) == 0.5


def test_the_quota_of_a_cgroup_of_version_1(tmp_path: Path, write: Write) -> None:
    write("proc/self/cgroup", "4:memory:/own\n3:cpu,cpuacct:/own\n1:name=systemd:/\n")
    write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path) is None
    write("sys/fs/cgroup/cpu/own/cpu.cfs_quota_us", "400000\n")
    write("sys/fs/cgroup/cpu/own/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path) == 4.0


@pytest.mark.parametrize(
    ("cores", "usable"),
    [(Cores(8, 8, None), 8), (Cores(8, 4, None), 4), (Cores(8, 8, 2.5), 2), (Cores(8, 8, 0.5), 1), (Cores(2, 2, 9), 2)],
)
def test_usable_cores(cores: Cores, usable: int) -> None:
    assert cores.num_usable == usable


def test_the_setting_of_huge_pages(tmp_path: Path, write: Write) -> None:
    write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    assert huge_pages(tmp_path) == "madvise"


def test_the_innermost_mount_is_a_folders_file_system(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "with space" / "models"
    folder.mkdir(parents=True)
    mount = str(folder.parent).replace(" ", "\\040")
    write(
        "proc/self/mountinfo",
        f"1 0 8:1 / / rw - ext4 /dev/first rw\n2 1 0:1 / {mount} rw shared:1 - xfs /dev/hidden rw\n"
        f"3 1 0:1 / {mount} rw shared:1 - nfs4 server:/share rw\n4 1 0:9 / {mount}-other rw - tmpfs tmpfs rw\n",
    )
    found = file_system(folder, tmp_path)
    assert found == FileSystem("nfs4", "server:/share")
    assert found.is_remote and not found.is_in_memory
    assert file_system(tmp_path, tmp_path) == FileSystem("ext4", "/dev/first")
    assert FileSystem("tmpfs").is_in_memory
