"""Log lines of an engine: one for each request, without its text. The library prints nothing."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import hermes_async
from hermes_async import DeadlineExceededError, Engine, RequestError, SamplingParams
from hermes_async.serving.request_log import printable_id
from tests.inside import inside

PACKAGE = Path(hermes_async.__file__).parent
GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
FINISHED = (
    r"request {}: {} prompt tokens \({} cached\), {} output tokens, {}; "
    r"queue \d+\.\d{{3}} s, (first token \d+\.\d{{3}} s|no token), total \d+\.\d{{3}} s"
)


def lines(caplog: pytest.LogCaptureFixture, name: str) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == name]


@pytest.mark.anyio
async def test_an_engine_logs_a_line_for_each_request_and_none_of_its_text(
    tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("hermes_async", "hermes_async.requests"):
        caplog.set_level(logging.INFO, logger=name)
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        await engine.complete("w5 w6", GREEDY, request_id="first")
        with pytest.raises(RequestError):
            await engine.complete([{"role": "nobody", "content": "w5"}], GREEDY, request_id="refused")
        params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        async with aclosing(engine.generate("w5", params, request_id="late")) as chunks:
            await anext(chunks)
            await inside(engine).pass_deadline("late")
            with pytest.raises(DeadlineExceededError):
                async for _ in chunks:
                    pass
        async for _ in engine.generate([5], GREEDY, request_id="two\nlines\x1b[31m\u2028"):
            break
        budget = engine.plan.memory_budget
        await engine.resize(budget - 4096)
    requests = lines(caplog, "hermes_async.requests")
    levels, messages = zip(*requests, strict=True)
    assert levels == ("INFO", "WARNING", "WARNING", "INFO")
    assert re.fullmatch(FINISHED.format("first", 2, 0, 3, "length"), messages[0])
    assert messages[1] == "request refused: refused, RequestError"
    assert re.fullmatch(FINISHED.format("late", 1, 0, r"\d+", "DeadlineExceededError"), messages[2])
    assert re.fullmatch(FINISHED.format(r"two\?lines\?\[31m\?", 1, 0, r"\d", "abort"), messages[3])
    engine_lines = lines(caplog, "hermes_async")
    assert [level for level, _ in engine_lines] == ["INFO", "INFO", "INFO"]
    opened, resized, closed = (message for _, message in engine_lines)
    assert re.fullmatch(
        rf"engine opened in \d+\.\d\d s: {tiny_model.path}, .* of weights in 4 stages, 0 of them resident, in a budget "
        r"of 8.00 MiB",
        opened,
    )
    assert resized == "the memory budget is 8.00 MiB now, after 8.00 MiB"
    assert re.fullmatch(r"engine closed after \d+ sweeps, in which it generated \d+ tokens", closed)
    assert not re.search(r"w5|nobody", caplog.text.replace(str(tiny_model.path), ""))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("chat-7 ü", "chat-7 ü"),
        ("a\r\nb\tc\0d", "a??b?c?d"),
        ("\ud800\u202e\u0085", "???"),
        ("x" * 128, "x" * 128),
        ("x" * 10_000, "x" * 128 + "..."),
    ],
)
def test_an_id_is_one_line_of_bounded_length(given: str, shown: str) -> None:
    assert printable_id(given) == shown


def test_the_library_prints_nothing() -> None:
    printing = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("cli", "demo", "__main__.py"):
            continue  # these are programs
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "pprint", "sys.displayhook")
            is_stream = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
            if is_print or is_stream:
                printing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert printing == []


def test_every_logger_is_under_the_package_s() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("logging.getLogger", "getLogger"):
                name = ast.unparse(node.args[0])
                assert name in ("__name__", "LOGGER_NAME") or name.startswith("'hermes_async"), path


def test_without_a_handler_of_the_application_nothing_is_printed() -> None:
    code = "import logging, hermes_async; logging.getLogger('hermes_async.test').warning('a warning')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (ended.stdout, ended.stderr) == (b"", b"")
