"""The commands. Each is in a module of its own, and uses the engine's public interface."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hermes_async import __version__
from hermes_async.cli import (
    chat,
    classify,
    demo,
    doctor,
    embed,
    generate,
    logs,
    plan,
    profile,
    quantize,
    serve,
    timeline,
    transcribe,
)


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


app = typer.Typer(
    name="hermes-async",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in plain lines
)
for _command in (
    generate.generate,
    chat.chat,
    embed.embed,
    classify.classify,
    transcribe.transcribe,
    plan.plan,
    profile.profile,
    quantize.quantize,
    timeline.timeline,
    serve.serve,
    demo.demo,
    doctor.doctor,
):
    app.command(cls=_Command)(_command)


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
