"""Stores profiles in small files: for each model, machine and set of versions. Old ones are not used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import stat
import time
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import transformers

from hermes_async.planning.profile import ProductsProfile, Profile
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.own_file import NewFile

T = TypeVar("T", Profile, ProductsProfile)

logger = logging.getLogger(__name__)

MAX_AGE_S = 30 * 24 * 3600
_MAX_BYTES = 2**20  # of a file; they have some kilobytes
_MOST_AGENTS = 64
_LARGEST_NUMBER = 1e18  # of all numbers of a profile
_FORMAT = 5  # of the files; files of other formats are not read


def profile_file(checkpoint: Checkpoint, folder: Path | None = None) -> Path:
    """The file of a model's profile, in `folder` or the user's cache.

    Its name depends on everything that changes measurements: the path and tensors of the checkpoint, the processor and
    its threads, the disk, and the versions of torch, transformers and the format. It does not depend on the budget.
    """
    tensors = sorted((spec.name, spec.nbytes) for spec in checkpoint.tensors.values())
    disk = checkpoint.path.stat().st_dev
    machine = (platform.machine(), _processor(), torch.get_num_threads(), disk)
    versions = (_FORMAT, torch.__version__, transformers.__version__)
    key = json.dumps([str(checkpoint.path.resolve()), tensors, machine, versions])
    return _file(key, folder)


def products_profile_file(folder: Path | None = None, *, compiles: bool = False) -> Path:
    """The file of this machine's `ProductsProfile`. Its name depends on the processor, its threads and torch.

    Args:
        compiles: It has measurements of compiled functions, too. Its name depends on Numba's version then.
    """
    machine = (platform.machine(), _processor(), torch.get_num_threads())
    versions = (_FORMAT, torch.__version__, version("numba") if compiles else None)
    return _file(json.dumps(["bfloat16 products, tiled", machine, versions]), folder)


def _file(key: str, folder: Path | None) -> Path:
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hermes-async" / "profiles"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def load_profile(file: Path) -> Profile | None:
    """The profile in `file`; None if there is no valid one. An old or damaged file is logged."""
    return _load(file, Profile)


def load_products_profile(file: Path) -> ProductsProfile | None:
    """As `load_profile`."""
    return _load(file, ProductsProfile)


def _load(file: Path, kind: type[T]) -> T | None:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would wait for a writer
            raise ValueError("not a regular file")
        if status.st_size > _MAX_BYTES:
            raise ValueError("too large")
        with file.open("rb") as opened:
            profile = _from_json(kind, json.loads(opened.read(status.st_size)))
        assert isinstance(profile, kind)
        if isinstance(profile, Profile):
            _check_measurements(profile)
        age_s = time.time() - profile.created_at
        if 0 <= age_s <= MAX_AGE_S:
            return profile
        problem = f"is {age_s / 86400:.0f} days old and is to be measured again"
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = f"cannot be read and is to be measured again: {error.strerror or error}"
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        problem = f"is damaged and is to be measured again: {type(error).__name__}"
    logger.warning("the profile %s %s", file, problem)
    return None


def _check_measurements(profile: Profile) -> None:
    """Looks for what `_from_json` cannot see.

    Raises:
        ValueError, ArithmeticError, LookupError: The measurements are not those of a profiler.
    """
    if any(rate.num_agents > _MOST_AGENTS for rate in profile.disk):
        raise ValueError("more agents than are ever measured")
    profile.machine_speeds()  # raises if the measurements do not fit together


def save_profile(file: Path, profile: Profile | ProductsProfile) -> None:
    """Writes a profile. A failure is logged, and the next run measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(file) as new:
            new.file.write(json.dumps(asdict(profile)).encode())
    except OSError as error:
        logger.warning("the profile %s cannot be kept: %s", file, error.strerror or error)


def _from_json(kind: Any, value: Any) -> Any:
    """Converts a JSON value to type `kind`, one of the types in profiles.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is of another type, or a number that is no measurement.
    """
    arguments = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{field.name: _from_json(types[field.name], value[field.name]) for field in fields(kind)})
    if get_origin(kind) is tuple:
        return tuple(_from_json(arguments[0], item) for item in value)
    if get_origin(kind) is dict:
        return {int(_number(int(count), 1)): _number(number) for count, number in value.items()}
    if arguments:  # a number or None
        return None if value is None else _number(value)
    if kind is float:
        return _number(value)
    if kind is int:
        return int(_number(value, 1))
    if type(value) is not kind:
        raise TypeError(f"{value!r:.100} is no {kind}")
    return value


def _number(value: Any, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= _LARGEST_NUMBER:
        raise ValueError(f"{value!r:.100} is no measurement")
    return float(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "Hardware", "flags", "Features")
    return "; ".join(dict.fromkeys(line.split(":", 1)[1].strip() for line in lines if line.startswith(keys)))
