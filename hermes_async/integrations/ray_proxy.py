"""Errors for clients whose replica was lost, in the HTTP proxies of Ray Serve. Needs the extra `ray`.

Ray's proxy does not end an answer whose replica or node has died: its client finds a plain 500, or a connection that
is cut. Name this function in the environment of every node, before Ray starts there, and clients get an error that says
what to do:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=hermes_async.integrations.ray_proxy:middlewares
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hermes_async.server.errors import error_body, error_response
from hermes_async.server.streams import DONE, event

_KIND = "server_error"
_CODE = "replica_lost"
_MESSAGE = "the replica that served the request was lost; send the request again"


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around each of its HTTP proxies."""
    return [Middleware(LostReplicaErrors)]


class LostReplicaErrors:
    """Ends each answer that `app` has left without an end.

    An answer that has not begun becomes a 503, which OpenAI's clients send again by themselves. A stream of events gets
    an error as its last event. Another answer that has begun stays as it is: then the server cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = is_stream = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun, ended, is_stream
            if message["type"] == "http.response.start":
                begun = True
                media_type = Headers(raw=message["headers"]).get("content-type", "")
                is_stream = media_type.startswith("text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, send_and_note)
        if not begun:
            lost = error_response(503, _MESSAGE, kind=_KIND, code=_CODE, headers={"retry-after": "1"})
            await lost(scope, receive, send)
        elif is_stream and not ended:
            last = event(error_body(_MESSAGE, kind=_KIND, code=_CODE)) + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
