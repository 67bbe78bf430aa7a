"""A real server around the demo model, for tests: uvicorn on uvloop, on a free port, in a thread of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import uvicorn
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI

from hermes_async import Completion, Engine, EngineConfig, EngineStatistics, SamplingParams
from hermes_async.demo import MODEL_PATH
from hermes_async.foreign_errors import ungrouped
from hermes_async.server import ServerSettings, create_app
from tests.engines import RESIDENT_LEASES, until
from tests.inside import inside

T = TypeVar("T")

MODEL = "demo"
KEY = "key-of-the-tests"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that runs.

    Attributes:
        url: Without a slash at its end.
        portal: Calls functions on the server's event loop.
    """

    url: str
    port: int
    app: FastAPI
    engine: Engine
    portal: BlockingPortal
    _goes_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._goes_on.set()
        inside(self.engine).on_stage(self._wait)

    def _wait(self) -> None:
        self._goes_on.wait()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No stage is computed meanwhile, so that no request ends by itself."""
        self._goes_on.clear()
        try:
            yield
        finally:
            self._goes_on.set()

    def statistics(self) -> EngineStatistics:
        return self.portal.call(self.engine.statistics)

    def complete(self, prompt: object, **params: object) -> Completion:
        """The engine's own answer, without HTTP."""
        return self.portal.call(lambda: self.engine.complete(prompt, SamplingParams(**params)))  # type: ignore[arg-type]

    def until(self, condition: Callable[[EngineStatistics], bool]) -> None:
        """Returns when `condition` is true of the engine's statistics."""
        self.portal.call(until, lambda: condition(self.engine.statistics()))

    def check_nothing_is_left(self) -> None:
        """Returns when no request is under way, and checks that none holds anything."""
        self.until(lambda now: now.num_running + now.num_waiting == 0)
        self.portal.call(self.engine.drop_prefixes)
        now = self.statistics()
        assert (now.num_paused, now.kv_bytes, now.num_leases) == (0, 0, RESIDENT_LEASES)


def counts_of(metrics: str) -> dict[str, float]:
    """The values in Prometheus' text, by name with labels."""
    lines = (line.rpartition(" ") for line in metrics.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


@contextlib.contextmanager
def running_server(settings: ServerSettings | None = None, **config: object) -> Iterator[RunningServer]:
    """Opens the demo model, and serves it.

    Args:
        settings: By default, those of a server without a key.
        config: For `EngineConfig`.
    """
    engine = Engine(MODEL_PATH, memory_budget="16MiB", config=EngineConfig(**config))  # type: ignore[arg-type]
    app = create_app(engine, settings or ServerSettings(served_model_name=MODEL))
    with (
        start_blocking_portal(backend_options={"use_uvloop": True}) as portal,
        socket.create_server(("127.0.0.1", 0), backlog=2048) as sock,
        portal.wrap_async_context_manager(_serving(app, sock)),
    ):
        port = sock.getsockname()[1]
        yield RunningServer(f"http://127.0.0.1:{port}", port, app, engine, portal)


@contextlib.asynccontextmanager
async def _serving(app: FastAPI, sock: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with ungrouped():
        async with app.router.lifespan_context(app), anyio.create_task_group() as tasks:
            ended = anyio.Event()

            async def serve() -> None:
                await server.serve([sock])
                ended.set()

            tasks.start_soon(serve)
            try:
                yield
            finally:
                server.should_exit = True
                with anyio.CancelScope(shield=True):
                    await ended.wait()
