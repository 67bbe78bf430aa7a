"""Writes a trace to a file while the engine runs. The file has its name when the engine was left."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from hermes_async.pipeload.trace import Event, Trace
from hermes_async.storage.own_file import NewFile, check_own_file, own_file_errors
from hermes_async.storage.threads import run_in_thread

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_WRITES = 1.0
_HEADER = re.compile(rb'\[\s*\{"ph": "M", "name": "process_name", [^\n]{0,40}"args": \{"name": "hermes_async"\}')


def open_trace_file(path: Path) -> NewFile:
    """Opens a new trace file, which gets its name when it is finished. An older trace is replaced then. Blocks.

    Raises:
        ConfigError: Another file is there, or the trace cannot be written.
    """
    check_own_file(path, lambda content: _HEADER.match(content) is not None, "trace file")
    with own_file_errors(path, "trace file"):
        return NewFile(path)


@asynccontextmanager
async def tracing(file: str | os.PathLike[str] | Trace | None) -> AsyncGenerator[Trace | None, None]:
    """Yields a trace whose events are written to `file`, or None without a file. A given `Trace` is yielded unchanged.

    Raises:
        ConfigError: As `open_trace_file`.
    """
    if file is None or isinstance(file, Trace):
        yield file
        return
    path = Path(file)
    trace = Trace()
    writer = _Writer(path, trace)
    try:
        await run_in_thread(writer.open, left_at_exit=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(writer.write_for_ever)
            try:
                yield trace
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_thread(writer.close, left_at_exit=True)


class _Writer:
    """Writes a trace's events to a file."""

    def __init__(self, path: Path, trace: Trace) -> None:
        self._path = path
        self._trace = trace
        # All mutable state: the file, until it is finished or writing has failed; and the number of events written.
        self._new: NewFile | None = None
        self._num_written = 0

    def open(self) -> None:
        self._new = open_trace_file(self._path)

    async def write_for_ever(self) -> None:
        while True:
            await anyio.sleep(_SECONDS_BETWEEN_WRITES)
            with anyio.CancelScope(shield=True):
                await run_in_thread(self._write, self._trace.drain(), left_at_exit=True)

    def _write(self, events: Iterable[Event]) -> None:
        """Writes events. If that fails, as on a full disk, there is no trace, and the engine goes on."""
        if self._new is None:
            return
        try:
            for event in events:
                self._new.file.write(b",\n" if self._num_written else b"[\n")
                self._new.file.write(json.dumps(event).encode())
                self._num_written += 1
            self._new.file.flush()
        except OSError as error:
            self._new.discard()
            self._fail(error)

    def close(self) -> None:
        self._write(self._trace.drain())
        if self._new is None:
            return
        try:
            self._new.file.write(b"\n]\n")
            self._new.finish()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._new = None
        logger.warning("the trace %s cannot be written: %s", self._path, error.strerror or error)
