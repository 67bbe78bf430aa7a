"""An engine that fails by itself: somebody is told, once, and what is logged says why."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from hermes_async import Engine, EngineClosedError, EngineFailedError, RequestEvent
from hermes_async.engine.opening import OpenedModel
from tests.engines import both_loops, open_engine, until
from tests.faults.test_leaving import Left
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


async def test_a_body_under_way_is_told_where_no_call_is(tiny_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    left = Left()
    failure = ZeroDivisionError("while nobody called")
    with anyio.fail_after(30), pytest.raises(EngineFailedError, match="while nobody called") as caught:
        async with open_engine(tiny_model) as engine:
            inside(engine).fail(failure)
            await anyio.sleep_forever()
    assert caught.value.__cause__ is failure
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "hermes_async"
    assert "while nobody called" in record.getMessage()
    assert record.exc_info is not None
    left.check_nothing()
    await anyio.lowlevel.checkpoint()  # the task is not cancelled any more
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_body_that_was_cancelled_too_stays_cancelled(tiny_model: Any) -> None:
    with anyio.CancelScope() as scope:
        async with open_engine(tiny_model) as engine:
            inside(engine).fail(ZeroDivisionError("while nobody called"))
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_an_unseen_failure_comes_out_of_leaving_in_another_task(tiny_model: Any) -> None:
    engine = open_engine(tiny_model)
    await asyncio.create_task(engine.__aenter__())
    inside(engine).fail(ZeroDivisionError("while nobody called"))
    await until(lambda: inside(engine).has_stopped)
    with pytest.raises(EngineFailedError, match="while nobody called"):
        await asyncio.create_task(engine.__aexit__(None, None, None))


async def test_a_failure_that_a_call_has_raised_is_not_raised_twice(tiny_model: Any) -> None:
    def on_event(event: RequestEvent) -> None:
        if event.kind == "admitted":
            raise ZeroDivisionError("in the listener")

    async with open_engine(tiny_model, on_event) as engine:
        with pytest.raises(EngineFailedError, match="in the listener"):
            await engine.complete(tiny_model.prompts[1], tiny_model.params)
    engine = open_engine(tiny_model)
    await asyncio.create_task(engine.__aenter__())
    inside(engine).fail(ZeroDivisionError("while nobody called"))
    await until(lambda: inside(engine).has_stopped)
    with pytest.raises(EngineFailedError, match="while nobody called"):
        await engine.resize("16MiB")
    await engine.__aexit__(None, None, None)


async def test_a_kept_iterator_that_nobody_reads_has_told_nobody(tiny_model: Any) -> None:
    engine = open_engine(tiny_model)
    await asyncio.create_task(engine.__aenter__())
    chunks = engine.generate(tiny_model.prompts[1], tiny_model.params)
    await anext(chunks)
    inside(engine).fail(ZeroDivisionError("while nobody looked"))
    await until(lambda: inside(engine).has_stopped)
    with pytest.raises(EngineFailedError, match="while nobody looked"):
        await engine.__aexit__(None, None, None)
    with pytest.raises(EngineFailedError, match="while nobody looked"):
        async for _ in chunks:
            pass


@pytest.fixture
def failing_close(monkeypatch: pytest.MonkeyPatch) -> OSError:
    """What closing an engine raises at its end."""
    failure, close = OSError("while it was closed"), OpenedModel.close

    def failing(opened: OpenedModel) -> None:
        close(opened)
        raise failure

    monkeypatch.setattr(OpenedModel, "close", failing)
    return failure


async def test_failures_while_closing_are_logged_and_raised(
    tiny_model: Any, caplog: pytest.LogCaptureFixture, failing_close: OSError
) -> None:
    failure = ZeroDivisionError("while nobody called")
    engine = open_engine(tiny_model)
    await asyncio.create_task(engine.__aenter__())
    inside(engine).fail(failure)
    await until(lambda: inside(engine).has_stopped)
    with pytest.raises(EngineFailedError, match="while nobody called") as caught:
        await engine.__aexit__(None, None, None)
    assert caught.value.__cause__ is failure
    assert any("while it was closed" in note for note in failure.__notes__)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2
    assert "while nobody called" in messages[0]
    assert "while it was closed" in messages[1]


async def test_a_failure_while_closing_alone(
    tiny_model: Any, caplog: pytest.LogCaptureFixture, failing_close: OSError
) -> None:
    with pytest.raises(EngineFailedError, match="while it was closed") as caught:
        async with open_engine(tiny_model):
            pass
    assert caught.value.__cause__ is failing_close
    assert "while it was closed" in caplog.text


async def test_a_body_s_own_error_comes_out_before_one_of_closing(
    tiny_model: Any, caplog: pytest.LogCaptureFixture, failing_close: OSError
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_engine(tiny_model):
            raise ZeroDivisionError
    assert "while it was closed" in caplog.text


async def test_left_without_having_been_entered(tiny_model: Any) -> None:
    with pytest.raises(EngineClosedError, match="never entered"):
        await open_engine(tiny_model).__aexit__(None, None, None)


@pytest.mark.parametrize("native", [False, True])
async def test_cancelled_while_it_is_entered_nothing_is_left(tiny_model: Any, native: bool) -> None:
    """After each number of turns of the loop that entering takes."""
    async with open_engine(tiny_model):
        pass  # what is made once is there
    left = Left()
    turns, entered = 0, False
    while not entered:
        engine, scope, entered_engines = open_engine(tiny_model), anyio.CancelScope(), list[Engine]()

        async def enter(
            engine: Engine = engine, scope: anyio.CancelScope = scope, entered: list[Engine] = entered_engines
        ) -> None:
            with scope:
                await engine.__aenter__()
                entered.append(engine)

        task = asyncio.create_task(enter())
        for _ in range(turns):
            await until_turn(engine)
        if native:
            task.cancel()
        else:
            scope.cancel()
        await asyncio.wait([task])
        entered = bool(entered_engines)
        if entered:
            await engine.__aexit__(None, None, None)
        else:
            assert inside(engine).task is None or inside(engine).has_stopped
        del task, engine, enter, entered_engines
        left.check_nothing()
        turns += 1
    assert turns > 3


async def until_turn(engine: Engine) -> None:
    """A turn in which the engine's task can have gone on: while a thread works for it, nothing does."""
    before = where(engine)
    await asyncio.sleep(0)
    with anyio.move_on_after(5):
        while where(engine) == before and not inside(engine).has_stopped:
            await asyncio.sleep(0.001)
            if inside(engine).is_open:
                return


