"""What a stranger may not do: walked over all routes, and over all fields of the served OpenAPI schema."""

from __future__ import annotations

import base64
import hmac
import itertools
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from hermes_async.demo import MODEL_PATH
from hermes_async.server import ServerSettings
from hermes_async.server.guard import OPEN_PATHS
from tests.server.running import KEY, MODEL, RunningServer, running_server

MAX_BODY = 256 * 1024
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Speak."}], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    """A server with a key, and with a small limit for bodies."""
    settings = ServerSettings(served_model_name=MODEL, api_key=KEY, max_body_bytes=MAX_BODY)
    with running_server(settings) as running:
        yield running
        running.check_nothing_is_left()


@pytest.fixture(scope="module")
def client(locked: RunningServer) -> Iterator[httpx.Client]:
    """A client with the key."""
    with httpx.Client(base_url=locked.url, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(scope="module")
def openapi(client: httpx.Client) -> dict[str, Any]:
    schema: dict[str, Any] = client.get("/openapi.json").raise_for_status().json()
    return schema


# --- the key ---


def all_routes(server: RunningServer) -> list[tuple[str, str]]:
    """Method and path of every route, documented or not."""
    found = {
        (method, route.path.replace("{model:path}", MODEL).replace("{name}", "page.js"))
        for route in iter_route_contexts(server.app.routes)
        for method in getattr(route, "methods", None) or ()
    }
    assert ("POST", "/v1/chat/completions") in found and ("GET", "/openapi.json") in found and ("GET", "/") in found
    return sorted(found)


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


def test_every_route_but_health_needs_the_key(locked: RunningServer) -> None:
    wrong = [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Digest {KEY}", KEY]
    wrong += [basic(""), basic("wrong"), "Basic ???", f"Basic {KEY}", "Basic", "Bearer \xff"]
    with httpx.Client(base_url=locked.url) as client:
        for method, path in all_routes(locked):
            for value in wrong:
                headers = {} if value is None else {"authorization": value.encode("latin-1")}
                answer = client.request(method, path, headers=headers)
                if path in OPEN_PATHS:
                    assert answer.status_code == 200, (method, path)
                    continue
                assert answer.status_code == 401, (method, path, value)
                assert {"bearer", "basic"} <= set(answer.headers["www-authenticate"].lower().replace(",", "").split())
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert {"/health"} == OPEN_PATHS


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", basic(KEY)])
def test_every_route_takes_the_key(locked: RunningServer, value: str) -> None:
    with httpx.Client(base_url=locked.url, headers={"authorization": value}) as client:
        for method, path in all_routes(locked):
            with client.stream(method, path) as answer:  # the page's events never end
                assert answer.status_code != 401, (method, path)


@pytest.mark.parametrize(
    "path",
    ["/health/", "//health", "/health/../v1/models", "/x/../health", "/HEALTH", "/health%2f", "/%68ealth", "/health;"],
)
def test_no_spelling_of_the_open_path_opens_another(locked: RunningServer, path: str) -> None:
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:  # a client may tidy the path
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        status = connection.makefile("rb").readline()
    assert b" 401 " in status or (b" 200 " in status and path == "/%68ealth")


def test_the_key_is_compared_in_constant_time(locked: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    compare = hmac.compare_digest

    def compare_and_tell(given: Any, expected: Any) -> bool:
        compared.append((given, expected))
        return compare(given, expected)

    monkeypatch.setattr(hmac, "compare_digest", compare_and_tell)
    assert httpx.get(f"{locked.url}/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert httpx.get(f"{locked.url}/v1/models", headers={"authorization": basic(KEY)}).status_code == 200
    assert compared == [(b"wrong", KEY.encode()), (KEY.encode(), KEY.encode())]


def test_no_key_and_no_text_is_logged(
    locked: RunningServer, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a text that is nobody's business"
    messages = [{"role": "user", "content": secret}]
    client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).raise_for_status()
    client.post("/v1/chat/completions", json={**CHAT, "messages": messages, "unknown": secret})
    client.post("/v1/chat/completions", json={**CHAT, "messages": messages, "stop": ""})
    httpx.get(f"{locked.url}/v1/models", headers={"authorization": basic(KEY + "x")})
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    for record in ours:
        logged = f"{record.getMessage()} {record.exc_text}"
        assert secret not in logged and KEY not in logged and basic(KEY + "x") not in logged
    assert KEY not in repr(locked.app.state.model_server.settings)


def test_only_known_hosts_are_answered() -> None:
    settings = ServerSettings(allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    with running_server(settings) as running, httpx.Client(base_url=running.url) as client:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8000"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example", "evil.example:8000", "[::2]", "", "localhost:x"):
            for path in ("/v1/models", "/", "/health"):
                answer = client.get(path, headers={"host": host})
                assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host"), host


def test_every_answer_has_headers_for_browsers(locked: RunningServer, client: httpx.Client) -> None:
    answers = [client.request(method, path) for method, path in all_routes(locked) if path != "/page/events"]
    answers += [client.get("/nothing/here"), client.put("/v1/models"), httpx.get(f"{locked.url}/")]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert not {"server", "access-control-allow-origin", "set-cookie"} & set(answer.headers) - {"server"}


# --- fields ---


def bodies(openapi: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema of the body of each POST route."""
    found = {
        path: resolved(openapi, route["post"]["requestBody"]["content"]["application/json"]["schema"])
        for path, route in openapi["paths"].items()
        if "post" in route
    }
    assert {"/v1/chat/completions", "/v1/completions"} <= set(found)
    return found


