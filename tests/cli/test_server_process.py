"""Connections whose clients do not send what they began."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import uvicorn

from hermes_async.cli import server_process
from hermes_async.cli.server_process import Connection
from tests.engines import both_loops

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()

HEAD = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\n"


@asynccontextmanager
async def serving(answer_when: anyio.Event | None = None) -> AsyncIterator[int]:
    """Serves an application that reads the body, waits for an event, and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive()).get("more_body"):
            pass
        if answer_when is not None:
            await answer_when.wait()
        if message["type"] == "http.request":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None, timeout_keep_alive=3600)
        server = uvicorn.Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [sock])
            yield sock.getsockname()[1]
            server.should_exit = True


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST", HEAD[:-2], HEAD, HEAD + b"ab", HEAD + b"body", HEAD + b"body" + HEAD[:9], HEAD + b"body" + HEAD],
    ids=["nothing", "a word", "headers", "no body", "half a body", "one request", "and a word", "and headers"],
)
async def test_a_connection_whose_client_sends_no_more_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "CHECK_SECONDS", 0.01)
    async with serving() as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(sent)
        received = b""
        with anyio.fail_after(30):
            try:
                async for data in stream:
                    received += data
            except anyio.BrokenResourceError:  # it was reset
                pass
    assert received.count(b"200 OK") == sent.count(b"body")


async def test_an_answer_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "CHECK_SECONDS", 0.001)
    late, num_checks = anyio.Event(), 0
    check = Connection.check_client

    def check_and_count(connection: Connection) -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 50:
            late.set()
        check(connection)

    monkeypatch.setattr(Connection, "check_client", check_and_count)
    async with serving(late) as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(HEAD + b"body")
        with anyio.fail_after(30):
            assert b"200 OK" in await stream.receive()
