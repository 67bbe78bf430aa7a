"""What every request passes first: the check of the key and of the host, and headers for browsers."""

from __future__ import annotations

import base64
import binascii
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hermes_async.server.errors import error_response
from hermes_async.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""

_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Guard:
    """Refuses requests without the key, or for another host. It reads no body, so a refused one costs nothing.

    The key comes as `Authorization: Bearer KEY`, as OpenAI's clients send it, or as the password of HTTP's Basic
    authentication, which browsers ask their users for. It is compared in constant time.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._hosts = None if settings.allowed_hosts is None else frozenset(settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), _path_in_app(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    added.setdefault(name, value)
            await send(message)

        if self._hosts is not None and _host(headers) not in self._hosts:
            refusal = error_response(
                421,
                "this server answers only to the host names that it was told: see --allowed-host",
                kind="invalid_request_error",
                code="unknown_host",
            )
            await refusal(scope, receive, send_with_headers)
        elif self._key is not None and path not in OPEN_PATHS and not self._has_key(headers):
            refusal = error_response(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": 'Bearer, Basic realm="hermes_async", charset="UTF-8"'},
            )
            await refusal(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        given = credentials.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self._key)


def _path_in_app(scope: Scope) -> str:
    """The path within this application, which may be mounted below another."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _host(headers: Headers) -> str:
    """The host that the client asked for, without its port."""
    host = headers.get("host", "").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not name.endswith(":") else host
