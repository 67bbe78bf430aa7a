"""The commands. Each is in a module of its own, which is imported when the command runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hermes_async import __version__
from hermes_async.cli import logs

_SUMMARIES = {
    "generate": "Generate text from a prompt.",
    "chat": "Talk with a model.",
    "embed": "Print the sentence vectors of texts.",
    "classify": "Print the likeliest labels of a text or an image.",
    "transcribe": "Write down what is said in an audio file.",
    "plan": "Show how a budget would be divided, and what it would give.",
    "profile": "Measure a model's stages, the disk and the kernels.",
    "quantize": "Write a copy of a model in fewer bits.",
    "timeline": "Draw a trace of an engine.",
    "serve": "Serve a model over HTTP: OpenAI's API and a page.",
    "demo": "Run a small model in less memory than its weights take.",
    "doctor": "Show what of this machine matters to an engine.",
}
"""Each command with its line in the help. It is the function of the same name, in the module of the same name."""


class _Command(TyperCommand):
    """A command that explains how to pass a text that begins with a dash."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = [name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)]
        texts = [parameter for parameter in self.params if parameter.param_type_name == "argument"]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            known: Any = error
            name = getattr(known, "option_name", None)  # only the error of an unknown option has it
            if name is not None and name not in options and texts:
                example = f"{ctx.command_path} MODEL -- '-x'"
                known.message += f"; put -- before an argument that begins with a dash, as in: {example}"
            raise


@cache
def _command(name: str) -> Any:
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    function = getattr(import_module(f"hermes_async.cli.{name}"), name)
    alone.command(name, cls=_Command, short_help=_SUMMARIES[name])(function)
    return typer.main.get_command(alone)


class _Commands(Mapping[str, Any]):
    """The commands by name. A command's module is imported when the command is looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in _SUMMARIES:
            raise KeyError(name)
        return _command(name)

    def __contains__(self, name: object) -> bool:
        return name in _SUMMARIES

    def __iter__(self) -> Iterator[str]:
        return iter(_SUMMARIES)

    def __len__(self) -> int:
        return len(_SUMMARIES)


class _Group(TyperGroup):
    """All commands. Its help imports none of them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": _Commands()})

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


app = typer.Typer(
    name="hermes-async",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in plain lines
)


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
    logs.use_level(None)
