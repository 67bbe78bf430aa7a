"""The engine is entered and left in whichever task of its loop, and refuses another loop."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import anyio
import anyio.to_thread
import pytest

from hermes_async import Engine, EngineClosedError, EngineConfig, EngineError, Session, SessionClosedError
from tests.engines import both_loops, until
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


async def test_left_in_another_task(tiny_model: Any) -> None:
    engine = Engine(tiny_model.path, memory_budget="8MiB")
    await asyncio.create_task(engine.__aenter__())
    assert (await engine.complete(tiny_model.prompts[0], tiny_model.params)).token_ids
    await asyncio.create_task(engine.__aexit__(None, None, None))
    with pytest.raises(EngineClosedError):
        await engine.complete(tiny_model.prompts[0], tiny_model.params)


async def test_another_loop_is_refused(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB") as engine:

        def elsewhere() -> None:
            with pytest.raises(EngineError, match="another event loop"):
                asyncio.run(engine.complete(tiny_model.prompts[0], tiny_model.params))

        await anyio.to_thread.run_sync(elsewhere)


def users_calls(kind: type) -> list[str]:
    """The names of what users call or look at, as the class itself has them, but for what never changes."""
    names = {name for base in kind.__mro__[:-1] for name in vars(base)} - {"model_name"}
    return sorted(name for name in names if not name.startswith("_") or name == "__aexit__")


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "__aexit__": (None, None, None),
    "abort": ("no request",),
    "classify": ("text",),
    "complete": ([5],),
    "detokenize": ([5],),
    "embed": ("text",),
    "embed_counted": (["text"],),
    "generate": ([5],),
    "rank": ("text", ["text"]),
    "resize": ("16MiB",),
    "response_stream": ([5],),
    "stream": ([5],),
    "token_strings": ([5],),
    "tokenize": ("text",),
    "transcribe": ("speech.wav",),
    "transcribe_stream": ("speech.wav",),
}
KEYWORDS: dict[str, dict[str, Any]] = {"forward": {"input_ids": [[5]]}, "edit": {"token_ids": [5]}}


async def use(target: Any, name: str) -> None:
    """Calls a method, or looks at a property, and waits for what comes of it."""
    value = getattr(target, name)
    if callable(value):
        value = value(*ARGUMENTS.get(name, ()), **KEYWORDS.get(name, {}))
    if inspect.isasyncgen(value):
        async with aclosing(value):
            await anext(value)
    elif isinstance(value, AbstractAsyncContextManager) and value is not target:
        async with value:
            pass
    elif inspect.isawaitable(value):
        await value


@pytest.mark.parametrize("kind", [Engine, Session])
async def test_all_that_users_call_refuses_another_loop(tiny_model: Any, kind: type) -> None:
    refused = []

    def elsewhere(target: Any) -> None:
        for name in users_calls(kind):
            with pytest.raises(EngineError, match="another event loop or thread"):
                asyncio.run(use(target, name))
            refused.append(name)

    async with Engine(tiny_model.path, memory_budget="8MiB") as engine, engine.session() as session:
        with anyio.fail_after(60):
            await anyio.to_thread.run_sync(elsewhere, engine if kind is Engine else session)
        assert (await session.complete([5], tiny_model.params)).token_ids
    assert refused == users_calls(kind)
    assert len(refused) > 5


async def test_what_needs_no_loop_refuses_another_thread(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB") as engine, engine.session() as session:

        def elsewhere() -> None:
            calls = [engine.statistics, engine.session, engine.drop_prefixes, lambda: engine.plan, session.fork]
            for call in (*calls, lambda: session.messages, lambda: session.edit(token_ids=[5])):
                with pytest.raises(EngineError, match="another event loop or thread"):
                    call()

        await anyio.to_thread.run_sync(elsewhere)
    await anyio.to_thread.run_sync(engine.statistics)  # only counts, once it was left


@pytest.mark.parametrize("of_session", [False, True])
async def test_an_iterator_refuses_another_loop_and_its_request_ends(tiny_model: Any, of_session: bool) -> None:
    config = EngineConfig(max_buffered_chunks=1)
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as engine, engine.session() as session:
        chunks = (session if of_session else engine).generate(tiny_model.prompts[1], tiny_model.params)
        await anext(chunks)

        def elsewhere() -> None:
            with pytest.raises(EngineError, match="another event loop or thread"):
                asyncio.run(anext(chunks))

        await anyio.to_thread.run_sync(elsewhere)
        await until(lambda: not inside(engine).request_ids)
        await until(lambda: engine.statistics().num_running == 0)


async def test_a_session_is_closed_by_another_task(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB") as engine:
        session = engine.session()
        chunks = session.generate(tiny_model.prompts[1], tiny_model.params)
        await anext(chunks)
        await asyncio.create_task(session.aclose())
        taken = [chunk async for chunk in chunks]
        assert taken[-1].finish_reason == "abort"
        with pytest.raises(SessionClosedError):
            await session.complete([5])
        assert engine.statistics().num_sessions == 0
