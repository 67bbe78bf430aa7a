"""Keeps profiles in small files: one for each model, machine and set of versions; old ones are not believed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import stat
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from hermes_async.planning.profile import KernelProfile, Profile, StageProfile
from hermes_async.planning.speeds import DiskSpeed
from hermes_async.storage.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MAX_AGE_S = 30 * 24 * 3600
_FORMAT = 4  # of the files; another one is not read


def profile_file(checkpoint: Checkpoint, folder: Path | None = None) -> Path:
    """Where the profile of a model lies, in `folder` or the user's cache.

    The name stands for all that a measurement depends on: the tensors and where they lie, the processor and its
    threads, the disk, and the versions of torch, transformers and the file's format. Not the budget that it was made
    in: the profile itself tells that, and the planner makes of it what holds in others.
    """
    tensors = sorted((spec.name, spec.nbytes) for spec in checkpoint.tensors.values())
    disk = checkpoint.path.stat().st_dev
    machine = (platform.machine(), _processor(), torch.get_num_threads(), disk)
    versions = (_FORMAT, torch.__version__, transformers.__version__)
    told = json.dumps([str(checkpoint.path.resolve()), tensors, machine, versions])
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hermes-async" / "profiles"
    return folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def load_profile(file: Path) -> Profile | None:
    """The profile in `file`; None, and a warning that says why, where there is none that can be believed."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a named pipe would wait for a writer
            raise ValueError("not a regular file")
        return _from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("the profile %s cannot be read and is to be measured again: %s", file, error.strerror or error)
    except _TooOldError as error:
        logger.warning("the profile %s is %s old and is to be measured again", file, error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the profile %s is damaged and is to be measured again: %s", file, type(error).__name__)
    return None


def save_profile(file: Path, profile: Profile) -> None:
    """Writes a profile; where that cannot be, there is a warning, and it is measured again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A new file of its own name, so that nothing that is there is written over or through.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=file.stem, suffix=".tmp", delete=False
        ) as unfinished:
            try:
                json.dump(asdict(profile), unfinished)
                unfinished.close()
                Path(unfinished.name).replace(file)
            except BaseException:
                Path(unfinished.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        logger.warning("the profile %s cannot be kept: %s", file, error.strerror or error)


class _TooOldError(Exception):
    pass


def _from_json(record: Any) -> Profile:
    age = time.time() - float(record["created_at"])
    if not 0 <= age <= MAX_AGE_S:
        raise _TooOldError(f"{age / 86400:.0f} days")
    return Profile(
        memory_budget=int(record["memory_budget"]),
        asked_for=str(record["asked_for"]),
        dtype=str(record["dtype"]),
        created_at=float(record["created_at"]),
        stages=tuple(
            StageProfile(
                name=str(stage["name"]),
                nbytes=int(stage["nbytes"]),
                resident=bool(stage["resident"]),
                head=bool(stage["head"]),
                load_s=float(stage["load_s"]),
                compute_s=_by_count(stage["compute_s"]),
            )
            for stage in record["stages"]
        ),
        layer_s=_by_count(record["layer_s"]),
        head_s=_by_count(record["head_s"]),
        sweep_s=_by_count(record["sweep_s"]),
        handover_s=None if record["handover_s"] is None else float(record["handover_s"]),
        disk=tuple(
            DiskSpeed(int(disk["num_agents"]), int(disk["read_bytes"]), float(disk["bytes_per_s"]))
            for disk in record["disk"]
        ),
        read_share=float(record["read_share"]),
        kernels=tuple(
            KernelProfile(
                str(kernel["dtype"]),
                str(kernel["kernel"]),
                _by_count(kernel["flops"]),
            )
            for kernel in record["kernels"]
        ),
    )


def _by_count(record: Any) -> dict[int, float]:
    return {int(count): float(value) for count, value in record.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "Hardware", "flags", "Features")
    return "; ".join(dict.fromkeys(line.split(":", 1)[1].strip() for line in lines if line.startswith(told)))
