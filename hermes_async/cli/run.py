"""How a command runs: its event loop, Ctrl-C, and its errors."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import anyio
import typer

from hermes_async.cli import INTERRUPTED
from hermes_async.errors import HermesError
from hermes_async.storage.hub import HubOptions


class Interrupts:
    """Handles Ctrl-C: each goes to the innermost open block only. So it ends one answer, or the whole command."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], Awaitable[None]]] = []

    @contextmanager
    def scope(self) -> Iterator[anyio.CancelScope]:
        """Ctrl-C cancels this block and sets `cancel_called`."""
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                scope.cancel()

            with self.calling(cancel):
                yield scope

    @contextmanager
    def calling(self, action: Callable[[], Awaitable[None]]) -> Iterator[None]:
        """Ctrl-C awaits `action` while this block is open."""
        self._actions.append(action)
        try:
            yield
        finally:
            self._actions.remove(action)

    async def watch(self, signals: AsyncIterator[signal.Signals]) -> None:
        async for _ in signals:
            if self._actions:
                await self._actions[-1]()


def run(work: Callable[[Interrupts], Awaitable[None]]) -> None:
    """Runs `work` in an event loop, uvloop's where it is installed.

    Raises:
        HermesError: As `work` raised it, never in a group.
        KeyboardInterrupt: Ctrl-C came while `work` had no open block.
    """
    from hermes_async.engine.lifetime import import_torch

    with _notice("importing torch and transformers"):
        import_torch()  # here, Ctrl-C can end it at once; on the engine's worker thread, it could not
    anyio.run(_interruptible, work, backend_options={"use_uvloop": find_spec("uvloop") is not None})


@contextmanager
def _notice(text: str) -> Iterator[None]:
    """Shows a line within the block, if standard error is a terminal. A spinner's thread would wait for the import."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


async def _interruptible(work: Callable[[Interrupts], Awaitable[None]]) -> None:
    interrupts = Interrupts()
    failure: Exception | SystemExit | None = None
    before = signal.getsignal(signal.SIGINT)
    async with anyio.create_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            tasks.start_soon(interrupts.watch, signals)
            with interrupts.scope() as everything:
                try:
                    await work(interrupts)
                # Raised again below, because the task group would wrap it in a group. rich exits on a broken pipe.
                except (Exception, SystemExit) as error:
                    failure = error
            tasks.cancel_scope.cancel()
        signal.signal(signal.SIGINT, before)  # the event loop puts Python's own in its place
    if failure is not None:
        raise failure
    if everything.cancelled_caught:
        raise KeyboardInterrupt


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the command with one line: with exit code 1 on an error of ours, with 130 on Ctrl-C."""
    try:
        yield
    except HermesError as error:
        print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("hermes-async: stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except UnicodeEncodeError as error:  # such as a file name whose bytes are not UTF-8
        print(f"hermes-async: error: {error.object!a} is not UTF-8", file=sys.stderr)
        raise typer.Exit(1) from None


def print_error(error: HermesError) -> None:
    """Prints an error in one line."""
    print(f"hermes-async: error: {' '.join(str(error).split())}", file=sys.stderr)


def find_checkpoint(model: str, hub: HubOptions) -> Path:
    """Returns the model's directory; downloads a model on the hub.

    The engine would do that too, but on a worker thread, where Ctrl-C cannot stop a download.
    """
    from hermes_async.storage.checkpoint import open_checkpoint

    return open_checkpoint(model, hub).path
