"""Completion of commands and options, in bash as it is installed, and as other shells ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CODE = (
    "import sys\nfrom hermes_async.cli import main\n"
    "try: main()\nfinally: sys.stderr.write(' '.join({'torch', 'transformers', 'huggingface_hub'} & {*sys.modules}))"
)
"""The command line; writes to standard error if a completion imports what takes seconds."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and `hermes-async` on the path."""
    program = tmp_path / "bin" / "hermes-async"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{CODE}\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT)}


def run(*command: str, env: dict[str, str]) -> tuple[int, list[str], str]:
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


def completed(words: str, env: dict[str, str]) -> list[str]:
    """What bash would offer for the last word."""
    last = len(words.split(" ")) - 1
    script = (
        f"source ~/.bash_completions/hermes-async.sh; COMP_WORDS=({words}); COMP_CWORD={last}; "
        'complete -p hermes-async; _hermes_async_completion hermes-async; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    code, lines, errors = run("bash", "--norc", "-c", script, env=env)
    assert (code, errors) == (0, "")
    return lines[1:]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(environment: dict[str, str], tmp_path: Path) -> None:
    # bash finds out that it is bash; the second command keeps it from becoming the first one.
    code, lines, errors = run("bash", "--norc", "-c", "hermes-async --install-completion && :", env=environment)
    assert (code, errors) == (0, "")
    assert str(tmp_path / ".bash_completions" / "hermes-async.sh") in lines[0]
    assert (tmp_path / ".bashrc").read_text().split() == ["source", f"'{tmp_path}/.bash_completions/hermes-async.sh'"]
    assert completed("hermes-async ge", environment) == ["generate"]
    assert completed("hermes-async generate --max-to", environment) == ["--max-tokens"]
    assert completed("hermes-async nothing --x", environment) == [""]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str, environment: dict[str, str], tmp_path: Path) -> None:
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    code, lines, errors = run("hermes-async", "--show-completion", shell, env=environment)
    assert (code, errors) == (0, "")
    assert f"_HERMES_ASYNC_COMPLETE=complete_{shell}" in "".join(lines)
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]  # nothing is installed


@pytest.mark.parametrize(
    ("variables", "offered"),
    [
        ({"_HERMES_ASYNC_COMPLETE": "complete_zsh"}, '"generate":'),
        ({"_HERMES_ASYNC_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}, "generate\t"),
    ],
)
def test_what_other_shells_are_told(variables: dict[str, str], offered: str, environment: dict[str, str]) -> None:
    code, lines, errors = run("hermes-async", env=environment | variables | {"_TYPER_COMPLETE_ARGS": "hermes-async g"})
    assert (code, errors) == (0, "")
    assert offered in "\n".join(lines)
    assert "demo" not in "\n".join(lines)


def test_an_unknown_instruction_is_one_line(environment: dict[str, str]) -> None:
    code, lines, errors = run("hermes-async", env=environment | {"_HERMES_ASYNC_COMPLETE": "nonsense"})
    assert (code, lines, errors.count("\n")) == (1, [], 1)
