"""The command line. What it needs is imported in `main`, where Ctrl-C and a full disk end it with one line."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and SIGINT's number, as shells have it."""


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hermes_async.cli.commands import app

    return app


def main() -> None:
    """Runs the command line of this process. Only here are the libraries below made quiet, never for importers."""
    # An exception could come out of any import, and some libraries swallow or report it. While an event loop runs,
    # `running` takes Ctrl-C.
    signal.signal(signal.SIGINT, _stop)
    try:
        _open_standard_streams()
        import io
        import logging
        import warnings

        from hermes_async.cli.commands import app

        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        for name in ("transformers", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A terminal that cannot show a character must not end the program.
                stream.reconfigure(errors="replace")
        try:
            app(prog_name="hermes-async")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _end_output(1)
    except OSError as error:
        _end_output(1, f"hermes-async: error: {error.strerror or error}{_place(error)}")
    except KeyboardInterrupt:
        _end_output(INTERRUPTED, "hermes-async: stopped")


def _place(error: OSError) -> str:
    return " (writing the output)" if error.filename is None else f": {error.filename}"


def _stop(*_: object) -> NoReturn:
    """Ends the process at once: nothing is under way that would have to be cleaned up."""
    try:
        os.write(2, b"hermes-async: stopped\n")
    finally:
        os._exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Puts something in place of streams that were closed, so that no file of ours gets their numbers.

    Reading and writing what is put there fails, so that lost output is an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def _end_output(code: int, message: str = "") -> NoReturn:
    """Says why, where that can be said, and exits; what standard output still holds is dropped."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if message:
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:
            os.dup2(null, 2)  # nobody can be told but by the exit code
    sys.exit(code)
