"""The examples run as they are, on the demo model."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import os
import re
import runpy
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
import uvicorn

from hermes_async import Chunk, DeadlineExceededError, MessageDelta, ToolCall
from tests.engines import until
from tests.project import ROOT

EXAMPLES = ROOT / "docs" / "examples"

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what an example writes. What it changes of logging is undone."""
    monkeypatch.chdir(tmp_path)
    before = logging.getLogger("hermes_async").level
    yield
    logging.getLogger("hermes_async").setLevel(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as `python NAME ARGUMENTS` does, and returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def names_of(name: str) -> dict[str, Any]:
    """What an example defines, without running it."""
    return runpy.run_path(str(EXAMPLES / name))


def test_tokens(run: Callable[..., str]) -> None:
    assert len(run("tokens.py")) > 100


def test_prompts_to_jsonl_goes_on_where_it_stopped(run: Callable[..., str], tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("ROMEO:\nJULIET:\n" + "long " * 3000 + "\nNurse:\n")
    assert "0 answers were there, 4 are new" in run("prompts_to_jsonl.py", prompts, answers)
    before = {row["idx"]: row for row in map(json.loads, answers.read_text().splitlines())}
    assert sorted(before) == [0, 1, 2, 3]
    assert "context" in before[2].pop("error")  # the others went on
    assert all(row["text"] for idx, row in before.items() if idx != 2)

    os.truncate(answers, answers.stat().st_size - 9)  # as if it was killed while it wrote the last line
    assert "3 answers were there, 1 are new" in run("prompts_to_jsonl.py", prompts, answers)
    after = {row["idx"]: row for row in map(json.loads, answers.read_text().splitlines())}
    assert sorted(after) == [0, 1, 2, 3]
    redone = [*before][-1]  # alone now, which rounds differently in bf16
    assert all(after[idx].get("text") == row.get("text") for idx, row in before.items() if idx != redone)
    assert after[redone].get("text") or redone == 2


def test_chat_with_forks(run: Callable[..., str]) -> None:
    output = run("chat_forks.py")
    assert output.count("> ") == 5
    assert output.count("prompt tokens were kept]") == 5


def test_embeddings(run: Callable[..., str]) -> None:
    similarities = [float(line.split()[0]) for line in run("embeddings.py").splitlines()[1:]]
    assert len(similarities) == 5
    assert similarities == sorted(similarities, reverse=True)


def test_image_classification(run: Callable[..., str]) -> None:
    output = run("image_classification.py")
    assert "tiny random model" in output
    assert all(label in output for label in ("cat", "dog", "owl"))


def test_deadline_and_fallback(run: Callable[..., str]) -> None:
    output = run("deadline_fallback.py")
    assert "within 60 s (whole)" in output
    assert "within 0 s (prepared)" in output


async def test_what_has_arrived_by_the_deadline_is_used() -> None:
    class Late:
        async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Chunk]:
            yield Chunk("Speak", (1,))
            raise DeadlineExceededError("late")

    assert await names_of("deadline_fallback.py")["answer_by"](Late(), "", 0.0) == ("Speak", "part")


@pytest.mark.skipif(find_spec("llguidance") is None, reason="forced calls need the extra `structured`")
def test_tool_calling(run: Callable[..., str]) -> None:
    output = "".join(run("tool_calling.py").split())
    assert re.match(r'price\({"city":"(Rome|Corioli|Antium)"}\)=\d+.', output)


async def test_a_call_that_the_model_writes_is_run() -> None:
    class Parser:
        def push(self, text: str) -> list[MessageDelta]:
            return [MessageDelta(content=text), MessageDelta(tool_call=ToolCall(0, "price", '{"city": "Rome"}'))]

        def finish(self) -> list[MessageDelta]:
            return [MessageDelta(tool_call=ToolCall(1, "price", '{"city": "Troy"}'))]

    class Calling:
        async def response_stream(self, *_: Any) -> Parser:
            return Parser()

        async def complete(self, *_: Any, **__: Any) -> SimpleNamespace:
            return SimpleNamespace(text="I look.")

    answer, *results = await names_of("tool_calling.py")["use_tools"](Calling(), [])
    assert (answer["content"], [call["id"] for call in answer["tool_calls"]]) == ("I look.", ["call_0", "call_1"])
    assert [result["content"] for result in results] == ["12", "error: KeyError('Troy')"]


def test_openai_client_with_a_server_of_its_own(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = run("openai_client.py")
    assert "--- answer 1 ---" in output
    assert "--- answer 2 ---" in output


def test_logging_and_tracing(run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run("logging_and_tracing.py")
    assert caplog.text.count("finished after") == 2
    assert json.loads((tmp_path / "trace.json").read_text())


def test_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """As in Jupyter: the loop runs, names are shared, a cell may await, and each cell is a task of its own."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    names: dict[str, Any] = {"__name__": "__main__"}

    async def run_cell(source: str) -> None:
        ran = eval(compile(source, "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.iscoroutine(ran):
            await ran

    async def run_all() -> None:
        for source in cells:
            await asyncio.create_task(run_cell(source))

    asyncio.run(run_all())
    assert "because" in capsys.readouterr().out  # of the plan
    assert len(names["completions"]) == 3


async def test_fastapi_frees_the_request_of_a_client_that_goes_away() -> None:
    names = names_of("fastapi_app.py")
    engine = names["engine"]
    server = uvicorn.Server(uvicorn.Config(names["app"], log_level="error", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        async with anyio.create_task_group() as tasks, httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            tasks.start_soon(server.serve, [listener])
            await until(lambda: server.started)
            response = await client.post("/generate", json={"prompt": "ROMEO:", "max_tokens": 8})
            assert (response.status_code, bool(response.text)) == (200, True)
            before = engine.statistics().tokens_generated
            async with client.stream("POST", "/generate", json={"prompt": "ROMEO:", "max_tokens": 512}) as response:
                await anext(response.aiter_text())
                assert engine.statistics().num_running == 1
            await until(lambda: engine.statistics().num_running == 0)
            assert engine.statistics().tokens_generated - before < 512
            refused = await client.post("/generate", json={"prompt": ""})
            assert (refused.status_code, "empty" in refused.json()["error"]) == (400, True)
            server.should_exit = True


def test_every_example_is_tested_and_explained() -> None:
    examples = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    page, tested = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert {name for name in examples if f"({name})" not in page} == set()
    assert {name for name in examples if f"\ndocs/examples/{name}\n" not in page} == {"notebook.ipynb"}
    assert {name for name in examples if f'"{name}"' not in tested} == set()
