"""An engine's life: it is entered, opens its model, runs sweeps in a task of its own, and is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from hermes_async.config import EngineConfig, parse_bytes
from hermes_async.engine.trace_file import tracing
from hermes_async.errors import ConfigError, EngineClosedError, EngineError, EngineFailedError
from hermes_async.foreign_errors import all_errors, first_error, one_checkpoint
from hermes_async.memory.automatic_budget import follow
from hermes_async.pipeload.trace import Trace
from hermes_async.results import RequestEvent
from hermes_async.serving.request import Request
from hermes_async.storage.hub import HubOptions
from hermes_async.storage.threads import run_in_thread

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.serving.loaded_model import LoadedModel
    from hermes_async.serving.loop import Serving

_log = logging.getLogger("hermes_async")

_IMPORT_TORCH = ("engine.opening", "engine.embedding", "engine.classification", "serving.loaded_model", "serving.loop")


def import_torch() -> None:
    """Imports the engine's modules that import torch and transformers, which takes seconds."""
    for name in _IMPORT_TORCH:
        import_module(f"hermes_async.{name}")


@contextlib.asynccontextmanager
async def _closed_in_thread() -> AsyncGenerator[contextlib.ExitStack, None]:
    """What is closed in the end on a thread: closing a model closes files."""
    exits = contextlib.ExitStack()
    try:
        yield exits
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_thread(exits.close)


@dataclass(slots=True)
class _Failure:
    """Why the engine stopped by itself, or could not be closed.

    Attributes:
        error: The first one; it has notes of those that came while the engine was closed.
        told: A call has raised it, or leaving the engine has.
    """

    error: BaseException
    told: bool = False


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
        # `_body` is the task that entered it, and `_body_cancelled` whether it was cancelled because of a failure.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._body: asyncio.Task[Any] | None = None
        self._body_cancelled = False
        self._task: asyncio.Task[None] | None = None
        self._scope: anyio.CancelScope | None = None
        self._opened: OpenedModel | None = None
        self._running: LoadedModel | None = None
        self._serving: Serving | None = None
        self._closed = False
        self._num_calls = 0
        self._failure: _Failure | None = None

    async def __aenter__(self) -> Self:
        if self._task is not None or self._closed:
            raise EngineClosedError("an engine can be entered once; make another one")
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
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
        self._body = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._check_loop()
        body, ended_by_us = self._body, False
        if self._body_cancelled and body is not None and body is asyncio.current_task():
            self._body_cancelled = False
            ended_by_us = body.uncancel() == 0  # else somebody else has cancelled it too
        try:
            await self._leave()
        except asyncio.CancelledError:
            if not ended_by_us:
                raise
        body_failed = kind is not None and not (ended_by_us and issubclass(kind, asyncio.CancelledError))
        if not body_failed and self._failure is not None and not self._failure.told:
            raise self._failed() from self._failure.error

    async def _leave(self) -> None:
        """Ends the engine's task; a cancellation comes out when that has ended."""
        self._body = None
        if self._task is None or self._scope is None:
            raise EngineClosedError("the engine was never entered")
        self._closed = True
        self._scope.cancel()
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not self._task.done():
                try:
                    await asyncio.wait([self._task])
                except asyncio.CancelledError as error:
                    cancelled = error
        if not self._task.cancelled():
            self._task.exception()  # why it did not open, which nobody waits for any more
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
            async with _closed_in_thread() as exits:
                opened = self._opened = await run_in_thread(self._open, exits)
                from hermes_async.serving.loaded_model import loaded_model
                from hermes_async.serving.loop import Serving

                async with (
                    tracing(self._trace) as trace,
                    loaded_model(opened, self._config, self._release, trace) as self._running,
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
                        self._fail(error, "the engine stopped")
                    finally:
                        if self._running.pipeline.failure is not None:
                            self._fail(self._running.pipeline.failure, "the engine stopped")
                        self._end_requests()
        except Exception as error:
            if self._serving is None:
                first = first_error(error)
                raise first from first.__cause__
            self._fail(error, "the engine could not be closed as it should be")

    def _open(self, exits: contextlib.ExitStack) -> OpenedModel:
        import_torch()
        from hermes_async.engine.opening import open_model

        with one_checkpoint(self._source):
            opened = open_model(self._source, self._memory_budget, self._config, self._draft_model, self._hub)
        exits.callback(opened.close)
        return opened

    def _release(self, request: Request) -> None:
        assert self._serving is not None
        self._serving.finish(request)

    def _fail(self, error: Exception, what: str) -> None:
        """Logs each error of `error`, which may be a group; the first that there ever was is the failure."""
        for each in all_errors(error):
            if self._failure is not None and each is self._failure.error:
                continue  # it ends the pipeline too
            _log.error("%s: %s: %s", what, type(each).__name__, each, exc_info=each)
            if self._failure is None:
                self._failure = _Failure(each)
            else:
                self._failure.error.add_note(f"and then {what}: {type(each).__name__}: {each}")

    def _end_requests(self) -> None:
        self._closed = True
        if self._serving is None:
            return
        self._serving.admission.stop()
        if self._failure is not None and self._body is not None and not self._num_calls:
            # No call would tell of it, however long the body goes on.
            self._body_cancelled = self._body.cancel("the engine stopped")
        for request in list(self._serving.requests.values()):
            ended = EngineClosedError("the engine was left while the request was running")
            self._serving.finish(request, self._failed() if self._failure is not None else ended)
        ended = EngineClosedError("the engine was left while the forward pass was running")
        self._serving.forwarding.end(self._failed() if self._failure is not None else ended)
        ended = EngineClosedError("the engine was left while the request was prepared")
        self._serving.preparations.end(self._failed() if self._failure is not None else ended)
        ended = EngineClosedError("the engine was left before it was resized")
        self._serving.end_resizes(self._failed() if self._failure is not None else ended)
        self._serving.admission.close()

    def _check_loop(self) -> None:
        """Raises `EngineError` where a running engine is used from another loop or thread."""
        loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):  # so asyncio says that no loop runs here
            loop = asyncio.get_running_loop()
        here = loop is self._loop or (loop is None and threading.get_ident() == self._thread)
        if not self._closed and self._loop is not None and not here:
            raise EngineError(
                "the engine is used from another event loop or thread than it was entered in; call it there, "
                "with asyncio.run_coroutine_threadsafe from another thread"
            )

    def _model(self) -> Serving:
        self._check_loop()
        if self._failure is not None:
            raise self._failed()
        if self._closed:
            raise EngineClosedError("the engine was left")
        if self._serving is None:
            raise EngineClosedError("the engine is not entered; use it with `async with`")
        return self._serving

    def _opened_model(self) -> OpenedModel:
        assert self._opened is not None
        return self._opened

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """A call of a user, who is told where it raises the engine's failure."""
        self._num_calls += 1
        try:
            yield
        except EngineFailedError:
            if self._failure is not None:
                self._failure.told = True
            raise
        finally:
            self._num_calls -= 1

    def _failed(self) -> EngineFailedError:
        assert self._failure is not None
        cause = self._failure.error
        error = EngineFailedError(f"the engine stopped: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error
