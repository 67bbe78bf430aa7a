"""How prompts are prepared: beside each other, under their own deadlines, on threads of the engine's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from hermes_async import DeadlineExceededError, RequestError
from hermes_async.engine import engine as engine_module
from tests.engines import check_nothing_is_left, one_loop, open_engine

pytestmark = pytest.mark.anyio
anyio_backend = one_loop(use_uvloop=False)

PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> Iterator[threading.Event]:
    """Prompts of 12 tokens are not prepared before the event is set."""
    let_go, works = threading.Event(), engine_module.prepare

    def prepare(opened: Any, token_ids: list[int], *args: Any, **options: Any) -> Any:
        if len(token_ids) == 12:
            assert let_go.wait(60)
        return works(opened, token_ids, *args, **options)

    monkeypatch.setattr(engine_module, "prepare", prepare)
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
            patch.setattr(engine_module, "prepare", panics)
            with pytest.raises(RequestError, match="retry limit in match over"):
                await engine.complete("w5", tiny_model.params)
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]
