"""The command line as processes see it: what is imported, and how it ends where output, input or Ctrl-C go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

import hermes_async
from hermes_async.cli.tables import print_table
from hermes_async.demo import MODEL_PATH
from tests.cli.forked import ForkedCommands
from tests.cli.test_commands import hermes

COMMANDS = ("generate", "chat", "transcribe", "embed", "classify", "plan", "profile", "timeline", "demo", "doctor")
HEAVY = "[name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules]"
OF_THE_HELP = {"typer", "click", "shellingham", "annotated_doc", "typing_extensions", "colorama"}
"""What the help needs: typer, and what typer needs itself."""
IN_A_LOOP = {"asyncio", "concurrent", "ssl", "email", "http"}
"""Parts of the standard library that take long to import, and are of no use before an engine opens."""

NOT_FOR_EVERY_MODEL = {
    *("llguidance", "gguf", "matplotlib", "httpx", "fastapi", "uvicorn", "typer", "rich"),
    *(f"transformers.models.auto.{kind}_auto" for kind in ("image_processing", "feature_extraction", "processing")),
}
"""For images, audio, grammars, GGUF files, the hub, servers and commands. They are no part of an engine's baseline."""


def python(code: str, *args: str | bytes, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=False, **kwargs)


def command(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    arguments = [arg if isinstance(arg, bytes) else str(arg) for arg in args]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    return subprocess.run([sys.executable, "-m", "hermes_async", *arguments], check=False, **kwargs)


# --- what is imported ---


def test_an_engine_that_is_not_entered_imports_no_torch() -> None:
    ended = python(
        f"import sys, hermes_async as h\n"
        f"for name in h.__all__: getattr(h, name)\n"
        f"h.Engine('x', config=h.EngineConfig()), h.SamplingParams()\n"
        f"print({HEAVY})"
    )
    assert (ended.stdout, ended.stderr) == (b"[]\n", b"")


@pytest.mark.parametrize("args", [("--help",), ("--version",), *((name, "--help") for name in COMMANDS)])
def test_help_imports_no_torch(args: tuple[str, ...]) -> None:
    ended = python(
        f"import sys\nfrom hermes_async.cli import main\ntry: main()\nfinally: print({HEAVY}, file=sys.stderr)",
        *args,
    )
    assert (ended.returncode, ended.stderr) == (0, b"[]\n")


def imported_by(code: str, *args: str) -> set[str]:
    """Whole names of the modules that `code` imports, without those that an interpreter imports when it starts."""
    ended = python(
        f"import sys\nbefore = {{*sys.modules}}\ntry:\n    {code}\n"
        "finally:\n    print(*{*sys.modules} - before, file=sys.stderr)",
        *args,
    )
    assert ended.returncode == 0
    return set(ended.stderr.decode().split())


def of_others(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"hermes_async"}


def test_the_package_imports_next_to_nothing() -> None:
    modules = imported_by("import hermes_async")
    own = {name for name in modules if name.startswith("hermes_async")}
    assert own == {"hermes_async", "hermes_async.memory", "hermes_async.memory.library_caches"}
    assert not of_others(modules)
    assert not modules & {*IN_A_LOOP, "dataclasses", "inspect"}


@pytest.mark.parametrize("arg", ["--help", "--version"])
def test_the_help_imports_no_command_and_no_library_but_typer(arg: str) -> None:
    modules = imported_by("from hermes_async.cli import main; main()", arg)
    own = {name for name in modules if name.startswith("hermes_async.cli")}
    assert own == {"hermes_async.cli", "hermes_async.cli.commands", "hermes_async.cli.logs"}
    assert of_others(modules) <= OF_THE_HELP
    assert not modules & IN_A_LOOP


def test_a_command_imports_no_other_command() -> None:
    modules = imported_by("from hermes_async.cli import main; main()", "plan", "--help")
    assert {name for name in COMMANDS if f"hermes_async.cli.{name}" in modules} == {"plan"}


def test_numpy_is_imported_when_a_trace_is_drawn() -> None:
    assert "numpy" not in imported_by("from hermes_async.cli import main; main()", "timeline", "--help")


def test_an_engine_imports_nothing_that_only_some_models_need() -> None:
    modules = imported_by("from hermes_async.engine.lifetime import import_torch; import_torch()")
    assert "transformers.modeling_utils" in modules
    assert not modules & NOT_FOR_EVERY_MODEL


def test_every_public_name_is_where_the_package_looks_for_it() -> None:
    namespace: dict[str, Any] = {}
    exec("from hermes_async import *", namespace)
    assert {name for name in namespace if name != "__builtins__"} == set(hermes_async.__all__)
    assert set(hermes_async.__all__) <= set(dir(hermes_async))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = hermes_async.nothing_like_it


# --- output that cannot be written ---


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("plan", MODEL_PATH, "--memory", "6MiB"),
        ("generate", MODEL_PATH, "A", "--memory", "6MiB", "--max-tokens", 2),
        ("embed", MODEL_PATH, "A", "--memory", "16MiB"),
    ],
)
def test_a_full_disk_is_one_line(args: tuple[object, ...], forked: ForkedCommands) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        with forked.start(*args, stdout=full.fileno()) as process:
            errors = process.stderr.read()
            assert (process.wait(), errors.count(b"\n")) == (1, 1)
            assert b"No space left" in errors
        with forked.start(*args, stdout=full.fileno(), stderr=full.fileno()) as process:
            assert process.wait() == 1


