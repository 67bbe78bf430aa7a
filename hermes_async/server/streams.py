"""Server-sent events, and work that ends when its client goes away.

Both own their tasks. (sse-starlette is not used: it replaces uvicorn's signal handler for the whole process when it is
imported, and starts a task that nobody owns.)

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hermes_async.foreign_errors import ungrouped

T = TypeVar("T")

COMMENT = b": the request waits, or its prompt is being computed\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event with JSON as its data."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    prefix = "" if name is None else f"event: {name}\n"
    return f"{prefix}data: {text}\n\n".encode()


Events = MemoryObjectSendStream[bytes]
"""Where a producer sends its events. A send waits until the client has taken the event before."""


class EventStream(Response):
    """An answer of server-sent events.

    `produce` sends events, and ends. It is cancelled when the client goes away, or does not read for `send_timeout_s`.
    While it sends nothing, the client gets a comment line every `keep_alive_s`, which keeps proxies from giving up.

    Args:
        produce: Must not raise: the status of the answer has been sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, produce: Callable[[Events], Awaitable[None]], *, keep_alive_s: float, send_timeout_s: float
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce
        self._keep_alive_s = keep_alive_s
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_cancel_when_left, receive, tasks.cancel_scope)
                await self._send_all(send, tasks)
                tasks.cancel_scope.cancel()

    async def _send_all(self, send: Send, tasks: anyio.abc.TaskGroup) -> None:
        async def send_in_time(message: dict[str, Any]) -> None:
            with anyio.move_on_after(self._send_timeout_s) as sending:
                await send(message)
            if sending.cancelled_caught:
                tasks.cancel_scope.cancel()
                await anyio.lowlevel.checkpoint()

        await send_in_time({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events, taken = anyio.create_memory_object_stream[bytes]()
        tasks.start_soon(self._run, events)
        async with taken:
            while True:
                data: bytes | None = COMMENT
                with anyio.move_on_after(self._keep_alive_s):
                    try:
                        data = await taken.receive()
                    except anyio.EndOfStream:
                        data = None
                if data is None:
                    break
                await send_in_time({"type": "http.response.body", "body": data, "more_body": True})
        await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, events: Events) -> None:
        async with events:
            await self._produce(events)


async def unless_left(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Runs `work` to its end, and cancels it when the client goes away.

    Raises:
        ClientDisconnect: The client went away.
    """
    results: list[T] = []
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_left, request.receive, tasks.cancel_scope)
            results.append(await work())
            tasks.cancel_scope.cancel()
    if not results:
        raise ClientDisconnect
    return results[0]


async def _cancel_when_left(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
