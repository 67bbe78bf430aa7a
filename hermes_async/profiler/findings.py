"""What an engine finds on this machine: a `Finding` each, with a line of advice. Imports no torch where Linux tells."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from hermes_async.config import format_bytes, format_count
from hermes_async.errors import ConfigError
from hermes_async.memory.available import automatic_budget, cgroup_limits, free_bytes, memory_counts
from hermes_async.profiler import system
from hermes_async.profiler.disk_check import DiskCheck, check_disk
from hermes_async.storage.file_kinds import is_dir
from hermes_async.storage.locked_pages import can_lock, has_locked_pages, lock_limit

PACKAGE = "hermes_async"
EXTRAS = {
    "serve": "the OpenAI-compatible server",
    "structured": "answers that follow a JSON schema, a regular expression or a list of choices",
    "vision": "models of images",
    "ray": "replicas on Ray Serve",
    "audio": "files of audio other than WAV",
    "gguf": "models in GGUF files",
    "compiled": "faster products with quantized weights, and of several sequences in bfloat16",
}
"""What each extra is for."""

_LIBRARIES = ("torch", "transformers")
_PROCESS_BYTES = 400 << 20  # what Python, torch and transformers take themselves
_LITTLE_SPACE = 20 << 30
_FEW_FILES = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact, and what to do about it.

    Attributes:
        name: What was looked at, such as "swap".
        found: What it is, for people.
        advice: What that means for an engine, or what to do.
        status: "ok", "advice" if something could be better, or "problem" if no engine works so.
        values: The fact's numbers and names, for programs: bytes, counts, texts.
    """

    name: str
    found: str
    advice: str
    status: Literal["ok", "advice", "problem"] = "ok"
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        texts = {"name": self.name, "status": self.status, "found": self.found, "advice": self.advice}
        return {**texts, **self.values}


def examine(folder: Path, root: Path = Path("/")) -> list[Finding]:
    """Looks at the software, the machine, and the folder that models are read from. Takes seconds; call it on a thread.

    Args:
        folder: Need not exist; then the nearest folder above it is looked at.
        root: Where the system's own files lie: /proc and /sys.
    """
    return [*software(), *machine(root), *disk(folder, root), *limits()]


# --- software ---


def software(requirements: Sequence[str] | None = None) -> Iterator[Finding]:
    """Versions of Python and the libraries, and which extras are installed.

    Args:
        requirements: What the package requires; None asks the installed package.
    """
    if requirements is None:
        try:
            requirements = metadata.requires(PACKAGE) or ()
        except metadata.PackageNotFoundError:
            requirements = ()
    parsed = [Requirement(text) for text in requirements]
    names = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    names["machine"] = platform.machine()
    yield Finding(
        "python", f"Python {names['python']}, {names['system']}, {names['machine']}", "This works.", values=names
    )
    for library in _LIBRARIES:
        tested = next((one for one in parsed if one.name == library and one.marker is None), None)
        yield _version(library, tested)
    for extra, purpose in EXTRAS.items():
        needed = [one for one in parsed if one.marker is not None and _belongs_to(one, extra)]
        yield _extra(extra, purpose, needed)


def _version(library: str, tested: Requirement | None) -> Finding:
    version = _installed(library)
    # The lower bound comes first, as in ">=2.13,<2.15".
    tested_range = None if tested is None else ",".join(sorted(map(str, tested.specifier), reverse=True))
    values = {"version": version, "tested": tested_range}
    if version is None:
        return Finding(library, "not installed", f"Install it: pip install {library}", "problem", values)
    if tested is None:
        return Finding(library, version, "The tested versions are not known.", "advice", values)
    if not tested.specifier.contains(version, prereleases=True):
        advice = f"Tested are {tested_range}. Another version may work, or fail when a model is opened."
        return Finding(library, version, advice, "advice", values)
    return Finding(library, version, f"It is among the tested versions, {tested_range}.", values=values)


