"""Facts about the machine that matter to an engine, read from the system's own files. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# Names in /proc/cpuinfo, in the order in which they are shown. All help with products of matrices.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""With one of these, a processor multiplies bf16 numbers itself."""


@dataclass(frozen=True, slots=True)
class Cores:
    """What a process may compute on.

    Attributes:
        num_cores: The machine's cores.
        num_allowed: Those that this process may run on.
        quota: How many cores' time the cgroups allow, such as 1.5; None where they set no limit.
    """

    num_cores: int
    num_allowed: int
    quota: float | None

    @property
    def num_usable(self) -> int:
        """The number of threads that can run at once."""
        quota = self.num_allowed if self.quota is None else max(1, int(self.quota))
        return min(self.num_allowed, quota)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Where a folder lies.

    Attributes:
        kind: The file system's type, such as "ext4"; "" if the system does not tell.
        device: What is mounted, such as "/dev/sda1".
    """

    kind: str = ""
    device: str = ""

    @property
    def is_in_memory(self) -> bool:
        return self.kind in ("tmpfs", "ramfs")

    @property
    def is_remote(self) -> bool:
        return self.kind.startswith(("nfs", "cifs", "smb", "fuse.sshfs", "9p", "ceph", "glusterfs", "lustre", "afs"))


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name; "" where the system does not tell, as on most ARM machines."""
    match = re.search(r"^model name\s*:\s*(.*\S)", _text(root / "proc/cpuinfo"), flags=re.MULTILINE)
    return match[1] if match else ""


def cpu_features(root: Path = Path("/")) -> tuple[str, ...] | None:
    """The processor's vector instructions, under the kernel's names; None where the system does not tell."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), flags=re.MULTILINE)
    if match is None:
        return None
    flags = set(match[1].split())
    return tuple(name for name in _FEATURES if name in flags)


def cores(root: Path = Path("/")) -> Cores:
    """The cores of the machine, of this process and of its cgroups."""
    num_cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cores
    return Cores(num_cores, allowed, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' time the cgroups of this process allow; None where none sets a limit."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        # A container sees its own group at the root of the mount, under any path that the host has for it.
        for depth in range(len(parts) + 1):
            folder = (root / "sys/fs/cgroup" / ("cpu" if controllers else "")).joinpath(*parts[:depth])
            text = _text(folder / "cpu.max")
            if controllers:
                text = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
            match = re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", text)  # "max" and -1 are no limits
            if match is not None:
                quotas.append(int(match[1]) / int(match[2]))
    return min(quotas, default=None)


def huge_pages(root: Path = Path("/")) -> str:
    """The setting of transparent huge pages: "always", "madvise" or "never"; "" where the system does not tell."""
    match = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return match[1] if match else ""


def file_system(folder: Path, root: Path = Path("/")) -> FileSystem:
    """The file system of an existing folder."""
    place, found, longest = folder.resolve(), FileSystem(), -1
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind_and_device = before.split(), after.split()
        if len(fields) < 5 or len(kind_and_device) < 2:
            continue
        mount = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # Of two mounts at one place, the later one hides the earlier.
        if place.is_relative_to(mount) and len(mount.parts) >= longest:
            longest, found = len(mount.parts), FileSystem(kind_and_device[0], kind_and_device[1])
    return found


def _text(file: Path) -> str:
    """What a file of the system says; "" where there is none."""
    try:
        return file.read_text()
    except OSError:
        return ""
