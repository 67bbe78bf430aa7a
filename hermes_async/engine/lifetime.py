"""An engine's life: it is entered, opens its model, runs sweeps in a task of its own, and is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread

from hermes_async.config import EngineConfig, parse_bytes
from hermes_async.engine.events import RequestEvent
from hermes_async.engine.following import follow
from hermes_async.engine.isolation import one_checkpoint
from hermes_async.engine.request import Request
from hermes_async.engine.tracing import tracing
from hermes_async.errors import ConfigError, EngineClosedError, EngineError, EngineFailedError
from hermes_async.pipeload.groups import first_error, ungrouped
from hermes_async.pipeload.trace import Trace
from hermes_async.storage.hub import HubOptions

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.engine.running import RunningModel
    from hermes_async.engine.serving import Serving

_log = logging.getLogger("hermes_async")

_IMPORT_TORCH = ("opening", "running", "serving", "forwarding", "embedding", "classification")


def import_torch() -> None:
    """Imports the engine's modules that import torch and transformers, which takes seconds."""
    for name in _IMPORT_TORCH:
        import_module(f"hermes_async.engine.{name}")


@contextlib.asynccontextmanager
async def _closing(opened: OpenedModel) -> AsyncGenerator[None, None]:
    """On a thread, as other processes are told by a file."""
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(opened.close, limiter=anyio.CapacityLimiter(1))


class EngineLifetime:
    """What `Engine` does besides answering calls; its arguments are those of `Engine`.

    All that runs belongs to one task, which entering starts and leaving ends, whichever tasks these are called in.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        memory_budget: int | str = "auto",
        draft_model: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        on_event: Callable[[RequestEvent], None] | None = None,
        trace: str | os.PathLike[str] | Trace | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if config is not None and not isinstance(config, EngineConfig):
            raise ConfigError(f"config must be an EngineConfig, not {type(config).__name__}")
        paths = {"source": source, "draft_model": draft_model, "trace": None if isinstance(trace, Trace) else trace}
        for name, path in paths.items():
            if not isinstance(path, (str, os.PathLike)) and (path is not None or name == "source"):
                raise ConfigError(f"{name} must be a path, not {type(path).__name__}")
        if not isinstance(memory_budget, (int, str)):
            parse_bytes(memory_budget)  # says what is right
        self._source = source
        self._memory_budget = memory_budget
        self._draft_model = draft_model
        self._config = config or EngineConfig()
        self._on_event = on_event
        self._trace = trace
        self._hub = HubOptions(revision, token, cache_dir)
        # All mutable state. `_running` and `_serving` are there once the engine was entered, and stay for their counts.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._scope: anyio.CancelScope | None = None
        self._failure_told = False  # a call has raised it
        self._running: RunningModel | None = None
        self._serving: Serving | None = None
        self._closed = False
        self._failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        if self._task is not None or self._closed:
            raise EngineClosedError("an engine can be entered once; make another one")
        self._loop = asyncio.get_running_loop()
        self._scope, ready = anyio.CancelScope(), anyio.Event()
        self._task = asyncio.create_task(self._own(self._scope, ready), name="hermes engine")
        try:
            await ready.wait()
        except BaseException:
            await self._leave()
            raise
        if self._serving is None:
            self._closed = True
            await self._task  # raises why it did not open
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._check_loop()
        await self._leave()
        if kind is None and self._failure is not None and not self._failure_told:
            raise self._failed()

    async def _leave(self) -> None:
        """Ends the engine's task; a cancellation comes out when that has ended."""
        assert self._task is not None
        assert self._scope is not None
        self._closed = True
        self._scope.cancel()
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not self._task.done():
                try:
                    await asyncio.wait([self._task])
                except asyncio.CancelledError as error:
                    cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _own(self, scope: anyio.CancelScope, ready: anyio.Event) -> None:
        """The engine's task: its task groups are entered and left here, whichever tasks enter and leave the engine."""
        try:
            with scope:
                await self._serve(ready)
        finally:
            ready.set()

    # --- the engine's own task ---

    async def _serve(self, ready: anyio.Event) -> None:
        """Opens the model, then runs sweeps until it is cancelled; whatever ends it, every request is ended."""
        try:
            opened = await anyio.to_thread.run_sync(self._open)
            from hermes_async.engine.running import running_model
            from hermes_async.engine.serving import Serving

            with ungrouped():
                async with (
                    _closing(opened),
                    tracing(self._trace) as trace,
                    running_model(opened, self._config, self._release, trace) as self._running,
                ):
                    try:
                        async with anyio.create_task_group() as tasks:
                            self._serving = Serving(self._running, tasks, self._config, self._on_event)
                            ready.set()
                            if self._memory_budget == "auto":
                                budget, claim = opened.plan.memory_budget, opened.claim
                                most = self._running.bytes_for_everything
                                tasks.start_soon(follow, budget, most, claim, self._serving.resize)
                            try:
                                await self._serving.run_sweeps()
                            finally:
                                tasks.cancel_scope.cancel()
                    except Exception as error:
                        self._failure = first_error(error)
                    finally:
                        self._end_requests()
        except Exception as error:
            if self._serving is None:
                raise
            self._failure = self._failure or error

    def _open(self) -> OpenedModel:
        import_torch()
        from hermes_async.engine.opening import open_model

        with one_checkpoint(self._source):
            return open_model(self._source, self._memory_budget, self._config, self._draft_model, self._hub)

    def _release(self, request: Request) -> None:
        assert self._serving is not None
        self._serving.finish(request)

    def _end_requests(self) -> None:
        self._closed = True
        if self._failure is not None:
            _log.error("the engine stopped", exc_info=self._failure)
        if self._serving is None:
            return
        preparations = self._serving.preparations
        self._failure_told = bool(
            self._serving.requests or self._serving.forwarding.num_under_way or preparations.num_under_way
        )
        self._serving.admission.stop()
        for request in list(self._serving.requests.values()):
            ended = EngineClosedError("the engine was left while the request was running")
            self._serving.finish(request, self._failed() if self._failure is not None else ended)
        ended = EngineClosedError("the engine was left while the forward pass was running")
        self._serving.forwarding.end(self._failed() if self._failure is not None else ended)
        ended = EngineClosedError("the engine was left while the request was prepared")
        preparations.end(self._failed() if self._failure is not None else ended)
        ended = EngineClosedError("the engine was left before it was resized")
        self._serving.end_resizes(self._failed() if self._failure is not None else ended)
        self._serving.admission.close()

    def _check_loop(self) -> None:
        """Raises `EngineError` where a running engine is used from another loop, or from a thread without one."""
        loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):  # so asyncio says that no loop runs here
            loop = asyncio.get_running_loop()
        if not self._closed and self._loop is not None and loop is not self._loop:
            raise EngineError(
                "the engine is used from another event loop or thread than it was entered in; call it there, "
                "with asyncio.run_coroutine_threadsafe from another thread"
            )

    def _model(self) -> Serving:
        self._check_loop()
        if self._failure is not None:
            self._failure_told = True
            raise self._failed()
        if self._closed:
            raise EngineClosedError("the engine was left")
        if self._serving is None:
            raise EngineClosedError("the engine is not entered; use it with `async with`")
        return self._serving

    def _failed(self) -> EngineFailedError:
        error = EngineFailedError(f"the engine stopped: {type(self._failure).__name__}: {self._failure}")
        error.__cause__ = self._failure
        return error