def resolved(openapi: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def all_parts(openapi: dict[str, Any], schema: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema with all that it consists of."""
    seen: set[int] = set()
    todo = [(place, schema)]
    while todo:
        place, part = todo.pop()
        part = resolved(openapi, part)
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield place, part
        todo += [(place, each) for name in ("anyOf", "oneOf", "allOf", "prefixItems") for each in part.get(name, ())]
        todo += [(f"{place}.{name}", each) for name, each in part.get("properties", {}).items()]
        for name in ("items", "additionalProperties"):
            if isinstance(part.get(name), dict):
                todo.append((f"{place}[]", part[name]))


def test_every_number_text_and_list_has_a_bound(openapi: dict[str, Any]) -> None:
    parts = [
        each
        for path, route in openapi["paths"].items()
        for operation in route.values()
        for parameter in operation.get("parameters", ())
        for each in all_parts(openapi, parameter["schema"], f"{path} {parameter['name']}")
    ]
    for path, body in bodies(openapi).items():
        parts += all_parts(openapi, body, path)
    unbounded = []
    for place, part in parts:
        if "const" in part or "enum" in part:
            continue
        kind = part.get("type")
        low = "minimum" in part or "exclusiveMinimum" in part
        high = "maximum" in part or "exclusiveMaximum" in part
        bounded = {
            "integer": low and high,
            "number": low and high,
            "string": "maxLength" in part or "}$" in part.get("pattern", ""),
            "array": "maxItems" in part,
            # An object with any fields is bounded by the size of a body.
            "object": "properties" in part or part.get("additionalProperties") is True or "maxProperties" in part,
        }
        if not bounded.get(kind, True):
            unbounded.append(f"{place}: {kind}")
    assert not unbounded, unbounded
    assert sum(part.get("type") in ("integer", "number") for _, part in parts) > 20


def test_unknown_fields_are_named_on_every_route(openapi: dict[str, Any], client: httpx.Client) -> None:
    for path, body in bodies(openapi).items():
        for place, part in all_parts(openapi, body, path):
            if part.get("type") == "object" and "properties" in part:
                assert part.get("additionalProperties") is False, place
        answer = client.post(path, json={**example(openapi, body), "no_such_field": 1})
        assert answer.status_code == 422, path
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("no_such_field", "unknown_field")


def example(openapi: dict[str, Any], schema: dict[str, Any]) -> Any:
    """The smallest value that a schema allows."""
    schema = resolved(openapi, schema)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return example(openapi, schema[name][0])
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if schema["type"] == "object":
        return {name: example(openapi, schema["properties"][name]) for name in schema.get("required", ())}
    if schema["type"] == "array":
        return [example(openapi, schema["items"])] * schema.get("minItems", 0)
    return {"string": "a" * max(1, schema.get("minLength", 0)), "integer": schema.get("minimum", 0), "boolean": False}[
        schema["type"]
    ]


# --- bodies that are no bodies ---


def bad_bodies() -> Iterator[bytes]:
    yield from (b"", b"{", b"[]", b"null", b"1", b'"text"', b"{}", b"\xff\xfe\x00", b'{"messages": "\xff"}', b"\x00")
    yield b'{"a":' * 20_000 + b"1" + b"}" * 20_000
    yield b"[" * 100_000
    yield b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    yield b'{"max_tokens":' + b"9" * 100_000 + b"}"
    for name in ("temperature", "max_tokens", "seed", "n", "top_logprobs"):
        for number in (
            "1e999",
            "-1e999",
            "NaN",
            "Infinity",
            "-Infinity",
            "1e-999",
            "-0.0",
            "1" + "0" * 400,
            "true",
            '"1"',
        ):
            yield json.dumps(CHAT)[:-1].encode() + f', "{name}": {number}}}'.encode()
    for text in (r"\ud800", r"\udfff and text", r"\ud83d", r"\u0000"):
        yield b'{"max_tokens": 2, "messages": [{"role": "user", "content": "%s"}]}' % text.encode()
        yield b'{"prompt": "%s", "max_tokens": 2}' % text.encode()
        for name in ("stop", "model", "user", "%s"):
            yield json.dumps(CHAT)[:-1].encode() + b', "%s": "%s"}' % (name.encode(), text.encode())
        yield b'{"prompt": "a", "max_tokens": 2, "stop": ["%s"]}' % text.encode()


def bad_fields() -> Iterator[dict[str, Any]]:
    paths = ["/etc/passwd", "../../config.json", "file:///etc/passwd", "http://127.0.0.1:1/", str(MODEL_PATH)]
    for path in paths:
        yield {**CHAT, "model": path}
        yield {**CHAT, "chat_template": path}
        yield {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": path}}]}]}
        yield {**CHAT, "chat_template_kwargs": {"chat_template": path, "tokenize": path}}
    for value in ({}, {"x": 1}, [], [[]], [1], 1.5, "", "x" * 5000, None, True, -1, 2**70):
        for name in (*CHAT, "n", "stop", "logit_bias", "tools", "tool_choice", "response_format", "stream_options",
                     "logprobs", "structured_outputs", "prompt"):  # fmt: skip
            if (name, value) != ("max_tokens", None):  # that is no error, and many tokens
                yield {**CHAT, name: value}
    for bias in ({"-1": 1}, {"9" * 12: 1}, {"a": 1}, {"99999999": 1}, {"1": 1e9}, {"\ud800": 1}):
        yield {**CHAT, "logit_bias": bias}
    yield {"prompt": [2**31 - 1]}
    yield {"prompt": [[1], [-1]]}
    yield {**CHAT, "stop_token_ids": [2**31 - 1]}
    yield {**CHAT, "chat_template_kwargs": {"add_generation_prompt": 3, "conversation": [], "messages": [], "x": {}}}
    yield {**CHAT, "messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}
    yield {**CHAT, "messages": [{"role": "assistant", "tool_calls": []}]}


def test_no_bad_request_shows_the_server(locked: RunningServer, client: httpx.Client) -> None:
    """Every answer is an error in its form or a result, and its text has no path, repr or address."""
    asked = [(body, path) for body in bad_bodies() for path in ("/v1/chat/completions", "/v1/completions")]
    for fields in bad_fields():
        body = json.dumps(fields).encode()
        asked += [(body, "/v1/completions" if "prompt" in fields else "/v1/chat/completions")]
    statuses = set()
    for body, path in asked:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404, 413, 422), (body[:200], answer.text)
        if answer.status_code == 200:
            continue
        error = answer.json()["error"]
        check_text(error["message"], body[:200])
    assert {200, 400, 404, 422} <= statuses
    locked.check_nothing_is_left()


def check_text(message: str, asked: object) -> None:
    given = str(asked)
    assert message and len(message) <= 2000
    for trace in (str(MODEL_PATH), "0x", "Traceback", ".py", "object at", "hermes_async", "pydantic", "http", "<class"):
        assert trace not in message or trace in given, (message, asked)
    for char in "/<>":
        assert char not in message or char in given, (message, asked)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/chat/completions"), ("POST", "/nowhere"), ("PUT", "/health")]
)
def test_other_paths_and_methods_are_errors_in_the_same_form(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code in (404, 405)
    check_text(answer.json()["error"]["message"], path)


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/page.py",
             "/v1/models/../../etc/passwd", "/v1/models//etc/passwd", "/v1/models/%2e%2e%2fx"],
)  # fmt: skip
def test_no_path_reaches_the_file_system(locked: RunningServer, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.sendall(request.encode())
        assert b" 404 " in connection.makefile("rb").readline()


# --- bodies that are too large ---


def read_status(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


def head(size: str) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\n{size}\r\n\r\n"
    ).encode()


def test_a_declared_body_that_is_too_large_is_refused_before_it_is_read(locked: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.sendall(head(f"content-length: {MAX_BODY + 1}"))  # and not one byte of it
        assert read_status(connection) == 413


def test_a_body_of_unknown_length_is_refused_when_it_gets_too_large(locked: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.sendall(head("transfer-encoding: chunked"))
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(MAX_BODY // 0x10000 + 1):  # it never ends
            connection.sendall(piece)
        assert read_status(connection) == 413


def test_a_body_without_the_key_is_not_waited_for(locked: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.sendall(head("content-length: 1000").replace(KEY.encode(), b"wrong"))
        assert read_status(connection) == 401


def test_a_body_of_the_largest_size_is_read(client: httpx.Client) -> None:
    body = json.dumps(CHAT).encode()
    answer = client.post("/v1/chat/completions", content=body + b" " * (MAX_BODY - len(body)),
                         headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 200


def test_many_bad_requests_on_one_connection(client: httpx.Client) -> None:
    for body, _ in zip(itertools.cycle([b"{", b"[]", b"\xff"]), range(30), strict=False):
        assert client.post("/v1/completions", content=body).status_code in (400, 422)
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
