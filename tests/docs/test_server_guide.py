"""The guide to the server has every route, field, setting and error code, and none that does not exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import hermes_async
from hermes_async.cli import app as commands
from hermes_async.demo import MODEL_PATH
from hermes_async.server import create_app
from tests.project import ROOT

GUIDE = (ROOT / "docs" / "guides" / "server.md").read_text()
SERVER = Path(hermes_async.__file__).parent / "server"


OTHER_BODIES = {
    "/v1/responses": "ResponseRequest",
    "/v1/embeddings": "EmbeddingRequest",
    "/v1/rerank": "RerankRequest",
    "/tokenize": "TokenizeRequest",
    "/detokenize": "DetokenizeRequest",
}
VALUES = {"float", "base64", "false"}  # of fields, in the rows of these


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The OpenAPI schema, which has every route for clients."""
    return create_app(hermes_async.Engine(MODEL_PATH)).openapi()


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_routes(schema: dict[str, Any]) -> None:
    explained = set(re.findall(r"`((?:GET|POST) /[^`]*)`", section("Routes")))
    routes = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    routes = {route for route in routes if not re.search(r" /(page|$)", route)}  # the page's own
    assert explained - {"GET /", "GET /openapi.json"} == routes


def fields_of(schema: dict[str, Any], *bodies: str) -> set[str]:
    return {name for body in bodies for name in schema["components"]["schemas"][body]["properties"]}


def test_fields(schema: dict[str, Any]) -> None:
    generation, others = section("Fields").split("\nOf the other routes:\n")
    named = "".join(re.findall(r"^\| (`.*?) \|", generation, re.MULTILINE))
    explained = {name.partition(".")[0] for name in re.findall(r"`([\w.]+)`", named)}
    assert explained == fields_of(schema, "ChatRequest", "CompletionRequest")
    rows = dict(re.findall(r"^\| `(/\S+)` \| (.*) \|$", others, re.MULTILINE))
    for route, body in OTHER_BODIES.items():
        assert set(re.findall(r"`(\w+)`", rows.pop(route))) - VALUES == fields_of(schema, body), route
    assert rows == {}


def test_settings() -> None:
    serve = typer.main.get_command(commands).commands["serve"]  # type: ignore[attr-defined]
    settings = section("Settings")
    for parameter in serve.params:
        if parameter.envvar is not None:
            assert f"`{parameter.envvar}`" in settings
            names = [*parameter.opts, *parameter.secondary_opts] if parameter.name != "model" else ["MODEL"]
            assert any(re.search(rf"`{name}[ `]", settings) for name in names), names
    known = {parameter.envvar for parameter in serve.params}
    assert set(re.findall(r"HERMES_ASYNC_\w+", GUIDE)) <= known


def codes_in(tree: ast.Module) -> set[str]:
    """Every text that an argument or a variable `code` may have."""
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "code"]
    values += [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and
               ast.unparse(node.targets[0]) == "code"]  # fmt: skip
    branches = [branch for value in values for branch in (
        [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
    )]  # fmt: skip
    return {node.value for node in branches if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_codes_and_statuses_of_errors() -> None:
    errors = section("Errors")
    codes = {code for path in SERVER.glob("*.py") for code in codes_in(ast.parse(path.read_text()))}
    table = "".join(re.findall(r"^\| \d+ \|(.*?)\|", errors, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", table)) <= codes <= set(re.findall(r"`(\w+)`", errors))
    from hermes_async.server.errors import ERRORS

    assert {int(status) for status in re.findall(r"^\| (\d+) \|", errors, re.MULTILINE)} == set(ERRORS)


def test_metrics() -> None:
    from hermes_async.server.metrics import RequestMetrics

    text = RequestMetrics(hermes_async.Engine(MODEL_PATH)).text().decode()
    named = set(re.findall(r"`(hermes_async_\w+)`", section("Metrics")))
    of_requests = set(re.findall(r"^# TYPE (\w+) (?:counter|histogram)", text, re.MULTILINE))
    assert of_requests <= named
