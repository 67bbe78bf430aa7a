"""Temporary folders of benchmarks, and what is undone when SIGTERM ends one: the same as after Ctrl-C."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def undone_after_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM raises `SystemExit`, so that the context managers in it undo what they did.

    On another thread than the main one, which Python does not let set handlers, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def temporary_folder(folder: Path | None = None) -> Iterator[Path]:
    """A new folder in `folder`, by default the system's for temporary files. It is deleted at the end."""
    with undone_after_sigterm():
        path = Path(tempfile.mkdtemp(prefix="hermes-benchmark-", dir=folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
