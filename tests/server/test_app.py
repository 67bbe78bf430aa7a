"""The application as a part of another one, its lifespan, its end, and what every route passes first."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from hermes_async import ConfigError, Engine, RequestError
from hermes_async.demo import MODEL_PATH
from hermes_async.server import ServerSettings, create_app
from hermes_async.server.model_server import model_server_of
from tests.engines import both_loops, until

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


def demo_engine() -> Engine:
    return Engine(MODEL_PATH, memory_budget="8MiB")


def client_of(app: Any, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers)


async def test_the_lifespan_opens_and_closes_the_engine() -> None:
    engine = demo_engine()
    app = create_app(engine)
    async with client_of(app) as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        async with app.router.lifespan_context(app):
            assert (await client.get("/health")).json() == {"status": "ok"}
            await engine.wait_ready()
            assert (await client.get("/ready")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert (await client.get("/health")).status_code == 503
    assert not engine.is_open


@pytest.mark.parametrize("framework", [FastAPI, Starlette])
async def test_it_is_mounted_in_another_application(framework: Any) -> None:
    engine = demo_engine()
    hermes = create_app(engine)
    app = framework(lifespan=lambda app: hermes.router.lifespan_context(hermes), routes=[Mount("/llm", hermes)])
    async with app.router.lifespan_context(app), client_of(app) as client:
        answer = await client.post("/llm/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.get("/health")).status_code == 404
        assert (await client.get("/llm/")).status_code == 200
    assert not engine.is_open


async def test_values_of_the_checkpoint_where_a_request_does_not_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(MODEL_PATH, tmp_path / "sampling"))
    says = {"eos_token_id": 0, "do_sample": True, "temperature": 1.4, "top_p": 0.9, "repetition_penalty": 1.2}
    (path / "generation_config.json").write_text(json.dumps(says))
    app = create_app(Engine(path, memory_budget="8MiB"), ServerSettings(from_model=True))
    caplog.set_level("INFO", "hermes_async")

    async def texts(client: httpx.AsyncClient, **fields: Any) -> list[str]:
        body = {"prompt": "ROMEO:\n", "max_tokens": 12, "seed": 4} | fields
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 4} | fields
        completion = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        message = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["message"]
        return [completion, message["content"]]

    async with app.router.lifespan_context(app), client_of(app) as client:
        own = {"temperature": 1.4, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2}
        assert await texts(client) == await texts(client, **own)
        assert await texts(client) != await texts(client, temperature=0)
        assert await texts(client, temperature=0) == await texts(client, **own | {"temperature": 0})
        response = (await client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 1})).json()
        assert (response["temperature"], response["top_p"]) == (1.4, 0.9)
    taken = "temperature 1.4, top_p 0.9, top_k 50, min_p 0, repetition_penalty 1.2"
    assert f"requests take from generation_config.json: {taken}" in caplog.messages


async def test_its_owner_may_open_the_engine() -> None:
    engine = demo_engine()
    hermes = create_app(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine, hermes.router.lifespan_context(hermes):
            yield
            assert engine.is_open

    app = FastAPI(lifespan=lifespan)
    app.mount("/llm", hermes)
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.post("/llm/v1/chat/completions", json=CHAT)).status_code == 200


async def test_keys_also_hold_where_it_is_mounted() -> None:
    engine = demo_engine()
    hermes = create_app(engine, ServerSettings(api_key="secret"))
    app = FastAPI()
    app.mount("/llm/health", hermes)  # a path that ends like the one that needs no key
    async with engine, client_of(app) as client:
        assert (await client.get("/llm/health/health")).status_code == 200
        assert (await client.get("/llm/health/v1/models")).status_code == 401
        assert (await client.get("/llm/health//health")).status_code == 401


async def test_a_key_is_a_bearer_token_or_a_password() -> None:
    app = create_app(demo_engine(), ServerSettings(api_key="secret"))
    password = base64.b64encode(b"anybody:secret").decode()
    wrong = base64.b64encode(b"secret:other").decode()
    statuses = {
        "": 401,
        "Bearer secret": 503,
        "bearer secret": 503,
        "Bearer secre": 401,
        "Bearer secret2": 401,
        "Bearer": 401,
        "Bearer \xff": 401,
        "Basic secret": 401,
        "Basic ?": 401,
        f"Basic {password}": 503,
        f"Basic {wrong}": 401,
        "Token secret": 401,
    }
    async with client_of(app) as client:
        for value, status in statuses.items():
            headers = {"authorization": value.encode("latin-1")} if value else {}
            assert (await client.get("/ready", headers=headers)).status_code == status, value  # 503: it was let in


async def test_only_allowed_hosts_are_answered() -> None:
    app = create_app(demo_engine(), ServerSettings(allowed_hosts=("localhost", "[::1]")))
    async with client_of(app) as client:
        for host in ("localhost", "localhost:8000", "LOCALHOST:1", "[::1]", "[::1]:8000"):
            assert (await client.get("/ready", headers={"host": host})).status_code == 503, host
        for host in ("example.com", "localhost.example.com", "", "127.0.0.1", "::1", "localhost:x"):
            assert (await client.get("/health", headers={"host": host})).status_code == 421, host


async def test_a_server_that_stops_lets_answers_end(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(demo_engine())
    server = model_server_of(app)
    async with app.router.lifespan_context(app), client_of(app) as client:
        answers: list[httpx.Response] = []

        async def ask(max_tokens: int) -> None:
            body = {**CHAT, "max_tokens": max_tokens, "ignore_eos": True}
            answers.append(await client.post("/v1/chat/completions", json=body))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, 40)
            await until(lambda: server.engine.statistics().num_running == 1)
            await server.stop(within_s=60)
            assert server.engine.statistics().num_running == 0
        assert answers[0].json()["choices"][0]["finish_reason"] == "length"
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        assert [record.levelname for record in caplog.records if "the server stops" in record.message] == ["WARNING"]
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200


async def test_a_server_that_stops_ends_answers_that_take_too_long() -> None:
    app = create_app(demo_engine())
    server = model_server_of(app)
    async with app.router.lifespan_context(app), client_of(app) as client:

        async def ask() -> None:
            body = {**CHAT, "max_tokens": 400, "ignore_eos": True}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["finish_reason"] == "abort"

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await until(lambda: server.engine.statistics().num_running == 1)
            await server.stop(within_s=0)


async def test_a_request_ends_at_its_deadline() -> None:
    app = create_app(demo_engine(), ServerSettings(request_timeout_s=1e-3))
    async with app.router.lifespan_context(app), client_of(app) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
        assert server_is_empty(app)


def server_is_empty(app: FastAPI) -> bool:
    statistics = model_server_of(app).engine.statistics()
    return statistics.num_running == statistics.num_waiting == 0


async def test_two_requests_with_one_id() -> None:
    app = create_app(demo_engine())
    async with app.router.lifespan_context(app), client_of(app) as client:
        headers, statuses = {"x-request-id": "a.b-1"}, []

        async def ask() -> None:
            body = {**CHAT, "max_tokens": 300, "ignore_eos": True}
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
            statuses.append(answer.status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await until(lambda: model_server_of(app).engine.statistics().num_running == 1)
            second = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert (statuses, second.status_code) == ([200], 409)
        again = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert again.json()["id"] == "chatcmpl-a.b-1"
        bad = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "a\tb" * 40})
        assert (bad.status_code, bad.json()["error"]["param"]) == (422, "x-request-id")


@pytest.mark.parametrize(
    "option",
    [{"api_key": ""}, {"api_key": "ä"}, {"served_model_name": ""}, {"keep_alive_s": 0}, {"request_timeout_s": -1.0},
     {"max_body_bytes": 0}, {"max_choices": True}, {"default_max_tokens": 1.5}],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        ServerSettings(**option)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(ServerSettings(api_key="secret"))


async def test_an_error_that_is_not_expected_says_nothing_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = demo_engine()
    app = create_app(engine)

    async def fails(*_: Any, **__: Any) -> None:
        raise LookupError("/secret/path at 0x7f0000000000")

    monkeypatch.setattr(engine, "tokenize", fails)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with engine, httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 500
        assert "secret" not in answer.text and "0x" not in answer.text

        async def refuses(*_: Any, **__: Any) -> None:
            raise RequestError("the preparation failed: /secret/path") from OSError("/secret/path")

        monkeypatch.setattr(engine, "tokenize", refuses)
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 400
        assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_ends_its_request(stream: bool) -> None:
    app = create_app(demo_engine())
    engine = model_server_of(app).engine
    body = json.dumps({**CHAT, "max_tokens": 400, "ignore_eos": True, "n": 2, "stream": stream}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    messages, sent = iter([{"type": "http.request", "body": body, "more_body": False}]), []

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await until(lambda: engine.statistics().tokens_generated > 0)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
        await until(lambda: server_is_empty(app))
        assert engine.statistics().tokens_generated < 800
    assert sent[0]["status"] == (200 if stream else 499)
