"""The command line: each command in a module of its own, all of them on the engine's public interface."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated

import transformers
import typer
from huggingface_hub.utils import logging as hub_logging

from hermes_async import __version__
from hermes_async.cli.chat import chat
from hermes_async.cli.demo import demo
from hermes_async.cli.generate import generate
from hermes_async.cli.plan import plan

app = typer.Typer(
    name="hermes-async", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for _command in (generate, chat, plan, demo):
    app.command()(_command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hermes-async {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Transformer models larger than the memory they are given."""


def main() -> None:
    """Runs the command line of this process. Only here are the libraries below made quiet, never for importers."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the program
    app(prog_name="hermes-async")