def where(engine: Engine) -> Any:
    """What the engine's task awaits."""
    task = inside(engine).task
    waits: Any = None if task is None else task.get_coro()
    path = []
    while waits is not None:
        frame = getattr(waits, "cr_frame", None) or getattr(waits, "ag_frame", None)
        path.append(None if frame is None else (id(frame), frame.f_lasti))
        waits = getattr(waits, "cr_await", None) or getattr(waits, "ag_await", None)
    return path


@pytest.mark.parametrize("agent", ["hermes-loading-agent", "hermes-row-reader"])
async def test_what_ends_an_agent_is_told_as_the_failure(
    tiny_model: Any, disk: Any, caplog: pytest.LogCaptureFixture, agent: str
) -> None:
    """An error that is none of reading: callers learn it, and not that the engine was left."""
    failure = ZeroDivisionError("in an agent")

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if agent in threading.current_thread().name:
            raise failure
        return read()

    async with open_engine(tiny_model) as engine:
        disk.on_read = on_read
        with pytest.raises(EngineFailedError, match="in an agent") as caught:
            await engine.complete(tiny_model.prompts[1], tiny_model.params)
    assert caught.value.__cause__ is failure
    assert [record.exc_info[1] for record in caplog.records if record.levelno == logging.ERROR] == [failure]  # type: ignore[index]
