"""The folder that a converted checkpoint is written to: new, empty, or the same conversion's own unfinished output.

While the output is not finished, the file `STATE_NAME` in it has the conversion's settings, and whoever holds that
file's lock writes. Other files get their names when they are whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hermes_async.config import format_bytes
from hermes_async.errors import ConfigError
from hermes_async.storage.file_kinds import exists, is_dir, is_file
from hermes_async.storage.own_file import NewFile, is_unfinished

STATE_NAME = "hermes-async-unfinished.json"
_MAX_STATE_BYTES = 2**20
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_SPARE_BYTES = 64 * 2**20
_COPIED_AT_ONCE = 2**20
_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"),
    *(".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".npy", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".nemo"),
)
"""Ends of the names of files with weights, and of pickles, which can run code when they are loaded."""


def check_apart(source: Path, out: Path) -> None:
    """Refuses a folder that is the source, or is in it, or has the source in it.

    Raises:
        ConfigError: It is.
    """
    first, second = source.resolve(), out.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise ConfigError(f"the output {out} and the model {source} must not be in each other; give another folder")


@contextmanager
def open_output(out: Path, settings: Mapping[str, Any], names: Collection[str]) -> Iterator[None]:
    """Makes the folder, or continues an output that was interrupted. No other process can open it meanwhile.

    Args:
        settings: All that the output depends on. JSON keeps them as they are.
        names: Paths within the folder of everything that the conversion writes.

    Raises:
        ConfigError: The folder has something else in it, or the same conversion with other settings, or another
            process writes to it, or it cannot be written.
    """
    with writing(out):
        before = _contents(out)
        if before is not None and STATE_NAME not in before and before:
            raise ConfigError(
                f"the output {out} is not empty, and is no unfinished output of this command: it has "
                f"{min(before)!r}; give the name of a new folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        fd = os.open(out / STATE_NAME, _FLAGS, 0o600)
        try:
            _lock(fd, out)
            _check_settings(fd, out, settings)
            _check_names(out, names)
        except BaseException:
            os.close(fd)
            raise
    try:
        yield
        with writing(out):
            (out / STATE_NAME).unlink()
    finally:
        os.close(fd)


def check_space(out: Path, needed_bytes: int) -> None:
    """Raises `ConfigError` if the disk has less than these bytes, and some more, free."""
    folder = next(one for one in (out, *out.resolve().parents) if is_dir(one))
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise ConfigError(
            f"the output {out} needs {format_bytes(needed_bytes)}, and {format_bytes(_SPARE_BYTES)} to spare; "
            f"{folder} has {format_bytes(free)} free"
        )


def other_files(source: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a checkpoint that are no weights, by their paths in it, and those that are left out.

    `config.json` is not among them. Links are followed only within the checkpoint, and, in the hub's cache, to the
    files of the same repository. Hidden files are left out without a word.
    """
    roots = [source.resolve()]
    if source.parent.name == "snapshots":
        roots.append(source.parent.parent.resolve() / "blobs")
    found: dict[str, Path] = {}
    left_out = []
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            relative = path.relative_to(source).as_posix()
            if name.startswith(".") or relative in ("config.json", STATE_NAME):
                continue
            target = path.resolve()
            inside = any(target.is_relative_to(root) for root in roots)
            if name.lower().endswith(_WEIGHTS) or not inside or not is_file(target):
                if not name.lower().endswith((".safetensors", ".safetensors.index.json")):
                    left_out.append(relative)
                continue
            found[relative] = target
    return found, left_out


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes. The copy is whole, or not there.

    Raises:
        ConfigError: It cannot be read or written.
    """
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{source} is no regular file any more")
            with NewFile(target) as copy:
                shutil.copyfileobj(file, copy.file, _COPIED_AT_ONCE)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    with writing(target.parent), NewFile(target) as new:
        new.file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns the operating system's errors within the block into ours."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the output {out} cannot be written: {error.strerror or error}") from error


def _contents(out: Path) -> set[str] | None:
    """The names in a folder; None if it is not there."""
    if out.is_symlink() and not exists(out):
        raise ConfigError(f"the output {out} is a link to nothing; give the name of a new folder")
    if not exists(out):
        return None
    if not is_dir(out):
        raise ConfigError(f"the output {out} is no folder; give the name of a new one")
    return {path.name for path in out.iterdir()}


def _lock(fd: int, out: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process writes to the output {out} now") from None


def _check_settings(fd: int, out: Path, settings: Mapping[str, Any]) -> None:
    written = os.pread(fd, _MAX_STATE_BYTES, 0)
    if not written:
        os.pwrite(fd, json.dumps(settings, indent=2).encode(), 0)
        os.fsync(fd)
        return
    try:
        before = json.loads(written)
    except ValueError:
        before = None
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise ConfigError(f"{out / STATE_NAME} was not written by this version of this command; give a new folder")
    other = [name for name in settings if before[name] != json.loads(json.dumps(settings[name]))]
    if other:
        first = other[0]
        raise ConfigError(
            f"the output {out} is unfinished, with another {first}: {_shown(before[first])}, now "
            f"{_shown(settings[first])}; continue with the same settings, or give a new folder"
        )


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_names(out: Path, names: Collection[str]) -> None:
    """Refuses files that the conversion does not write, so that nothing of a user's is ever replaced."""
    ours = {STATE_NAME, *names}
    for folder, folders, files in os.walk(out):
        for name in (*files, *(one for one in folders if Path(folder, one).is_symlink())):
            relative = Path(folder, name).relative_to(out).as_posix()
            is_ours = relative in ours or any(is_unfinished(name, of) for of in _names_in(relative, names))
            if not is_ours or Path(folder, name).is_symlink():
                raise ConfigError(
                    f"the output {out} has {relative!r}, which this command did not write; give a new folder"
                )


def _names_in(relative: str, names: Collection[str]) -> Iterator[str]:
    """Of the files in the folder in which `relative` is, the names."""
    folder = Path(relative).parent
    return (Path(name).name for name in names if Path(name).parent == folder)
