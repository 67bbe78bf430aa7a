"""An engine in which a scenario is tried again and again, with one fault each time, and what must be left of that."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from transformers import AttentionInterface

from hermes_async import Engine, EngineClosedError, EngineFailedError, HermesError, ReadTimeoutError
from hermes_async.engine.opening import open_model
from tests.engines import greedy_params, settle, tokens, until
from tests.every_failure.points import Fault, Points
from tests.every_failure.scenarios import Scenario
from tests.inside import inside, num_idle_workers

_HANGS_AFTER_S = 120
_NEIGHBOUR = tokens(7, 12)
_NEIGHBOUR_TOKENS = 12
_NEXT = tokens(8, 5)
_NEXT_TOKENS = 3


class BrokenError(Exception):
    """A fault has done more than it may."""


@dataclass(frozen=True)
class State:
    """What an engine and its process hold while nobody asks for anything."""

    leases: dict[str, int]
    waiters: int
    requests: frozenset[str]
    parked: int
    stages: Counter[str]
    tasks: int
    threads: Counter[str]
    files: Counter[str]
    names: frozenset[str]
    memory: Counter[str]
    attention: int

    @classmethod
    def of(cls, engine: Engine, points: Points, root: Path) -> State:
        """The state now."""
        engine.drop_prefixes()
        statistics, within = engine.statistics(), inside(engine)
        held = [stage for stage in within.stages if stage.buffer is not None]
        stages = Counter(f"{stage.state.value}, error {stage.error}" for stage in held)
        threads = Counter(re.sub(r"_?\d+$", "", thread.name) for thread in threading.enumerate())
        threads["worker of hermes_async"] -= num_idle_workers()
        return cls(
            leases=statistics.holders,
            waiters=statistics.num_waiting,
            requests=frozenset(within.request_ids),
            parked=within.num_parking_slots,
            stages=stages,
            tasks=len(asyncio.all_tasks()),
            threads=threads,
            files=Counter(_open_files(root)),
            names=frozenset(str(path) for path in root.rglob("*")),
            memory=Counter(type(each).__name__ for each in points.memory),
            attention=len(AttentionInterface._global_mapping),
        )

    def differs(self, other: State) -> str:
        """What is not the same."""
        names = self.__dataclass_fields__
        return "; ".join(
            f"{name}: {getattr(self, name)} -> {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        )


def _open_files(root: Path) -> list[str]:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(re.sub(r"#\d+", "#", str(fd.readlink())))
        except FileNotFoundError:  # the directory's own
            continue
    return [link for link in links if link.startswith(str(root))]


class Stand:
    """A scenario's engine, with what was true of it before any fault.

    Args:
        root: Has the checkpoint and all files that the scenario makes.
    """

    def __init__(self, scenario: Scenario, engine: Engine, points: Points, root: Path) -> None:
        self.scenario = scenario
        self._engine, self._points, self._root = engine, points, root
        self._complaints: list[str] = []
        # Set by `learn`.
        self._neighbour: tuple[int, ...] = ()
        self._next: tuple[int, ...] = ()
        self._result: Any = None
        self._before: State | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, scenario: Scenario, path: Path, points: Points, root: Path) -> AsyncIterator[Stand]:
        """Opens the engine."""
        budget = scenario.budget or smallest_budget(scenario, path)
        loop = asyncio.get_running_loop()
        loop.set_task_factory(points.new_task)  # type: ignore[arg-type]
        draft_model = path if scenario.drafts else None
        engine = Engine(path, memory_budget=budget, config=scenario.config, draft_model=draft_model)
        async with engine:
            stand = cls(scenario, engine, points, root)
            with stand._listening(loop):
                await stand.learn()
                yield stand

    def _listening(self, loop: asyncio.AbstractEventLoop) -> Any:
        """Complaints that no caller hears: of tasks, callbacks, threads and finalizers."""
        from contextlib import ExitStack

        import pytest

        exits = ExitStack()
        patch = exits.enter_context(pytest.MonkeyPatch.context())
        complain = self._complaints.append
        patch.setattr(sys, "unraisablehook", lambda args: complain(f"unraisable: {args.exc_value!r} in {args.object}"))
        patch.setattr(threading, "excepthook", lambda args: complain(f"{args.thread}: {args.exc_value!r}"))
        loop.set_exception_handler(lambda _, context: complain(f"loop: {context}"))
        exits.callback(loop.set_exception_handler, None)
        return exits

    async def learn(self) -> None:
        engine = self._engine
        self._neighbour = (await engine.complete(_NEIGHBOUR, greedy_params(_NEIGHBOUR_TOKENS))).token_ids
        self._next = (await engine.complete(_NEXT, greedy_params(_NEXT_TOKENS))).token_ids
        self._result = await self.scenario.run(engine)
        await self.scenario.restore(engine)
        await settle(engine)
        gc.collect()
        self._before = State.of(engine, self._points, self._root)

    async def count(self) -> Counter[Any]:
        """How many points of each kind the scenario has when nothing fails."""
        await self.run(None)
        return Counter(self._points.counts)

    async def run(self, fault: Fault | None) -> str | None:
        """Runs the scenario with a fault.

        Returns:
            Where it happened; None if the scenario had ended before.

        Raises:
            BrokenError: More was lost than may be.
        """
        where = await self._run_beside_neighbour(fault)
        rest = asyncio.create_task(self._check_rest())
        await self._within_time([rest], "the next request")
        try:
            rest.result()
        except HermesError as error:
            raise BrokenError(f"the next request: {error!r}") from error
        return where

    async def _run_beside_neighbour(self, fault: Fault | None) -> str | None:
        reached_first = asyncio.Event()
        taken: list[int] = []
        neighbour = asyncio.create_task(self._be_neighbour(taken, reached_first))
        await self._within_time([asyncio.create_task(reached_first.wait())], "the neighbour's first token")
        try:
            task, outcome = await self._run_victim(fault)
            where = self._points.where
            if self._points.outlasted is not None:
                raise BrokenError(f"does not end while this hangs: {self._points.outlasted}")
            self._check_victim(fault, task, outcome, reached=where is not None)
            await self._within_time([neighbour], "the neighbour")
            self._check_neighbour(fault, neighbour.exception(), tuple(taken), reached=where is not None)
        finally:
            neighbour.cancel()
            await asyncio.wait([neighbour], timeout=_HANGS_AFTER_S)
        return where

    async def _run_victim(self, fault: Fault | None) -> tuple[asyncio.Task[None], list[Any]]:
        """The scenario's task, which has ended, and its result, if it has one."""
        scope, outcome = anyio.CancelScope(), list[Any]()
        loop, thread = asyncio.get_running_loop(), threading.get_ident()

        async def victim() -> None:
            try:
                with scope:
                    outcome.append(await self.scenario.run(self._engine))
            finally:
                self._points.disarm()  # at once: what comes later does not happen to the victim

        def cancel(natively: bool) -> None:
            call = task.cancel if natively else scope.cancel
            if threading.get_ident() == thread:
                call()
            else:
                loop.call_soon_threadsafe(call)

        task = asyncio.create_task(victim())
        self._points.arm(fault, cancel)
        await self._within_time([task], "the scenario")
        return task, outcome

    async def _be_neighbour(self, taken: list[int], reached_first: asyncio.Event) -> None:
        try:
            async for chunk in self._engine.generate(_NEIGHBOUR, greedy_params(_NEIGHBOUR_TOKENS)):
                taken.extend(chunk.token_ids)
                reached_first.set()
        finally:
            reached_first.set()

    async def _within_time(self, tasks: list[asyncio.Task[Any]], what: str) -> None:
        _, pending = await asyncio.wait(tasks, timeout=_HANGS_AFTER_S)
        if pending:
            every = "\n    ".join(f"{task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks())
            for task in pending:
                task.cancel()
            raise BrokenError(f"{what} does not end; all tasks:\n    {every}")

    def _check_victim(
        self, fault: Fault | None, task: asyncio.Task[None], outcome: list[Any], *, reached: bool
    ) -> None:
        cancelled = task.cancelled() or (not outcome and task.exception() is None)
        error = None if task.cancelled() else task.exception()
        if outcome and outcome[0] != self._result:
            raise BrokenError(f"the result is {_short(outcome[0])}, not {_short(self._result)}")
        if outcome and not (reached and fault is not None and fault.how == "cancel natively"):
            return
        if not reached or fault is None:
            raise BrokenError(f"without a fault: {error!r}") from error
        if fault.how.startswith("cancel"):
            if not cancelled:
                raise BrokenError(f"a cancelled call ends with {_short(outcome or error)}") from error
        elif not _may_raise(fault, error) or (fault.kind == "write" and fault.how != "hangs"):
            raise BrokenError(f"ends with {error!r}") from error

    def _check_neighbour(
        self, fault: Fault | None, error: BaseException | None, taken: tuple[int, ...], *, reached: bool
    ) -> None:
        if taken != self._neighbour[: len(taken)]:
            raise BrokenError(f"the neighbour's tokens are {taken}, not {self._neighbour}")
        if len(taken) == len(self._neighbour) and error is None:
            return
        # What fails in a sweep ends all requests of it.
        from_write = fault is not None and fault.kind == "write" and fault.how != "hangs"
        if not reached or fault is None or from_write or not _may_raise(fault, error):
            raise BrokenError(f"the neighbour ended after {len(taken)} tokens: {error!r}") from error

    async def _check_rest(self) -> None:
        """The engine is as it was before, and the next request works."""
        engine = self._engine
        await self.scenario.restore(engine)
        following = await engine.complete(_NEXT, greedy_params(_NEXT_TOKENS))
        if following.token_ids != self._next:
            raise BrokenError(f"the next request's tokens are {following.token_ids}, not {self._next}")
        del following
        await self._check_nothing_is_left()
        if self._complaints:
            complaints = "\n    ".join(self._complaints)
            self._complaints.clear()
            raise BrokenError(f"complaints that nobody hears:\n    {complaints}")

    async def _check_nothing_is_left(self) -> None:
        """Waits until all is as before."""
        assert self._before is not None
        difference = ""
        for attempt in range(200):
            await until(lambda: not inside(self._engine).is_loading)
            difference = self._before.differs(self._without_this_task(State.of(self._engine, self._points, self._root)))
            if not difference:
                return
            if attempt % 20 == 5:
                gc.collect()
            await anyio.sleep(0.01)
        raise BrokenError(f"is left: {difference}")

    def _without_this_task(self, state: State) -> State:
        from dataclasses import replace

        return replace(state, tasks=state.tasks - 1)


def _may_raise(fault: Fault, error: BaseException | None) -> bool:
    """Whether an error is one of ours that a call may end with, while the engine goes on."""
    ends_engine = isinstance(error, EngineFailedError | EngineClosedError)
    if fault.how == "hangs":
        return isinstance(error, ReadTimeoutError)
    return fault.how in ("fails", "finds the end") and isinstance(error, HermesError) and not ends_engine


def _short(value: Any) -> str:
    return repr(value)[:200]


def smallest_budget(scenario: Scenario, path: Path) -> int:
    """With which the scenario's model can be opened."""
    opened = open_model(path, 1 << 26, scenario.config)
    opened.close()
    return opened.plan.minimum_budget
