"""`EngineConfig.lock_memory`: whether an engine may lock its memory, so that no swap takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hermes_async.config import format_bytes
from hermes_async.errors import ConfigError
from hermes_async.memory.available import free_bytes
from hermes_async.storage.locked_pages import can_lock, has_locked_pages, lock_limit

LockMemory = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Locking:
    """Whether memory is locked, and why not.

    Attributes:
        refusal: Why it is not; empty where it is, or where nobody asked for it.
    """

    is_on: bool
    refusal: str = ""


def locking(asked: LockMemory, num_bytes: int, root: Path = Path("/")) -> Locking:
    """Whether so many bytes more are locked. Reads files of the system: call it on a thread.

    "auto" locks only what the machine has free. If a budget is larger than that, an engine that swaps is slow, and one
    that locks is killed.

    Raises:
        ConfigError: `asked` is True, and the system does not lock so much.
    """
    if asked is False:
        return Locking(is_on=False)
    refusal = _refusal(num_bytes)
    if refusal and asked is True:
        raise ConfigError(f"lock_memory=True: {refusal}. lock_memory='auto' goes on without")
    if not refusal and asked == "auto":
        refusal = _lack_of_memory(num_bytes, root)
    return Locking(is_on=not refusal, refusal=refusal)


def _lack_of_memory(num_bytes: int, root: Path) -> str:
    try:
        free = free_bytes(root)
    except ConfigError:
        return "the system does not tell how much memory is free"
    if num_bytes <= free:
        return ""
    return f"{format_bytes(num_bytes)} are to be locked, and {format_bytes(free)} of memory are free"


def _refusal(num_bytes: int) -> str:
    if not has_locked_pages():
        return "only Linux can lock memory page by page, as it is used"
    if can_lock(num_bytes):
        return ""
    limit = lock_limit()
    if limit.most is None:
        return f"the system does not lock {format_bytes(num_bytes)}"
    used = f", of which {format_bytes(limit.locked)} are locked already" if limit.locked else ""
    return (
        f"{format_bytes(num_bytes)} are to be locked, and the limit is {format_bytes(limit.most)}{used} "
        "(RLIMIT_MEMLOCK: `ulimit -l`, in a container `--ulimit memlock=-1`)"
    )
