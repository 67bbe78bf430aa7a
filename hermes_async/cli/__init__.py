"""The command line: each command in a module of its own, all of them on the engine's public interface."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import Annotated

import typer

from hermes_async import __version__
from hermes_async.cli import chat, classify, demo, embed, generate, plan, profile, timeline

app = typer.Typer(
    name="hermes-async",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in plain lines
)
for _command in (
    generate.generate,
    chat.chat,
    embed.embed,
    classify.classify,
    plan.plan,
    profile.profile,
    timeline.timeline,
    demo.demo,
):
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
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the program
    app(prog_name="hermes-async")
