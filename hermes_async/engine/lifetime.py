"""An engine's lifetime: entering opens the model, a task runs the sweeps, leaving ends everything."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from hermes_async.config import EngineConfig, format_bytes, parse_bytes
from hermes_async.engine.trace_file import tracing
from hermes_async.errors import ConfigError, EngineClosedError, EngineError, EngineFailedError
from hermes_async.foreign_errors import all_errors, first_error, one_checkpoint
from hermes_async.memory.automatic_budget import follow
from hermes_async.pipeload.trace import Trace
from hermes_async.results import RequestEvent
from hermes_async.storage.hub import HubOptions
from hermes_async.storage.opening_watch import OpeningWatch
from hermes_async.storage.threads import run_in_thread

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.serving.loaded_model import LoadedModel
    from hermes_async.serving.loop import ServingLoop

_log = logging.getLogger("hermes_async")

_IMPORT_TORCH = ("engine.opening", "engine.embedding", "engine.classification", "serving.loaded_model", "serving.loop")


def import_torch() -> None:
    """Imports the engine's modules that import torch and transformers, which takes seconds."""
    for name in _IMPORT_TORCH:
        import_module(f"hermes_async.{name}")


@contextlib.asynccontextmanager
async def _closed_in_thread() -> AsyncGenerator[contextlib.ExitStack, None]:
    """An exit stack that is closed on a thread, because closing a model closes files."""
    exits = contextlib.ExitStack()
    try:
        yield exits
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_thread(exits.close)


class EngineState(enum.Enum):
    """Where an engine is. `EngineLifetime._enter` makes every transition.

    The usual order is NEW, OPENING, OPEN, CLOSED. FAILED: it stopped because of an error, which is in `_failure`.
    """

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"
    FAILED = "failed"


_TRANSITIONS = {
    EngineState.NEW: {EngineState.OPENING},
    EngineState.OPENING: {EngineState.OPEN, EngineState.CLOSED},
    EngineState.OPEN: {EngineState.CLOSED, EngineState.FAILED},
    EngineState.CLOSED: {EngineState.CLOSED, EngineState.FAILED},  # FAILED: an error came while it was closed
    EngineState.FAILED: {EngineState.FAILED},
}


@dataclass(slots=True)
class _Failure:
    """Why the engine stopped, or could not be closed.

    Attributes:
        error: The first error; it has notes of the later ones.
        raised: A user's call has raised it.
    """

    error: BaseException
    raised: bool = False


