"""Checks the files of a checkpoint that other libraries read whole: those of its tokenizer and its processor."""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatch
from pathlib import Path

from hermes_async.errors import CheckpointError
from hermes_async.storage.headers import check_regular

MAX_BYTES = {".jinja": 2**20, ".json": 64 * 2**20, ".txt": 64 * 2**20, ".model": 64 * 2**20, ".tiktoken": 64 * 2**20}
"""By the ending of the name. The tokenizers of the largest vocabularies take about half of that."""

_READ_BY_OTHERS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.tiktoken", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
_FOLDERS = (".", "additional_chat_templates")


def check_other_files(directory: Path) -> None:
    """Refuses files that reading could take all memory, or never end. Links are followed, as into the hub's cache.

    Raises:
        CheckpointError: A file is too large or empty, or is no regular file.
    """
    for folder in _FOLDERS:
        try:
            entries = sorted(os.scandir(directory / folder), key=lambda entry: entry.name)
        except OSError:
            continue  # there are no such templates
        for entry in entries:
            if folder != "." or any(fnmatch(entry.name, pattern) for pattern in _READ_BY_OTHERS):
                _check(Path(entry.path))


def _check(path: Path) -> None:
    most = MAX_BYTES.get(path.suffix)
    try:
        status = path.stat()
    except OSError:
        return  # a link to nothing counts as missing
    if most is None or stat.S_ISDIR(status.st_mode):
        return  # nobody reads it
    check_regular(path, status)
    if status.st_size == 0:  # also what is no file on a disk, as in /proc, whose reading may never end
        raise CheckpointError(f"{path} is empty; remove it, or copy the checkpoint again", path=path)
    if status.st_size > most:
        raise CheckpointError(f"{path}: {status.st_size} bytes, more than the {most} that are read", path=path)
