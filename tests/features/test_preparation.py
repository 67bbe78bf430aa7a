"""How prompts are prepared: beside each other, under their own deadlines, on threads of the engine's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from hermes_async import (
    Completion,
    DeadlineExceededError,
    EngineClosedError,
    QueueFullError,
    RequestError,
    RequestEvent,
)
from hermes_async.engine import streaming
from tests.cli.forked import ForkedCommands
from tests.engines import check_nothing_is_left, open_engine, until
from tests.inside import inside

pytestmark = pytest.mark.anyio

PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> Iterator[threading.Event]:
    """Prompts of 12 tokens are not prepared before the event is set."""
    let_go, works = threading.Event(), streaming.prepare

    def prepare(opened: Any, prompt: Any, *args: Any, **options: Any) -> Any:
        if len(prompt.token_ids) == 12:
            assert let_go.wait(60)
        return works(opened, prompt, *args, **options)

    monkeypatch.setattr(streaming, "prepare", prepare)
    yield let_go
    let_go.set()


async def test_a_request_does_not_wait_for_the_preparation_of_another(tiny_model: Any, held: threading.Event) -> None:
    async with open_engine(tiny_model) as engine, anyio.create_task_group() as group:
        group.start_soon(engine.complete, tiny_model.prompts[2], tiny_model.params)
        await anyio.lowlevel.checkpoint()
        with anyio.fail_after(30):
            completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        held.set()


async def test_a_deadline_holds_while_the_prompt_is_prepared(tiny_model: Any, held: threading.Event) -> None:
    async with open_engine(tiny_model) as engine:
        with anyio.fail_after(30), pytest.raises(DeadlineExceededError, match="tokenized"):
            await engine.complete(tiny_model.prompts[2], tiny_model.params, deadline=anyio.current_time() + 0.05)
        held.set()
        await check_nothing_is_left(engine)


async def test_a_cancellation_holds_while_the_prompt_is_prepared(tiny_model: Any, held: threading.Event) -> None:
    async with open_engine(tiny_model) as engine:
        with anyio.fail_after(30), anyio.move_on_after(0.05) as scope:
            await engine.complete(tiny_model.prompts[2], tiny_model.params)
        assert scope.cancelled_caught
        held.set()
        await check_nothing_is_left(engine)


async def test_busy_threads_of_the_application_do_not_delay_a_prompt(tiny_model: Any) -> None:
    let_go = threading.Event()
    async with open_engine(tiny_model) as engine, anyio.create_task_group() as group:
        limiter = anyio.to_thread.current_default_thread_limiter()
        for _ in range(int(limiter.total_tokens)):
            group.start_soon(anyio.to_thread.run_sync, let_go.wait, 60)
        try:
            while limiter.available_tokens:
                await anyio.lowlevel.checkpoint()
            with anyio.fail_after(30):
                completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
            assert completion.token_ids == tiny_model.references[1]
        finally:
            let_go.set()


async def test_a_panic_of_the_tokenizer_is_an_error_of_its_request(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panics(*args: Any, **options: Any) -> Any:
        raise PanicException("retry limit in match over")

    async with open_engine(tiny_model) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "prepare", panics)
            with pytest.raises(RequestError, match="retry limit in match over"):
                await engine.complete("w5", tiny_model.params)
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]


async def test_an_abort_holds_while_the_prompt_is_prepared(tiny_model: Any, held: threading.Event) -> None:
    async with open_engine(tiny_model) as engine:
        completions: list[Completion] = []

        async def complete() -> None:
            completions.append(await engine.complete(tiny_model.prompts[2], tiny_model.params, request_id="long"))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(complete)
                await until(lambda: engine.statistics().num_waiting == 1)
                with pytest.raises(RequestError, match="in use"):
                    await engine.complete([5], tiny_model.params, request_id="long")
                assert await engine.abort("long")
                assert not await engine.abort("long")
                # Its name is free at once.
                again = await engine.complete(tiny_model.prompts[1], tiny_model.params, request_id="long")
                assert again.token_ids == tiny_model.references[1]
        assert [(c.finish_reason, c.token_ids, c.request_id) for c in completions] == [("abort", (), "long")]
        assert not held.is_set()
        await check_nothing_is_left(engine)


async def test_a_turn_is_aborted_while_it_is_prepared(tiny_model: Any, held: threading.Event) -> None:
    async with open_engine(tiny_model) as engine:
        chat = engine.session()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(chat.complete, tiny_model.prompts[2], tiny_model.params)
                await until(lambda: engine.statistics().num_waiting == 1)
                await chat.aclose()
        await check_nothing_is_left(engine)


async def test_requests_count_as_waiting_from_the_call_on(tiny_model: Any, held: threading.Event) -> None:
    events: list[RequestEvent] = []
    async with open_engine(tiny_model, events.append, max_sequences=1, max_waiting=2) as engine:
        completions: list[Completion] = []

        async def complete() -> None:
            completions.append(await engine.complete(tiny_model.prompts[2], tiny_model.params))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for num_waiting in (1, 2, 3):  # there is a place for one of them, so that two wait
                    group.start_soon(complete)
                    await until(lambda count=num_waiting: engine.statistics().num_waiting == count)  # type: ignore[misc]
                with pytest.raises(QueueFullError, match="max_waiting=2"):
                    await engine.complete(tiny_model.prompts[1], tiny_model.params, request_id="refused")
                assert [(e.kind, e.request_id, type(e.error)) for e in events] == [
                    ("queued", "refused", type(None)), ("finished", "refused", QueueFullError)
                ]  # fmt: skip
                held.set()
        assert [completion.token_ids for completion in completions] == [tiny_model.references[2]] * 3
        await check_nothing_is_left(engine)


async def test_leaving_the_engine_ends_what_is_prepared(tiny_model: Any, held: threading.Event) -> None:
    errors: list[EngineClosedError] = []

    async def told(call: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(EngineClosedError) as caught:
            await call(*args)
        errors.append(caught.value)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group, open_engine(tiny_model) as engine:
            group.start_soon(told, engine.complete, tiny_model.prompts[2], tiny_model.params)
            await until(lambda: engine.statistics().num_waiting == 1)
    assert len(errors) == 1
    assert not held.is_set()


async def test_preparations_that_were_left_keep_their_places(tiny_model: Any, held: threading.Event) -> None:
    async with open_engine(tiny_model) as engine:
        inside(engine).limit_preparations(2)
        with anyio.fail_after(60):
            for _ in range(2):
                async with anyio.create_task_group() as group:
                    group.start_soon(engine.complete, tiny_model.prompts[2], tiny_model.params)
                    await until(lambda: engine.statistics().num_waiting == 1)
                    group.cancel_scope.cancel()
            # Both threads are still at work: another prompt waits for one of them, and its deadline holds.
            with pytest.raises(DeadlineExceededError):
                await engine.complete(tiny_model.prompts[1], tiny_model.params, deadline=anyio.current_time() + 0.05)
            assert inside(engine).num_preparing == 2
            held.set()
            completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        await until(lambda: inside(engine).num_preparing == 0)


def test_a_preparation_that_was_left_does_not_keep_the_interpreter(tiny_model: Any, forked: ForkedCommands) -> None:
    program = f"""
import anyio, threading
from hermes_async import Engine
from hermes_async.engine import streaming

never = threading.Event()
begun = threading.Event()

def prepare(*args, **options):
    begun.set()
    never.wait()

streaming.prepare = prepare

async def main():
    async with Engine({str(tiny_model.path)!r}, memory_budget="8MiB") as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(engine.complete, [5])
            while not begun.is_set():
                await anyio.sleep(0.002)
            group.cancel_scope.cancel()
    print("left")

anyio.run(main)
"""
    with forked.start(code=program) as process:
        output, errors = process.communicate()
    assert (output, process.returncode) == (b"left\n", 0), errors.decode()


@pytest.mark.parametrize("request_id", [5, ["a"], b"a"])
async def test_a_name_that_is_no_text_is_refused(tiny_model: Any, request_id: Any) -> None:
    async with open_engine(tiny_model) as engine:
        with pytest.raises(RequestError, match="request_id"):
            await engine.complete([5], tiny_model.params, request_id=request_id)
        assert not await engine.abort(request_id)
