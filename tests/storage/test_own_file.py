"""Files of ours: of this user alone, whole or not there, and nothing stays of a process that was killed."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hermes_async.storage import own_file
from hermes_async.storage.own_file import NewFile, is_unfinished, scratch_folder


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    """A umask that takes nothing away: what is private is so by itself."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@contextmanager
def killed(code: str, *args: object) -> Iterator[None]:
    """Another process runs `code` until it prints a line; it is killed after the block."""
    command = [sys.executable, "-c", code, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    try:
        yield
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()


WRITING = """
import sys, time
from pathlib import Path
from hermes_async.storage.own_file import NewFile
new = NewFile(Path(sys.argv[1]))
new.file.write(b"half")
new.file.flush()
print("here", flush=True)
time.sleep(600)
"""

IN_A_FOLDER = """
import sys, tempfile, time
from pathlib import Path
from hermes_async.storage.own_file import scratch_folder
tempfile.tempdir = sys.argv[1]
with scratch_folder() as folder:
    (folder / "below").mkdir()
    (folder / "below" / "file").write_bytes(b"half")
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_file_is_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with NewFile(path) as new:
        (unfinished,) = set(tmp_path.iterdir()) - {path}
        assert mode(unfinished) == 0o600
        assert is_unfinished(unfinished.name, "file")
        assert not is_unfinished(unfinished.name, "other")
        new.file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_names_cannot_be_guessed(tmp_path: Path) -> None:
    with NewFile(tmp_path / "file"), NewFile(tmp_path / "file"):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    kept, path = tmp_path / "kept", tmp_path / "file"
    kept.write_bytes(b"kept")
    path.symlink_to(kept)
    with NewFile(path) as new:
        new.file.write(b"new")
    assert (kept.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"kept", b"new", False)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="full"), NewFile(path):
        pass
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"before", [path])


def test_an_error_of_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), NewFile(tmp_path / "file"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "a file [1]*"
    other = tmp_path / ".a file [1]*2.abc.unfinished.txt"
    other.touch()
    with killed(WRITING, path):
        (left,) = set(tmp_path.iterdir()) - {other}
        with NewFile(path):
            assert left.exists()  # its writer lives
    assert left.read_bytes() == b"half"
    with NewFile(path) as new:
        assert not left.exists()
        new.file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert set(tmp_path.iterdir()) == {path, other}


def test_a_folder_is_private_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_file.tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as one, scratch_folder() as two:
        assert one != two
        assert mode(one) == 0o700
        (one / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_killed_process_is_deleted_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_file.tempfile, "tempdir", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    link = tmp_path / "hermes-async-scratch-link"
    link.symlink_to(elsewhere)
    with killed(IN_A_FOLDER, tmp_path):
        (left,) = set(tmp_path.iterdir()) - {elsewhere, link}
        with scratch_folder():
            assert left.exists()
    assert (left / "below" / "file").exists()
    with scratch_folder():
        assert not left.exists()
    assert (elsewhere / "kept").exists()


def test_where_there_are_no_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(own_file.fcntl, "flock", refuse)
    left = tmp_path / ".file.abc.unfinished"
    left.touch()
    with NewFile(tmp_path / "file"):
        pass
    assert set(tmp_path.iterdir()) == {left, tmp_path / "file"}


def test_a_file_that_another_writer_took_for_a_left_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock: Callable[[int, int], None] = own_file.fcntl.flock
    removed: list[Path] = []

    def remove_first(fd: int, operation: int) -> None:
        flock(fd, operation)
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()

    monkeypatch.setattr(own_file.fcntl, "flock", remove_first)
    with NewFile(tmp_path / "file") as new:
        new.file.write(b"whole")
    assert len(removed) == 1
    assert (tmp_path / "file").read_bytes() == b"whole"
