"""Runs uvicorn in the command's event loop, and ends it in order on SIGTERM and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from anyio.abc import TaskStatus
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hermes_async.cli.run import Interrupts
from hermes_async.errors import ConfigError
from hermes_async.foreign_errors import ungrouped
from hermes_async.server.model_server import model_server_of

_NUM_PENDING_CONNECTIONS = 2048
_SECONDS_FOR_LAST_BYTES = 5
CHECK_SECONDS = 10.0
CHECKS_FOR_HEADERS = 2
CHECKS_FOR_BODY = 6


class _Server(uvicorn.Server):
    """uvicorn without its handling of signals, which would end running requests at once, and the process by signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """uvicorn's connection, but one whose client does not send what it began is closed.

    uvicorn gives up only on connections that have had an answer and are silent since. A client that never sends a whole
    request would hold its connection, and a file descriptor, for ever. A client gets 20 to 30 seconds for a request's
    headers, and 60 to 70 for its body.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to check."""
        super().connection_made(transport)
        # All mutable state: the last request that was seen, and how many checks found that more of it must come.
        self._seen: object = None
        self._num_checks = 0
        self._check = self.loop.call_later(CHECK_SECONDS, self.check_client)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the checks."""
        self._check.cancel()
        super().connection_lost(exc)

    def check_client(self) -> None:
        """Closes the connection if its client has been too slow, and otherwise checks again later."""
        request = self.cycle
        has_no_request = request is None or request.response_complete
        waits = has_no_request or request.more_body
        self._num_checks = self._num_checks + 1 if waits and request is self._seen else int(waits)
        self._seen = request
        if self._num_checks > (CHECKS_FOR_HEADERS if has_no_request else CHECKS_FOR_BODY):
            self.transport.abort()
            return
        self._check = self.loop.call_later(CHECK_SECONDS, self.check_client)


async def serve_until_stopped(
    app: FastAPI,
    interrupts: Interrupts,
    *,
    host: str,
    port: int,
    uds: Path | None,
    root_path: str,
    shutdown_timeout_s: float,
    started: Callable[[str], None],
) -> None:
    """Serves `app` until SIGTERM or Ctrl-C.

    Then new requests are refused, and those that run may go on for `shutdown_timeout_s`. A second signal ends them.

    Args:
        started: Called with the address when the server listens.

    Raises:
        ConfigError: The address cannot be listened on.
        HermesError: The engine could not be opened.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        host=host,
        port=port,
        uds=None if uds is None else str(uds),
        root_path=root_path,
        lifespan="off",  # entered here, so that its error is raised as it is
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_NUM_PENDING_CONNECTIONS,
        timeout_graceful_shutdown=_SECONDS_FOR_LAST_BYTES,
        ws="none",
    )
    server, model_server = _Server(config), model_server_of(app)
    # The address first: an engine may take minutes to open.
    with ungrouped(), _listening_socket(host, port, uds) as sock:
        async with app.router.lifespan_context(app), anyio.create_task_group() as tasks:

            async def drain() -> None:
                await model_server.stop(shutdown_timeout_s)
                server.should_exit = True

            async def stop() -> None:
                if model_server.stopping:  # a second signal
                    await model_server.abort_all()
                else:
                    tasks.start_soon(drain)

            await tasks.start(_call_on_sigterm, stop)
            with interrupts.calling(stop):
                sock.listen(_NUM_PENDING_CONNECTIONS)  # uvicorn does it too, but later
                started(_address(sock))
                await server.serve(sockets=[sock])
            tasks.cancel_scope.cancel()


async def _call_on_sigterm(stop: Callable[[], Awaitable[None]], *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            await stop()


@contextlib.contextmanager
def _listening_socket(host: str, port: int, uds: Path | None) -> Iterator[socket.socket]:
    """A bound socket. Only this user may connect to a Unix domain socket, whose file is removed at the end.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    address: Any = str(uds)
    family: int = socket.AF_UNIX
    try:
        if uds is None:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
    with sock:
        try:
            if uds is None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
            else:
                with _only_for_this_user():
                    sock.bind(address)
        except OSError as error:
            place = f"{host}:{port}" if uds is None else uds
            raise ConfigError(f"cannot listen on {place}: {error.strerror or error}") from error
        try:
            yield sock
        finally:
            if uds is not None:
                uds.unlink(missing_ok=True)


@contextlib.contextmanager
def _only_for_this_user() -> Iterator[None]:
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
