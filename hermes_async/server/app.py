"""The application: all routes around one engine."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import anyio
from fastapi import APIRouter, FastAPI, Path, Response
from pydantic import BaseModel

from hermes_async import Engine, __version__
from hermes_async.config import format_sampling
from hermes_async.errors import EngineClosedError
from hermes_async.server import chat, completions, embeddings, rerank, responses, tokens
from hermes_async.server.errors import ERRORS, add_error_handlers, error_response
from hermes_async.server.guard import Guard
from hermes_async.server.metrics import RequestCounter, RequestMetrics
from hermes_async.server.model_server import ModelServer, Server
from hermes_async.server.page import page_router
from hermes_async.server.settings import ServerSettings

_DESCRIPTION = (
    "An OpenAI-compatible API. Errors have the form of OpenAI's. The stream of a request that waits carries comments."
)


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """An application that serves `engine`, alone or mounted in another FastAPI or Starlette application.

        engine = hermes_async.Engine("path or hub id", memory_budget="3GiB")
        hermes = create_app(engine)
        app = FastAPI(lifespan=lambda app: hermes.router.lifespan_context(hermes))
        app.mount("/llm", hermes)

    The application's lifespan enters the engine and leaves it. It does neither if the engine is open already: then its
    owner enters it, as `async with engine:` in a lifespan of theirs. (Frameworks do not run the lifespan of a mounted
    application by themselves.)

    Args:
        engine: One that was not entered yet, or an open one.
        settings: Options.
    """
    settings = settings or ServerSettings()
    metrics = RequestMetrics(engine)
    server = ModelServer(engine, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as exits:
            if not server.is_open:
                await exits.enter_async_context(engine)
            if settings.from_model:
                logger.info("requests take from generation_config.json: %s", format_sampling(server.default_sampling()))
            yield

    app = FastAPI(
        title="hermes_async",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        max_body_size=settings.max_body_bytes,
        responses=ERRORS,
    )
    app.state.model_server = server  # see `model_server_of`
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(RequestCounter, metrics=metrics)  # around the one before
    add_error_handlers(app)
    for route in (chat, completions, responses, embeddings, rerank, tokens):
        app.include_router(route.router)
    app.include_router(_status)
    if settings.page:
        app.include_router(page_router(engine, settings, is_stopping=lambda: server.stopping))
    return app


# --- models, health and metrics ---

logger = logging.getLogger(__name__)

_status = APIRouter()

ModelName = Annotated[str, Path(max_length=512)]


class ModelBody(BaseModel):
    """A model that requests may name."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "hermes_async"
    max_model_len: int | None = None


class ModelList(BaseModel):
    """All models that requests may name."""

    object: str = "list"
    data: list[ModelBody]


class Status(BaseModel):
    """Whether the server works."""

    status: str


@_status.get("/v1/models")
async def models(server: Server) -> ModelList:
    """The models that requests may name: one."""
    return ModelList(data=[_model_body(server)])


@_status.get("/v1/models/{model:path}")
async def model(server: Server, model: ModelName) -> ModelBody:
    """One model."""
    server.check_model(model)
    return _model_body(server)


def _model_body(server: ModelServer) -> ModelBody:
    return ModelBody(id=server.model_name, created=server.created, max_model_len=server.engine.plan.context_length)


@_status.get("/health", responses={503: ERRORS[503]})
async def health(server: Server) -> Status:
    """Whether the engine is open; needs no key."""
    if not server.is_open:
        raise EngineClosedError("the engine is not open")
    return Status(status="ok")


@_status.get("/ready")
async def ready(server: Server) -> Response:
    """Whether the weights that stay in memory are loaded, and new requests are taken."""
    if server.is_open and not server.engine.ready:
        with anyio.move_on_after(0):
            await server.engine.wait_ready()  # begins to read again what could not be read
    if server.is_open and not server.stopping and server.engine.ready:
        return Response('{"status":"ready"}', media_type="application/json")
    what = "the server stops" if server.stopping else "the weights are being loaded"
    return error_response(503, what, kind="server_error", code="not_ready", headers={"retry-after": "5"})


@_status.get("/metrics", response_class=Response)
async def metrics_text(server: Server) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
