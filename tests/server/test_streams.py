"""Event streams: comments while nothing comes, clients that go away, and clients that do not read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from starlette.requests import ClientDisconnect, Request

from hermes_async.server.streams import COMMENT, DONE, Events, EventStream, event, unless_left

pytestmark = pytest.mark.anyio

HTTP = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Client:
    """An ASGI client that counts what it gets, and may go away or stop reading."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.gone = anyio.Event()
        self.reads = anyio.Event()
        self.reads.set()
        self.got = anyio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.messages.append(message)
        self.got.set()

    async def wait_for(self, body: bytes) -> None:
        with anyio.fail_after(30):
            while body not in self.body:
                self.got = anyio.Event()
                await self.got.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def stream(
    produce: Callable[[Events], Awaitable[None]], keep_alive_s: float = 60.0, send_timeout_s: float = 60.0
) -> EventStream:
    return EventStream(produce, keep_alive_s=keep_alive_s, send_timeout_s=send_timeout_s)


async def test_events_come_in_order_and_the_answer_ends() -> None:
    async def produce(events: Events) -> None:
        await events.send(event({"text": "a\nb"}))
        await events.send(event({"n": 1}, "named"))
        await events.send(DONE)

    client = Client()
    await stream(produce)(HTTP, client.receive, client.send)
    assert client.messages[0]["status"] == 200
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    assert b"content-length" not in headers
    assert client.body == b'data: {"text":"a\\nb"}\n\nevent: named\ndata: {"n":1}\n\ndata: [DONE]\n\n'
    assert [message["more_body"] for message in client.messages[1:]] == [True, True, True, False]


async def test_comments_come_while_nothing_else_does() -> None:
    go_on = anyio.Event()

    async def produce(events: Events) -> None:
        await go_on.wait()
        await events.send(DONE)

    client = Client()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream(produce, keep_alive_s=0.01), HTTP, client.receive, client.send)
        await client.wait_for(COMMENT * 3)
        go_on.set()
    assert client.body.replace(COMMENT, b"") == DONE
    assert all(line.startswith((b":", b"data:")) or not line for line in client.body.split(b"\n"))


async def test_a_client_that_goes_away_cancels_the_producer() -> None:
    ended = anyio.Event()

    async def produce(events: Events) -> None:
        try:
            await events.send(event(1))
            await anyio.sleep_forever()
        finally:
            ended.set()

    client = Client()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream(produce), HTTP, client.receive, client.send)
        await client.wait_for(event(1))
        client.gone.set()
    assert ended.is_set()


async def test_a_client_that_does_not_read_is_given_up() -> None:
    ended = anyio.Event()

    async def produce(events: Events) -> None:
        try:
            while True:
                await events.send(event(1))
        finally:
            ended.set()

    client = Client()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream(produce, send_timeout_s=0.05), HTTP, client.receive, client.send)
        await client.wait_for(event(1))
        client.reads = anyio.Event()
    assert ended.is_set()


async def test_work_ends_when_its_client_goes_away() -> None:
    client, ended = Client(), anyio.Event()

    async def work() -> None:
        client.gone.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with pytest.raises(ClientDisconnect):
        await unless_left(Request(HTTP, client.receive), work)
    assert ended.is_set()


async def test_work_returns_its_result_and_raises_its_error() -> None:
    client = Client()

    async def result() -> int:
        return 3

    async def failure() -> int:
        raise LookupError("of the work")

    assert await unless_left(Request(HTTP, client.receive), result) == 3
    with pytest.raises(LookupError, match="of the work"):
        await unless_left(Request(HTTP, client.receive), failure)
