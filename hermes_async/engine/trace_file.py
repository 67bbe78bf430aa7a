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
_BEGINNING = re.compile(rb'\[\s*\{"ph": "M", "name": "process_name", [^\n]{0,40}"args": \{"name": "hermes_async"\}')


def open_trace_file(path: Path) -> IO[str]:
    """Opens a file for a trace: a new one, or one in place of an older trace. Blocks.

    Raises:
        ConfigError: Something else is there, or it cannot be written to.
    """
    file = open_own_file(path, lambda known: _BEGINNING.match(known) is not None, "trace file")
    return TextIOWrapper(file, encoding="utf-8")


@asynccontextmanager
async def tracing(file: str | os.PathLike[str] | Trace | None) -> AsyncGenerator[Trace | None, None]:
    """A trace whose events go to `file`; None where there is none. A trace that is given is drained by who gave it.

    Raises:
        ConfigError: The file is something else than an older trace, or cannot be written to.
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
            tasks.start_soon(writer.write_on)
            try:
                yield trace
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_thread(writer.close, left_at_exit=True)


class _Writer:
    """State: the file, how many events were written, and whether that has failed."""

    def __init__(self, path: Path, trace: Trace) -> None:
        self._path = path
        self._trace = trace
        self._stream: IO[str] | None = None
        self._num_written = 0
        self._failed = False

    def open(self) -> None:
        self._stream = open_trace_file(self._path)

    async def write_on(self) -> None:
        while True:
            await anyio.sleep(_SECONDS_BETWEEN_WRITES)
            with anyio.CancelScope(shield=True):
                await run_in_thread(self._write, self._trace.drain(), left_at_exit=True)

    def _write(self, events: Iterable[Event]) -> None:
        """A trace that cannot be written any more, such as on a full disk, ends there; the engine goes on."""
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
        with suppress(OSError), self._stream:  # what cannot be written was told of
            if not self._failed:
                self._stream.write("\n]\n")
