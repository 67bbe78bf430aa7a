"""The page at `/`: the engine at work, and a chat. HTML, CSS and JavaScript modules that ship with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import anyio
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from hermes_async import Engine, EngineSnapshot, Plan
from hermes_async.server.settings import ServerSettings
from hermes_async.server.streams import Events, EventStream, event

INTERVAL_S = 1 / 8
"""A watcher gets at most one event in this time."""

_MAX_EVENTS_PER_S = 256
"""Of all watchers together: where there are many, each gets fewer."""

_MAX_REQUESTS = 64
"""Requests that an event lists; it counts all."""

_MEDIA_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}

_ACTIVITIES = {
    "empty": "e",
    "loading": "l",
    "ready": "r",
    "computing": "c",
    "computed": "d",
    "failed": "f",
}
"""The letter of each activity of a stage."""


@dataclass(frozen=True, slots=True)
class _Asset:
    """A file of the page."""

    content: bytes
    media_type: str

    def response(self) -> Response:
        return Response(self.content, media_type=self.media_type, headers={"cache-control": "no-cache"})


def _assets() -> dict[str, _Asset]:
    files = [file for file in resources.files("hermes_async").joinpath("server", "static").iterdir() if file.is_file()]
    return {
        file.name: _Asset(file.read_bytes(), _MEDIA_TYPES[suffix])
        for file in files
        if (suffix := file.name.rpartition(".")[2]) in _MEDIA_TYPES
    }


_ASSETS = _assets()
"""All files of the page by name, read when this module is imported. No name from a request is ever a path."""


class SnapshotFeed:
    """Turns snapshots of an engine into events, once for all watchers. Event-loop side only.

    There are two kinds of events. "model" has what rarely changes: the plan and the names of the stages. "state" has
    the rest; in it, a stage is one letter. A watcher gets a state only if anything in it has changed. It gets the
    newest state when it has taken the one before, so nothing queues for a slow watcher.
    """

    def __init__(self, engine: Engine, is_stopping: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_stopping = is_stopping
        # All mutable state: how many watch; when the engine was last looked at; the plan and the state that were told
        # last, with their events and how often each was changed; and whether the engine was closed.
        self.num_watchers = 0
        self._looked_at = float("-inf")
        self._plan: Plan | None = None
        self._resident: tuple[bool, ...] = ()
        self._state: dict[str, Any] = {}
        self._model_event = self._state_event = b""
        self._num_models = self._num_states = 0
        self._is_closed = False

    async def watch(self, events: Events) -> None:
        """Sends events until the engine is closed, the server has ended its last request, or the watcher has left.

        Cancellation: at once.
        """
        self.num_watchers += 1
        models_seen = states_seen = 0
        try:
            while True:
                self._look()
                data = b"" if models_seen == self._num_models else self._model_event
                data += b"" if states_seen == self._num_states else self._state_event
                models_seen, states_seen, is_last = self._num_models, self._num_states, self._has_ended
                if data:
                    await events.send(data)
                if is_last:
                    return
                await anyio.sleep(self._interval_s)
        except anyio.BrokenResourceError:  # nobody takes events any more
            return
        finally:
            self.num_watchers -= 1

    @property
    def _has_ended(self) -> bool:
        return self._is_closed or (self._is_stopping() and not self._state["num_requests"])

    @property
    def _interval_s(self) -> float:
        return max(INTERVAL_S, self.num_watchers / _MAX_EVENTS_PER_S)

    def _look(self) -> None:
        """Makes new events, if the last look at the engine is long enough ago."""
        now = anyio.current_time()
        if now < self._looked_at + 0.9 * INTERVAL_S:
            return
        self._looked_at = now
        snapshot = self._engine.snapshot()
        self._is_closed = snapshot.engine != "open"
        resident = tuple(stage.resident for stage in snapshot.stages)
        plan = self._plan if self._is_closed else self._engine.plan
        if plan is not None and (plan is not self._plan or resident != self._resident):
            self._plan, self._resident = plan, resident
            self._model_event = event(_model(plan, snapshot), "model")
            self._num_models += 1
        state = _state(snapshot)
        if state != self._state:
            self._state = state
            self._state_event = event({"at": round(snapshot.at, 4), **state}, "state")
            self._num_states += 1


def _model(plan: Plan, snapshot: EngineSnapshot) -> dict[str, Any]:
    """What rarely changes; a stage is [label, bytes, whether it is resident]."""
    return {
        "generates": plan.generates,
        "stages": [[stage.label, stage.nbytes, int(stage.resident)] for stage in snapshot.stages],
        "plan": plan.as_dict(),
        "bytes_per_sweep": snapshot.bytes_per_sweep,
        "disk_sweep_s": round(snapshot.disk_sweep_seconds, 6),
        "disk_measured": snapshot.disk_measured,
    }


def _state(snapshot: EngineSnapshot) -> dict[str, Any]:
    """All that changes, but for the time."""
    requests = snapshot.requests
    memory = snapshot.memory
    return {
        "engine": snapshot.engine,
        "sweeping": snapshot.sweeping,
        "sweep": snapshot.sweep,
        "stage": snapshot.stage_idx,
        "stages": "".join(_ACTIVITIES[stage.activity] for stage in snapshot.stages),
        "memory": {
            "budget": memory.budget_bytes,
            "weights": memory.weights_bytes,
            "ring": memory.ring_bytes,
            "experts": memory.expert_bytes,
            "kv": memory.kv_bytes,
            "kv_budget": memory.kv_budget_bytes,
            "workspace": memory.workspace_bytes,
            "other": memory.other_bytes,
            "free": memory.free_bytes,
        },
        "experts": {
            "hits": snapshot.expert_hits,
            "misses": snapshot.expert_misses,
            "in_memory": snapshot.num_experts_in_memory,
            "total": snapshot.num_experts,
        },
        "requests": [
            [
                request.request_id,
                request.activity,
                request.prompt_tokens,
                request.computed_tokens,
                request.output_tokens,
                request.max_output_tokens,
                int(request.in_session),
            ]
            for request in requests[:_MAX_REQUESTS]
        ],
        "num_requests": len(requests),
        "num_forwards": snapshot.num_forwards,
        "num_sessions": snapshot.num_sessions,
        "tokens": snapshot.tokens_generated,
        "prompt_tokens": snapshot.prompt_tokens_computed,
        "bytes_read": snapshot.bytes_read,
        "stall_s": round(snapshot.stall_seconds, 4),
    }


def page_router(
    engine: Engine, settings: ServerSettings, *, is_stopping: Callable[[], bool] = lambda: False
) -> APIRouter:
    """The page's routes: `/`, its assets, and snapshots of the engine, once or as server-sent events.

    Args:
        is_stopping: Whether the server takes no new requests. Then the events end with the last request.
    """
    router = APIRouter(include_in_schema=False)
    feed = SnapshotFeed(engine, is_stopping)

    @router.get("/")
    async def page() -> Response:
        return _ASSETS["index.html"].response()

    @router.get("/page/snapshot")
    async def snapshot() -> Response:
        return JSONResponse(engine.snapshot().as_dict(), headers={"cache-control": "no-store"})

    @router.get("/page/events")
    async def events() -> Response:
        engine.snapshot()  # raises where the engine was never entered, while there can still be another status
        return EventStream(feed.watch, keep_alive_s=settings.keep_alive_s, send_timeout_s=settings.send_timeout_s)

    @router.get("/page/{name}")
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404)
        return _ASSETS[name].response()

    return router
