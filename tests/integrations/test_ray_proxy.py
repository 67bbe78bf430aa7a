"""What clients get whose replica was lost. The apps here leave answers as Ray's proxy does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from hermes_async.integrations.ray_proxy import LostReplicaErrors, middlewares

pytestmark = pytest.mark.anyio


async def sent_by(*messages: Message, kind: str = "http") -> list[Message]:
    """What is sent where the app behind sends `messages`, and ends."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await LostReplicaErrors(app)({"type": kind}, receive, send)
    return sent


def start(media_type: str) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type.encode())]}


def body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def test_a_request_without_an_answer_gets_503_and_may_be_sent_again() -> None:
    begin, end = await sent_by()
    assert begin["status"] == 503
    assert (b"retry-after", b"1") in begin["headers"]
    error = json.loads(end["body"])["error"]
    assert error["code"] == "replica_lost"
    assert "send the request again" in error["message"]


@pytest.mark.parametrize("events", [[], [b"data: {}\n\n"]], ids=["no event", "an event"])
async def test_a_stream_that_was_cut_ends_with_an_error(events: list[bytes]) -> None:
    messages = [start("text/event-stream; charset=utf-8"), *(body(data, more=True) for data in events)]
    *before, last = await sent_by(*messages)
    assert before == messages
    error, done = last["body"].decode().removesuffix("\n\n").split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert done == "data: [DONE]"
    assert not last["more_body"]


@pytest.mark.parametrize(
    "messages",
    [
        [start("text/event-stream"), body(b"data: {}\n\n", more=True), body(b"", more=False)],
        [start("application/json"), body(b"{}", more=False)],
        [start("application/json"), body(b'{"half', more=True)],  # nothing can make this whole; the server cuts it
    ],
    ids=["stream", "whole", "half"],
)
async def test_other_answers_stay_as_they_are(messages: list[Message]) -> None:
    assert await sent_by(*messages) == messages


async def test_what_is_no_request_passes() -> None:
    assert await sent_by({"type": "lifespan.startup.complete"}, kind="lifespan") == [
        {"type": "lifespan.startup.complete"}
    ]


def test_ray_finds_it_as_a_middleware() -> None:
    (middleware,) = middlewares()
    assert middleware.cls is LostReplicaErrors