@pytest.mark.parametrize("args", [("--help",), ("plan", MODEL_PATH, "--memory", "6MiB")])
def test_a_reader_that_is_gone_from_the_start(args: tuple[object, ...], forked: ForkedCommands) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe, forked.start(*args, stdout=pipe.fileno()) as process:
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_a_closed_output_is_one_line() -> None:
    script = f'exec "{sys.executable}" -m hermes_async --help >&-'
    ended = subprocess.run(["/bin/sh", "-c", script], stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 1)
    assert b"Bad file descriptor" in ended.stderr


# --- Ctrl-C ---


@pytest.mark.parametrize("module", ["typer", "anyio", "torch", "transformers"])
def test_ctrl_c_during_an_import_is_one_line(module: str) -> None:
    """It comes as the module is imported, in the main thread, whatever an import there would make of an exception."""
    ended = python(
        "import importlib.abc, os, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            try: os.kill(os.getpid(), signal.SIGINT)\n"
        "            except BaseException: pass\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from hermes_async.cli import main\n"
        "main()",
        *("generate", str(MODEL_PATH), "A", "--memory", "6MiB"),
    )
    assert (ended.returncode, ended.stderr) == (130, b"hermes-async: stopped\n")


def test_the_event_loop_gives_ctrl_c_back() -> None:
    ended = python(
        "import os, signal\nfrom hermes_async.cli import commands, main\nfrom hermes_async.cli.run import run\n"
        "def end(**_): os.kill(os.getpid(), signal.SIGINT)\n"
        "commands.app = lambda **_: (run(work), end())\n"
        "async def work(interrupts): pass\n"
        "main()"
    )
    assert (ended.returncode, ended.stderr) == (signal.SIGINT + 128, b"hermes-async: stopped\n")


# --- texts ---


@pytest.mark.parametrize(
    "args",
    [
        ("generate", MODEL_PATH, b"\xff\xfe"),
        ("generate", MODEL_PATH, "A", "--stop", b"\xff"),
        ("embed", MODEL_PATH, "A", b"\xff"),
        ("generate", b"/no/such/\xff", "A"),
        ("timeline", b"/no/such/\xff", "-o", "x.png"),
    ],
)
def test_bytes_that_are_not_utf_8_are_told(args: tuple[object, ...]) -> None:
    ended = command(*args)
    assert ended.returncode in (1, 2)
    assert b"Traceback" not in ended.stderr
    assert b"is not UTF-8" in ended.stderr or b"/no/such/" in ended.stderr


def test_a_prompt_is_utf_8_in_every_locale() -> None:
    args = ("generate", MODEL_PATH, "Roméo", "--memory", "6MiB", "--max-tokens", 3)
    bare = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    here, there = hermes(*args, "--json"), command(*args, "--json", env=bare)
    assert here.exit_code == there.returncode == 0
    assert here.stdout.encode().split(b'"timings"')[0] == there.stdout.split(b'"timings"')[0]


def test_a_prompt_that_begins_with_a_dash() -> None:
    options = ("--memory", "6MiB", "--max-tokens", 1)
    assert hermes("generate", MODEL_PATH, *options, "--", "-x").exit_code == 0
    refused = hermes("generate", MODEL_PATH, "-x", *options)
    assert refused.exit_code == 2
    assert "No such option: -x" in refused.stderr
    assert "generate MODEL -- '-x'" in refused.stderr


# --- what is shown ---


def test_one_session_is_one() -> None:
    told = hermes("demo", "--sessions", 1, "--max-tokens", 1, "--memory", "6MiB").stdout
    assert told.startswith("1 session over ")


@pytest.mark.parametrize("width", [10, 40, 80])
def test_no_word_of_a_table_is_broken(width: int) -> None:
    words = ["model.layers.*.self_attn.q_proj", "computing", "resident", "12.5"]
    table = Table("names", *words)
    table.add_row("stages", *reversed(words))
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_table(table, console)
    lines = console.export_text()
    assert all(lines.count(word) == 2 for word in words)
