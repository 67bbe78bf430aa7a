"""The rate of a folder's disk, by a temporary file of which nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hermes_async.errors import ConfigError
from hermes_async.profiler import disk_check
from hermes_async.profiler.disk_check import READ_BYTES, check_disk


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_check, "READ_S", 0.0)  # each agent reads once
    monkeypatch.setattr(disk_check, "FILE_BYTES", 2 * READ_BYTES)


@pytest.fixture
def descriptors() -> int:
    return num_open_files()


def num_open_files() -> int:
    """0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.parametrize("direct", [True, False])
def test_a_folder_is_measured_and_left_as_it_was(
    direct: bool, tmp_path: Path, descriptors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:

        def refuse(fd: int, direct: bool) -> None:
            raise OSError(errno.EINVAL, "refused")

        monkeypatch.setattr(disk_check, "set_direct", refuse)
    found = check_disk(tmp_path)
    assert found.num_bytes == 2 * READ_BYTES
    assert found.bytes_per_s is not None and found.bytes_per_s > 0
    assert not found.direct or direct
    assert list(tmp_path.iterdir()) == []
    assert num_open_files() == descriptors


def test_writing_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_check, "WRITE_S", 0.0)
    found = check_disk(tmp_path)
    assert (found.num_bytes, found.bytes_per_s) == (0, None)


def test_the_file_takes_a_share_of_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 7 * READ_BYTES

    monkeypatch.setattr(disk_check.shutil, "disk_usage", lambda folder: Usage)
    assert check_disk(tmp_path).num_bytes == READ_BYTES
    Usage.free = READ_BYTES
    assert check_disk(tmp_path).bytes_per_s is None


def test_a_disk_that_is_full_ends_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def short_write(fd: int, data: bytes, offset: int) -> int:
        return write(fd, data, offset) if offset == 0 else 512

    monkeypatch.setattr(disk_check.os, "pwrite", short_write)
    assert check_disk(tmp_path).num_bytes == READ_BYTES


def test_a_folder_that_cannot_be_written_to_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        check_disk(tmp_path / "nothing")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"file cannot be measured: Not a directory"):
        check_disk(file)
