"""Runs the Layer Profiler before a benchmark, with the disk held as in its measurements, and says what it measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from benchmarks.disk import limited_disk
from benchmarks.folders import temporary_folder
from hermes_async import EngineConfig, format_bytes
from hermes_async.planning.machine_speeds import without_noise
from hermes_async.planning.profile_store import profile_file, save_profile
from hermes_async.profiler.profiler import measure
from hermes_async.storage.checkpoint import Checkpoint

MIB = 2**20

Record = dict[str, Any]


@contextmanager
def profile_store() -> Iterator[None]:
    """An empty store of profiles for this program and those that it starts. It is deleted at the end."""
    before = os.environ.get("XDG_CACHE_HOME")
    with temporary_folder() as folder:
        os.environ["XDG_CACHE_HOME"] = str(folder)  # nothing that was measured before, and nothing is left
        try:
            yield
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def run_profile(path: Path, budget: int, limit: int) -> Record:
    """Measures one session of a model with the disk held at `limit` MiB/s (0: not held), and stores the profile.

    For a process of its own. Its plans then expect what was measured.
    """
    config = EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False)
    started = time.perf_counter()
    with limited_disk(path, limit * MIB or None) as error:
        profile = anyio.run(measure, path, budget, config, backend_options={"use_uvloop": True})
    save_profile(profile_file(Checkpoint.open(path)), profile)
    disk = max(rate.bytes_per_s for rate in without_noise(profile.disk))
    return {
        "seconds": time.perf_counter() - started,
        "limit": limit,
        "limit_error": error if limit else None,
        "disk_bytes_per_s": disk,
        "read_bytes_per_s": disk * profile.read_share,
        "layer_bytes_per_s": 1 / profile.layer_s[1],
        "handover_s": profile.handover_s,
    }


def print_profile(name: str, profile: Record) -> None:
    held = "not held" if not profile["limit"] else profile["limit_error"] or f"held at {profile['limit']} MiB/s"
    disk, read, layer = (format_bytes(round(profile[f"{key}_bytes_per_s"])) for key in ("disk", "read", "layer"))
    handover = "no stage was streamed"
    if profile["handover_s"] is not None:
        handover = f"a streamed stage takes {profile['handover_s'] * 1e3:.1f} ms more"
    print(
        f"{name}, disk {held}, profiled in {profile['seconds']:.0f} s: the disk reads {disk}/s, and an engine "
        f"{read}/s; one token computes {layer}/s of stored weights; {handover}",
        flush=True,
    )