class EngineLifetime:
    """Opens, runs and closes the engine. Its arguments are those of `Engine`.

    Everything runs in one task of its own. Any task of the user may enter or leave the engine.
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
            parse_bytes(memory_budget)  # raises
        self._source = source
        self._memory_budget = memory_budget
        self._draft_model = draft_model
        self._config = config or EngineConfig()
        self._on_event = on_event
        self._trace = trace
        self._hub = HubOptions(revision, token, cache_dir)
        # All mutable state. `_task` runs the engine in `_scope`, on `_loop` and `_thread`. `_context` is a copy of the
        # context of the task that entered; that of another thread may not know which event loop library runs. `_opened`
        # and `_serving` are set once the engine is open, and stay for statistics. `_body` is the task that entered the
        # engine, and `_body_cancelled` says that a failure has cancelled it. `_num_calls` users' calls are under way.
        self._state = EngineState.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._context = contextvars.Context()
        self._body: asyncio.Task[Any] | None = None
        self._body_cancelled = False
        self._task: asyncio.Task[None] | None = None
        self._scope: anyio.CancelScope | None = None
        self._opened: OpenedModel | None = None
        self._serving: ServingLoop | None = None
        self._num_calls = 0
        self._failure: _Failure | None = None

    def _enter(self, state: EngineState) -> None:
        assert state in _TRANSITIONS[self._state], f"{self._state} -> {state}"
        self._state = state

    @property
    def _closed(self) -> bool:
        return self._state in (EngineState.CLOSED, EngineState.FAILED)

    async def __aenter__(self) -> Self:
        if self._state is not EngineState.NEW:
            raise EngineClosedError("an engine can be entered once; make another one")
        self._enter(EngineState.OPENING)
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._context = contextvars.copy_context()
        self._scope, ready = anyio.CancelScope(), anyio.Event()
        self._task = asyncio.create_task(self._own(self._scope, ready), name="hermes engine")
        try:
            await ready.wait()
        except BaseException:
            await self._leave()
            raise
        if self._serving is None:
            self._enter(EngineState.CLOSED)
            await self._task  # raises the error of opening
        self._body = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._check_loop()
        body, cancelled_by_engine = self._body, False
        if self._body_cancelled and body is not None and body is asyncio.current_task():
            self._body_cancelled = False
            cancelled_by_engine = body.uncancel() == 0  # not 0: it was cancelled from elsewhere too
        try:
            await self._leave()
        except asyncio.CancelledError:
            if not cancelled_by_engine:
                raise
        body_failed = kind is not None and not (cancelled_by_engine and issubclass(kind, asyncio.CancelledError))
        if not body_failed and self._failure is not None and not self._failure.raised:
            raise self._failed() from self._failure.error

    async def _leave(self) -> None:
        """Ends the engine's task and waits for it. Raises a cancellation only then."""
        self._body = None
        if self._task is None or self._scope is None:
            raise EngineClosedError("the engine was never entered")
        if not self._closed:
            self._enter(EngineState.CLOSED)
        self._scope.cancel()
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not self._task.done():
                try:
                    await asyncio.wait([self._task])
                except asyncio.CancelledError as error:
                    cancelled = error
        if not self._task.cancelled():
            self._task.exception()  # marks the error of opening as retrieved
        if cancelled is not None:
            raise cancelled

    async def _own(self, scope: anyio.CancelScope, ready: anyio.Event) -> None:
        """Runs as the engine's task, which enters and leaves all task groups."""
        try:
            with scope:
                await self._serve(ready)
        finally:
            ready.set()
            if self._serving is not None:
                num_sweeps, num_tokens = self._serving.loaded.pipeline.statistics.sweeps, self._serving.num_tokens
                _log.info("engine closed after %d sweeps, in which it generated %d tokens", num_sweeps, num_tokens)

    # --- the engine's own task ---

    async def _serve(self, ready: anyio.Event) -> None:
        """Opens the model, then runs sweeps until it is cancelled or fails. In the end it ends every request."""
        started_at = time.perf_counter()
        try:
            async with _closed_in_thread() as exits:
                opened = self._opened = await self._opened_in_thread(exits)
                from hermes_async.serving.loaded_model import loaded_model

                async with tracing(self._trace) as trace, loaded_model(opened, self._config, trace) as loaded:
                    try:
                        await self._run(loaded, ready, started_at)
                    except Exception as error:
                        self._fail(error, "the engine stopped")
                    finally:
                        if loaded.pipeline.failure is not None:
                            self._fail(loaded.pipeline.failure, "the engine stopped")
                        self._end()
        except Exception as error:
            if self._serving is None:
                first = first_error(error)
                raise first from first.__cause__
            self._fail(error, "the engine could not be closed properly")

    async def _opened_in_thread(self, exits: contextlib.ExitStack) -> OpenedModel:
        """The model before its weights are read. Cancellation, or a disk that hangs: its thread closes `exits`."""
        await run_in_thread(import_torch, when_given_up=lambda: None)
        watch = OpeningWatch(Path(self._source), self._config.read_timeout)
        return await watch.in_time(run_in_thread(watch.run, partial(self._open, exits), when_given_up=exits.close))

    def _open(self, exits: contextlib.ExitStack) -> OpenedModel:
        from hermes_async.engine.opening import open_model

        with one_checkpoint(self._source):
            opened = open_model(self._source, self._memory_budget, self._config, self._draft_model, self._hub)
        exits.callback(opened.close)
        return opened

    async def _run(self, loaded: LoadedModel, ready: anyio.Event, started_at: float) -> None:
        """Serves requests until the task is cancelled or fails."""
        from hermes_async.serving.loop import ServingLoop

        async with anyio.create_task_group() as tasks:
            self._serving = ServingLoop(loaded, tasks, self._config, self._on_event)
            if self._state is EngineState.OPENING:  # else the user has left it meanwhile
                self._enter(EngineState.OPEN)
            ready.set()
            plan = loaded.planned.plan
            _log.info(
                "engine opened in %(seconds).2f s: %(source)s, %(weights)s of weights in %(stages)d stages, "
                "%(resident)d of them resident, in a budget of %(budget)s",
                {
                    "seconds": time.perf_counter() - started_at,
                    "source": self._source,
                    "weights": format_bytes(plan.weight_bytes),
                    "stages": len(plan.stages),
                    "resident": len(plan.resident),
                    "budget": format_bytes(plan.memory_budget),
                },
            )
            if self._memory_budget == "auto":
                planned = loaded.planned
                budget, most = planned.plan.memory_budget, loaded.bytes_for_everything
                tasks.start_soon(follow, budget, most, planned.claim, self._serving.resize)
            try:
                await self._serving.run()
            finally:
                tasks.cancel_scope.cancel()

    def _fail(self, error: Exception, what: str) -> None:
        """Logs each error of `error`, which may be a group. The first one of the engine becomes its failure."""
        for each in all_errors(error):
            if self._failure is not None and each is self._failure.error:
                continue  # the pipeline raises it too
            _log.error("%s: %s: %s", what, type(each).__name__, each, exc_info=each)
            if self._failure is None:
                self._failure = _Failure(each)
                self._enter(EngineState.FAILED)
            else:
                self._failure.error.add_note(f"and then {what}: {type(each).__name__}: {each}")

    def _end(self) -> None:
        """Ends all requests and passes. After a failure that no call can raise, cancels the task that entered."""
        if not self._closed:
            self._enter(EngineState.CLOSED)
        if self._serving is None:
            return
        if self._failure is not None and self._body is not None and not self._num_calls:
            self._body_cancelled = self._body.cancel("the engine stopped")
        self._serving.end(self._end_error)

    def _end_error(self, while_what: str) -> EngineError:
        """The error of a call that was under way when the engine ended."""
        if self._failure is not None:
            return self._failed()
        return EngineClosedError(f"the engine was left {while_what}")

    def _check_loop(self) -> None:
        """Raises `EngineError` if a running engine is used from another loop or thread."""
        loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):  # raised if no loop runs here
            loop = asyncio.get_running_loop()
        here = loop is self._loop or (loop is None and threading.get_ident() == self._thread)
        if not self._closed and self._loop is not None and not here:
            raise EngineError(
                "the engine is used from another event loop or thread than it was entered in; call it there, "
                "with asyncio.run_coroutine_threadsafe from another thread"
            )

    def _model(self) -> ServingLoop:
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
        """Counts a user's call, and notes if it raises the engine's failure."""
        self._num_calls += 1
        try:
            yield
        except EngineFailedError:
            if self._failure is not None:
                self._failure.raised = True
            raise
        finally:
            self._num_calls -= 1

    def _failed(self) -> EngineFailedError:
        assert self._failure is not None
        cause = self._failure.error
        error = EngineFailedError(f"the engine stopped: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error
