"""What a path is, and what the system cannot tell."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from hermes_async.errors import CheckpointError
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.file_kinds import exists, is_dir, is_file
from tests.models import TinyModel


def test_files_folders_and_links(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    kinds = [(exists(path), is_file(path), is_dir(path)) for path in (file, link, tmp_path, tmp_path / "pipe")]
    assert kinds == [(True, True, False), (True, True, False), (True, False, True), (True, False, False)]


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    for name in ("missing", "file/inside", "circle", "dangling", "a\0b", "\udcff\ud800"):
        path = tmp_path / name
        assert (exists(path), is_file(path), is_dir(path)) == (False, False, False), name


def failing(monkeypatch: pytest.MonkeyPatch, failed: Path, code: int) -> None:
    """Has the system fail when it is asked what `failed` is."""
    ask = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if path in (failed, os.fspath(failed)):
            raise OSError(code, os.strerror(code), os.fspath(failed))
        return ask(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("ask", [exists, is_file, is_dir])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_cannot_tell_is_an_error(
    ask: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, tmp_path / "file", code)
    with pytest.raises(OSError, match="file") as caught:
        ask(tmp_path / "file")
    assert caught.value.errno == code


@pytest.mark.parametrize("name", [".", "config.json", "model.safetensors", "modules.json"])
def test_a_checkpoint_that_cannot_be_looked_at_is_not_taken_for_another_one(
    name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = tiny_model.path / name
    failing(monkeypatch, failed, errno.EIO)
    with pytest.raises(CheckpointError, match=r"Input/output error"):
        Checkpoint.open(tiny_model.path)
