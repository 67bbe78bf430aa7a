"""Writes a trace to a file while the engine runs."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO

import anyio

from hermes_async.pipeload.trace import Event, Trace
from hermes_async.storage.own_file import open_own_file
from hermes_async.storage.threads import run_in_thread

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_WRITES = 1.0
_HEADER = re.compile(rb'\[\s*\{"ph": "M", "name": "process_name", [^\n]{0,40}"args": \{"name": "hermes_async"\}')


def open_trace_file(path: Path) -> IO[str]:
    """Opens a new trace file, or overwrites an older trace. Blocks.

    Raises:
        ConfigError: The file is not a trace, or it cannot be written.
    """
    file = open_own_file(path, lambda content: _HEADER.match(content) is not None, "trace file")
    return TextIOWrapper(file, encoding="utf-8")


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
        # All mutable state: the open file, the number of events written, and whether writing has failed.
        self._stream: IO[str] | None = None
        self._num_written = 0
        self._failed = False

    def open(self) -> None:
        self._stream = open_trace_file(self._path)

    async def write_for_ever(self) -> None:
        while True:
            await anyio.sleep(_SECONDS_BETWEEN_WRITES)
            with anyio.CancelScope(shield=True):
                await run_in_thread(self._write, self._trace.drain(), left_at_exit=True)

    def _write(self, events: Iterable[Event]) -> None:
        """Writes events. If that fails, as on a full disk, the trace ends and the engine goes on."""
        if self._failed or self._stream is None:
            return
        try:
            for event in events:
                self._stream.write(",\n" if self._num_written else "[\n")
                self._stream.write(json.dumps(event))
                self._num_written += 1
            self._stream.flush()
        except OSError as error:
            self._failed = True
            logger.warning("the trace %s ends here: %s", self._path, error.strerror or error)

    def close(self) -> None:
        if self._stream is None:
            return
        self._write(self._trace.drain())
        with suppress(OSError), self._stream:  # the failure was logged already
            if not self._failed:
                self._stream.write("\n]\n")
