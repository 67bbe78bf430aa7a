"""The command line. `main` imports what it needs, so that Ctrl-C or a full disk ends it with one line at any time."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 plus SIGINT's number, as in shells."""


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hermes_async.cli.commands import app

    return app


def main() -> None:
    """Runs the command line of this process. Silences the warnings of libraries, which importers must never do."""
    # Ctrl-C ends the process at once: an exception in an import may be swallowed or reported by a library. While an
    # event loop runs, `cli.run` handles Ctrl-C.
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
    """Ends the process at once: no work is running that needs cleaning up."""
    try:
        os.write(2, b"hermes-async: stopped\n")
    finally:
        os._exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Replaces closed standard streams, so that no other file gets their numbers.

    Reading from a replacement or writing to it fails, so that lost output is an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def _end_output(code: int, message: str = "") -> NoReturn:
    """Prints `message`, if that is possible, and exits. Drops the unwritten part of standard output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if message:
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:
            os.dup2(null, 2)  # only the exit code can tell
    sys.exit(code)
