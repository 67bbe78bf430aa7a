"""`--log-level` of the commands that open an engine."""

from __future__ import annotations

import logging
import re

import pytest

from hermes_async.demo import MODEL_PATH
from tests.cli.test_commands import BUDGET, hermes

COMMANDS = ("generate", "chat", "transcribe", "embed", "classify", "profile", "demo", "serve")


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_level_shows_a_line_for_each_request(monkeypatch: pytest.MonkeyPatch, by_variable: bool) -> None:
    args = [] if by_variable else ["--log-level", "INFO"]
    if by_variable:
        monkeypatch.setenv("HERMES_ASYNC_LOG_LEVEL", "info")
    result = hermes("generate", MODEL_PATH, "ROMEO:", "--memory", BUDGET, "--max-tokens", 2, *args)
    assert result.exit_code == 0
    assert len(re.findall(r"INFO hermes_async\.requests: request \w+: \d+ prompt tokens", result.stderr)) == 1
    assert "INFO hermes_async: engine opened in" in result.stderr
    assert "ROMEO" not in result.stderr


def test_by_default_a_command_prints_its_own_errors_alone() -> None:
    result = hermes("generate", MODEL_PATH, "", "--memory", BUDGET)
    assert result.exit_code == 1
    assert re.fullmatch("hermes-async: error: the prompt is empty, .*\n", result.stderr)


def test_a_warning_is_a_line_as_the_command_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert hermes("plan", "--help").exit_code == 0
    logging.getLogger("hermes_async.test").warning("two %s", "words")
    logging.getLogger("hermes_async.test").info("nothing")
    assert capsys.readouterr().err == "hermes-async: warning: two words\n"


def test_a_level_that_is_none() -> None:
    result = hermes("generate", MODEL_PATH, "a", "--log-level", "loud")
    assert result.exit_code == 2
    assert "--log-level" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_opens_an_engine_has_it(command: str) -> None:
    assert "--log-level" in hermes(command, "--help").stdout
