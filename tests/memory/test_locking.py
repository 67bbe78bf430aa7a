"""Whether an engine may lock its memory, and what refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hermes_async import ConfigError
from hermes_async.memory import locking as module
from hermes_async.memory.locking import Locking, locking
from hermes_async.storage.locked_pages import LockLimit


def machine_with(root: Path, free: int) -> Path:
    file = root / "proc/meminfo"
    file.parent.mkdir(parents=True)
    file.write_text(f"MemTotal: 100 kB\nMemAvailable: {free // 1024} kB\n")
    return root


def test_auto_locks_what_is_free_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_locked_pages", lambda: True)
    monkeypatch.setattr(module, "can_lock", lambda num_bytes: True)
    root = machine_with(tmp_path, 8192)
    assert locking("auto", 8192, root) == Locking(is_on=True)
    refused = locking("auto", 8193, root)
    assert not refused.is_on
    assert "8.00 KiB of memory are free" in refused.refusal
    assert locking(True, 8193, root) == Locking(is_on=True)
    assert locking(False, 1, root) == Locking(is_on=False)
    assert "does not tell" in locking("auto", 1, tmp_path / "nothing").refusal


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (LockLimit(65536, 0), "64.0 KiB"),
        (LockLimit(65536, 4096), "4.00 KiB are locked already"),
        (LockLimit(None, 0), "does not lock"),
    ],
)
def test_what_cannot_be_locked_is_refused_with_the_limit(
    limit: LockLimit, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_locked_pages", lambda: True)
    monkeypatch.setattr(module, "can_lock", lambda num_bytes: False)
    monkeypatch.setattr(module, "lock_limit", lambda: limit)
    assert words in locking("auto", 1 << 20).refusal
    with pytest.raises(ConfigError, match="lock_memory=True") as raised:
        locking(True, 1 << 20)
    assert words in str(raised.value)
    assert locking(False, 1 << 20) == Locking(is_on=False)


def test_a_system_that_cannot_lock_pages_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_locked_pages", lambda: False)
    assert "only Linux" in locking("auto", 1).refusal
    with pytest.raises(ConfigError, match="only Linux"):
        locking(True, 1)
