"""`hermes-async quantize`: writes a copy of a model in fewer bits, and says what it loses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hermes_async.cli import options
from hermes_async.cli.progress import new_display
from hermes_async.cli.run import Interrupts, errors_in_one_line, find_checkpoint, run
from hermes_async.config import format_bytes, format_count
from hermes_async.errors import ConfigError
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:
    from hermes_async.conversion.loss import Loss
    from hermes_async.conversion.quantizing import QuantizedCheckpoint

_MAX_TEXT_BYTES = 2**20  # of which the first tokens are used


def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="A new folder, or one that an interrupted run left.", show_default=False)],
    format_name: Annotated[
        Literal["int4", "int8", "fp8"],
        typer.Option("--format", help="What the weights of linear layers become.", show_default=False),
    ],
    group: Annotated[
        Literal["32", "64", "128"] | None,
        typer.Option(
            help="Weights that share a scale, for int4 and int8; by default, the most that divide the model for int4, "
            "and a whole row for int8.",
            show_default=False,
        ),
    ] = None,
    for_this_machine: Annotated[
        bool,
        typer.Option(
            "--for-this-machine",
            help="For int4: in the layout of this processor's kernel. It is several times as fast to compute, and only "
            "this engine reads it, on processors of this kind.",
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The text on which the loss is measured; by default, a short one that comes with the package.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Measure the loss.")] = True,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The budget of each of the two engines that measure the loss; by default, a small one.",
            show_default=False,
        ),
    ] = None,
    log_level: options.LogLevel = None,
    revision: options.Revision = None,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    json_output: options.Json = False,
) -> None:
    """Write a copy of a model in fewer bits, for this engine and others, and say what it loses."""
    with errors_in_one_line():
        from hermes_async.engine.lifetime import import_torch

        import_torch()
        from hermes_async.conversion.targets import check_no_gguf

        check_no_gguf(model)
        content = _read(text) if check and text is not None else None
        path = find_checkpoint(model, HubOptions(revision, token, cache_dir))
        group_size = None if group is None else int(group)
        written = _quantize(path, out, format_name, group_size, for_this_machine=for_this_machine)
        if not json_output:
            _print_written(out, written)
        loss = None
        if check and written.generates:
            loss = _measure(path, out, content, memory)
        if json_output:
            record = {"output": str(out), **asdict(written), "loss": None if loss is None else asdict(loss)}
            print(json.dumps(record), flush=True)
        elif loss is not None:
            _print_loss(loss, text)
        elif check:
            print("The loss was not measured: this is no causal language model.")


def _quantize(
    path: Path, out: Path, format_name: str, group: int | None, *, for_this_machine: bool
) -> QuantizedCheckpoint:
    from hermes_async.conversion.quantizing import quantize as write_quantized

    try:
        with _progress("quantizing", format_bytes) as on_progress:
            return write_quantized(
                path, out, format_name, group, for_this_machine=for_this_machine, on_progress=on_progress
            )
    except KeyboardInterrupt:
        print("hermes-async: the same command goes on from the last whole file", file=sys.stderr)
        raise


def _measure(path: Path, out: Path, content: str | None, memory: str | None) -> Loss:
    from hermes_async.conversion.loss import measure_loss, sample_text

    taken: list[Loss] = []

    async def work(interrupts: Interrupts) -> None:
        with _progress("measuring the loss", lambda count: format_count(count, "token")) as on_progress:
            taken.append(
                await measure_loss(
                    path,
                    out,
                    sample_text() if content is None else content,
                    memory_budget=memory,
                    on_progress=on_progress,
                )
            )

    run(work)
    return taken[0]


@contextmanager
def _progress(what: str, shown: Callable[[int], str]) -> Iterator[Callable[[int, int], None]]:
    """Shows a row while the block runs, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console

    with new_display(Console(stderr=True)) as display:
        task = display.add_task(what, total=None, detail="")

        def update(done: int, total: int) -> None:
            display.update(task, completed=done, total=total, detail=f"{shown(done)} of {shown(total)}")

        yield update


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(_MAX_TEXT_BYTES).decode(errors="ignore")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the text {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _print_written(out: Path, written: QuantizedCheckpoint) -> None:
    before, after = format_bytes(written.source_bytes), format_bytes(written.nbytes)
    print(f"{out}: {written.title}, {written.bits_per_weight:.2f} bits a weight; {after} of weights, before {before}")
    print(
        f"Quantized: the weights of {format_count(written.num_quantized, 'linear layer')}. "
        f"As they were: {format_count(written.num_copied, 'tensor')}, which are embeddings, norms, the output head, "
        "what chooses experts, and the like."
    )
    if written.left_out:
        print(f"Not copied (other weights, or links out of the folder): {', '.join(written.left_out)}")
    sys.stdout.flush()


def _print_loss(loss: Loss, text: Path | None) -> None:
    change = loss.perplexity_after / loss.perplexity_before - 1
    source = "the text that comes with the package" if text is None else str(text)
    print(
        f"On {format_count(loss.num_tokens, 'token')} of {source}, in windows of {loss.window}:\n"
        f"  perplexity      {loss.perplexity_before:.3f} before, {loss.perplexity_after:.3f} after ({change:+.2%})\n"
        f"  error of logits {loss.largest_error:.3f} at most, {loss.mean_error:.4f} on average\n"
        f"  likeliest token {loss.same_token:.1%} the same"
    )
