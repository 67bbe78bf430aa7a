"""Reads lines of standard input in an event loop."""

from __future__ import annotations

import os
import select

import anyio
import anyio.to_thread


class LineReader:
    """Reads a terminal, pipe or file line by line, on a worker thread that ends when the call is cancelled.

    A thread in `input()` could not be woken, and the interpreter would wait for it at exit. This thread waits for the
    input and for a pipe that wakes it. The event loop cannot wait for every kind of input itself: epoll refuses files,
    and libuv makes a terminal non-blocking for all programs.
    """

    def __init__(self, file_descriptor: int) -> None:
        self._fd = file_descriptor
        self._pending = b""
        self._ended = False

    async def read(self) -> str | None:
        """Returns the next line without its line break, or None at the end of the input.

        Cancellation: no input is lost; the next call continues.
        """
        while b"\n" not in self._pending and not self._ended:
            await self._receive()
        line, _, self._pending = self._pending.partition(b"\n")
        if self._ended and not line:
            return None
        return line.decode("utf-8", errors="replace").removesuffix("\r")

    async def _receive(self) -> None:
        wake, waker = os.pipe()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_close_when_cancelled, waker)
                data = await anyio.to_thread.run_sync(self._wait_and_read, wake)
                if data is not None:
                    self._pending += data
                    self._ended = not data
                tasks.cancel_scope.cancel()
        finally:
            os.close(wake)

    def _wait_and_read(self, wake: int) -> bytes | None:
        ready, _, _ = select.select([self._fd, wake], [], [])
        if self._fd not in ready:
            return None
        try:
            return os.read(self._fd, 65536)
        except OSError:  # the terminal is gone
            return b""


async def _close_when_cancelled(file_descriptor: int) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        os.close(file_descriptor)