def _extra(extra: str, purpose: str, needed: Sequence[Requirement]) -> Finding:
    missing = [
        one.name
        for one in needed
        if (version := _installed(one.name)) is None or not one.specifier.contains(version, prereleases=True)
    ]
    name, values = f"extra {extra}", {"installed": bool(needed) and not missing, "missing": missing}
    if needed and not missing:
        return Finding(name, "installed", f"It is for {purpose}.", values=values)
    advice = f"It is for {purpose}. To install it: pip install '{PACKAGE}[{extra}]'"
    if not needed:
        return Finding(name, "not known", advice, values=values)
    return Finding(name, f"not installed: {', '.join(missing)}", advice, values=values)


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _installed(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


# --- the machine ---


def machine(root: Path = Path("/")) -> Iterator[Finding]:
    """Processor, cores, memory, swap and huge pages."""
    yield _processor(root)
    yield _cores(system.cores(root))
    yield _memory(root)
    yield _cgroup(root)
    counts = memory_counts(root)
    if "SwapTotal" in counts:
        yield _swap(counts["SwapTotal"], counts.get("SwapFree", 0))
    yield _huge_pages(system.huge_pages(root))


def _processor(root: Path) -> Finding:
    features = system.cpu_features(root)
    name = system.cpu_model(root) or platform.machine()
    if features is None:  # such as macOS
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        values: dict[str, Any] = {"model": name, "features": None, "torch_capability": capability}
        advice = "The system does not tell what the processor can do; `hermes-async profile` measures it."
        return Finding("processor", f"{name}; torch uses {capability}", advice, values=values)
    values = {"model": name, "features": list(features), "multiplies_bf16": bool(system.BF16_FEATURES & {*features})}
    found = f"{name}: {', '.join(features) or 'no vector instructions that matter here'}"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in features:
        return Finding("processor", found, "Without AVX2, computing takes several times as long.", "advice", values)
    if not values["multiplies_bf16"]:
        advice = "The processor does not multiply bf16 numbers itself. Where reading is no limit, fp32 may be faster."
        return Finding("processor", found, advice, values=values)
    return Finding("processor", found, "The processor multiplies bf16 numbers itself.", values=values)


def _cores(cores: system.Cores) -> Finding:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = format_count(cores.num_cores, "core")
    if cores.num_allowed < cores.num_cores:
        found += f", of which this process may use {cores.num_allowed}"
    if cores.quota is not None:
        found += f"; the cgroup allows the time of {cores.quota:g}"
    values = {
        "num_cores": cores.num_cores,
        "num_allowed": cores.num_allowed,
        "quota": cores.quota,
        "omp_num_threads": threads or None,
    }
    expected = int(threads) if threads.isdecimal() else cores.num_allowed
    if expected > cores.num_usable:
        advice = f"torch would compute on {format_count(expected, 'thread')}. Set OMP_NUM_THREADS={cores.num_usable}."
        return Finding("cores", found, advice, "advice", values)
    return Finding("cores", found, f"torch computes on at most {format_count(expected, 'thread')}.", values=values)


def _memory(root: Path) -> Finding:
    counts = memory_counts(root)
    available, total = counts.get("MemAvailable", 0), counts.get("MemTotal", 0)
    try:
        budget = automatic_budget(root)
    except ConfigError:
        advice = "The system does not tell. Give a budget such as 3GiB, because auto works only on Linux."
        return Finding("memory", "not known", advice, "advice", {"automatic_budget": None})
    kept_free = free_bytes(root) - budget
    values = {
        "available_bytes": available,
        "total_bytes": total,
        "automatic_budget": budget,
        "kept_free_bytes": kept_free,
    }
    found = f"{format_bytes(available)} of {format_bytes(total)} are available"
    if budget < _PROCESS_BYTES:
        advice = (
            f"This is too little: Python, torch and transformers take about {format_bytes(_PROCESS_BYTES)} themselves, "
            f"and at most {format_bytes(budget)} would be granted."
        )
        return Finding("memory", found, advice, "problem", values)
    advice = (
        f"The budget auto may grow to {format_bytes(budget)}, less what this process takes itself, "
        f"about {format_bytes(_PROCESS_BYTES)}. It leaves {format_bytes(kept_free)} to other programs, and to what "
        "engines take beside their budgets."
    )
    return Finding("memory", found, advice, values=values)


def _cgroup(root: Path) -> Finding:
    groups = cgroup_limits(root)
    if not groups:
        advice = "Nothing but the machine's memory limits this process."
        return Finding("cgroup", "no limit on memory", advice, values={"limit_bytes": None, "free_bytes": None})
    tightest = min(groups, key=lambda group: group.free)
    values = {
        "limit_bytes": tightest.total,
        "free_bytes": tightest.free,
        "version": 1 if tightest.hierarchy else 2,
    }
    found = f"a limit of {format_bytes(tightest.total)}, of which {format_bytes(tightest.free)} are free"
    advice = "A process that takes more is killed. The budget auto stays below the limit."
    return Finding("cgroup", found, advice, values=values)


def _swap(total: int, free: int) -> Finding:
    values = {"total_bytes": total, "free_bytes": free}
    if not total:
        return Finding("swap", "none", "Nothing that an engine holds can be swapped out.", values=values)
    found = f"{format_bytes(total)}, of which {format_bytes(free)} are free"
    advice = "Keep the budget below the available memory: weights that are swapped out are slower than those on disk."
    return Finding("swap", found, advice, values=values)


def _huge_pages(setting: str) -> Finding:
    values = {"setting": setting or None}
    if setting in ("always", "madvise"):
        advice = "Buffers are made of huge pages, so reads need fewer requests to the disk."
        return Finding("huge pages", setting, advice, values=values)
    if setting:
        advice = "To read faster: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("huge pages", setting, advice, "advice", values)
    return Finding("huge pages", "not known", "Buffers are made of small pages.", values=values)


# --- the folder ---


def disk(folder: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """The folder's file system, its free space, whether reads bypass the page cache, and their rate."""
    existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if is_dir(one))
    kind = system.file_system(existing, root)
    found = str(existing) + (f" on {kind.device} ({kind.kind})" if kind.kind else "")
    values = {"folder": str(existing), "file_system": kind.kind or None, "device": kind.device or None}
    if kind.is_in_memory:
        advice = "This folder is in memory. What lies there takes memory in addition to every budget."
        yield Finding("folder", found, advice, "advice", values)
    elif kind.is_remote:
        advice = "The network is the disk here. Put models on a local disk if there is one."
        yield Finding("folder", found, advice, "advice", values)
    else:
        yield Finding("folder", found, "Models that lie here are read as measured below.", values=values)
    yield _free_space(shutil.disk_usage(existing).free)
    try:
        measured = check_disk(existing)
    except ConfigError as error:
        advice = "Choose another folder with --folder, one that may be written to."
        yield Finding("disk", " ".join(str(error).split()), advice, "advice", {"error": str(error)})
        return
    yield from _measured(measured)


def _free_space(num_bytes: int) -> Finding:
    values, found = {"free_bytes": num_bytes}, f"{format_bytes(num_bytes)} are free"
    if num_bytes < _LITTLE_SPACE:
        advice = "Many models need more space than this. HF_HOME moves the downloads to another disk."
        return Finding("free space", found, advice, "advice", values)
    return Finding("free space", found, "A model takes 2 bytes a parameter in bf16, and 4 in fp32.", values=values)


def _measured(measured: DiskCheck) -> Iterator[Finding]:
    supported = {"supported": measured.direct}
    if measured.direct:
        yield Finding("direct I/O", "works", "Reads bypass the page cache.", values=supported)
    else:
        advice = "Reads go through the page cache, and drop what they leave there. This takes more processor time."
        yield Finding("direct I/O", "not supported by this file system", advice, "advice", supported)
    rate = measured.bytes_per_s
    values = {"bytes_per_s": rate, "num_bytes": measured.num_bytes}
    if rate is None:
        yield Finding("disk rate", "not measured", "There is no space for a temporary file.", "advice", values)
        return
    seconds = (1 << 30) / rate
    advice = f"Each GiB of weights that does not stay in memory takes {seconds:.2g} s in each sweep."
    if seconds > 10:
        advice += " Give a budget that keeps most weights in memory, or use another disk."
        yield Finding("disk rate", f"{format_bytes(round(rate))} a second", advice, "advice", values)
    else:
        yield Finding("disk rate", f"{format_bytes(round(rate))} a second", advice, values=values)


# --- limits of this process ---


def limits() -> Iterator[Finding]:
    """Limits on locked memory and on open files."""
    yield _locked_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = {"limit": None if soft == resource.RLIM_INFINITY else soft}
    found = "no limit" if most["limit"] is None else f"at most {soft}"
    if most["limit"] is not None and soft < _FEW_FILES:
        allowed = "" if hard == resource.RLIM_INFINITY or hard >= _FEW_FILES else " (as root)"
        advice = f"This is enough for a program. For a server with many connections: ulimit -n {_FEW_FILES}{allowed}"
        yield Finding("open files", found, advice, values=most)
    else:
        yield Finding("open files", found, "This is enough, also for a server with many connections.", values=most)


def _locked_memory() -> Finding:
    most = lock_limit().most
    can_lock_more = most is not None and can_lock(most + mmap.PAGESIZE)
    found = "no limit" if most is None else f"at most {format_bytes(most)}"
    if can_lock_more:
        found += ", but this process may exceed it (CAP_IPC_LOCK)"
    values = {"limit_bytes": most, "may_exceed_limit": can_lock_more, "supported": has_locked_pages()}
    if not has_locked_pages():
        advice = "An engine locks no memory on this system; only Linux can lock pages as they are used."
        return Finding("locked memory", found, advice, values=values)
    if most is None or can_lock_more:
        advice = "An engine locks its weights and buffers (lock_memory), so that no swap takes them."
        return Finding("locked memory", found, advice, values=values)
    advice = (
        "An engine with more weights and buffers than this locks none, and swap may take them. To change that: "
        "`ulimit -l unlimited`, in a container `--ulimit memlock=-1`."
    )
    return Finding("locked memory", found, advice, values=values)


def is_usable(findings: Sequence[Finding]) -> bool:
    """Whether an engine can work here at all."""
    return all(finding.status != "problem" for finding in findings)
