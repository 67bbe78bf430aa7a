"""Runs measurements in processes of their own, which have imported everything and find an empty page cache."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_CONTEXT = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Names the modules that every process has imported already. Call it before the first process is started."""
    _CONTEXT.set_forkserver_preload(list(modules))


def drop_page_cache() -> None:
    """Empties the page cache.

    Raises:
        SystemExit: Only root may.
    """
    subprocess.run(["sync"], check=True)
    try:
        _DROP_CACHES.write_text("3")
    except OSError as error:
        raise SystemExit(
            f"the page cache cannot be dropped ({error}), and every figure would be wrong; be root"
        ) from error


def forget_files(folders: Sequence[Path]) -> str | None:
    """Empties the page cache; where only root may, lets the kernel forget the pages of the files in these folders.

    Returns None, or why other pages are still there.
    """
    try:
        drop_page_cache()
    except SystemExit as error:
        for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return f"only the pages of the model's files were dropped: {error}"
    return None


def run_alone(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Drops the page cache, and returns what `measure(*args)` returns in a process of its own.

    Raises:
        SystemExit: The cache cannot be dropped (only root may), or the measurement failed.
    """
    drop_page_cache()
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(send, measure, args))
    process.start()
    send.close()
    try:
        record: dict[str, Any] = receive.recv()
    except EOFError:
        raise SystemExit(f"{measure.__name__}{args}: the measurement failed") from None
    finally:
        process.join()
    return record


def run_within(limit_s: float, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Returns what `function(*args)` returns in a process of its own, which is killed after `limit_s`.

    Raises:
        TimeoutError: It took longer.
        EOFError: The process ended without a result.
    """
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(send, function, args))
    process.start()
    send.close()
    try:
        if not receive.poll(limit_s):
            raise TimeoutError
        record: dict[str, Any] = receive.recv()
        return record
    finally:
        process.kill()
        process.join()


def _send(send: Connection, measure: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    # What is imported is shared with the process this one was forked from: a garbage collection would write to, and so
    # copy, every page of it, which took 0.3 s of whatever was measured when it came.
    gc.freeze()
    send.send(measure(*args))
