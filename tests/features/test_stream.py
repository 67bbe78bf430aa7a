"""`Engine.stream`: a request is accepted or refused on entering, and ends when it is left."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from hermes_async import ContextLengthError, DeadlineExceededError, QueueFullError, RequestError, SamplingParams
from tests.engines import check_nothing_is_left, greedy_params, open_engine, until

pytestmark = pytest.mark.anyio


async def test_it_gives_the_chunks_of_generate(tiny_model: Any) -> None:
    prompt = tiny_model.prompts[0]
    async with open_engine(tiny_model) as engine:
        generated = [chunk async for chunk in engine.generate(prompt, greedy_params(6), request_id="a")]
        async with engine.stream(prompt, greedy_params(6), request_id="a") as chunks:
            streamed = [chunk async for chunk in chunks]
        assert [chunk.token_ids for chunk in streamed] == [chunk.token_ids for chunk in generated]
        assert streamed[-1].finish_reason == "length"
        await check_nothing_is_left(engine)


async def test_leaving_ends_the_request(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with engine.stream(tiny_model.prompts[0], greedy_params(40), request_id="left") as chunks:
            await anext(chunks)
        await check_nothing_is_left(engine)
        async with engine.stream(tiny_model.prompts[0], greedy_params(40), request_id="left"):
            pass  # no chunk was taken
        await check_nothing_is_left(engine)


async def test_a_bad_request_is_refused_on_entering(tiny_model: Any) -> None:
    async with open_engine(tiny_model, context_length=32) as engine:
        with pytest.raises(RequestError, match="empty"):
            async with engine.stream([]):
                pytest.fail("entered")
        with pytest.raises(ContextLengthError):
            async with engine.stream([1] * 40, SamplingParams(max_tokens=1)):
                pytest.fail("entered")
        with pytest.raises(DeadlineExceededError):
            async with engine.stream([1], deadline=anyio.current_time() - 1):
                pytest.fail("entered")
        await check_nothing_is_left(engine)


async def test_a_full_queue_refuses_on_entering(tiny_model: Any) -> None:
    async with open_engine(tiny_model, max_waiting=0, max_sequences=1) as engine:
        async with engine.stream(tiny_model.prompts[0], greedy_params(40)) as chunks:
            await anext(chunks)
            with pytest.raises(QueueFullError):
                async with engine.stream(tiny_model.prompts[1], greedy_params(4)):
                    pytest.fail("entered")
        await until(lambda: not engine.statistics().num_running)
        async with engine.stream(tiny_model.prompts[1], greedy_params(4)) as chunks:
            assert [chunk async for chunk in chunks][-1].finish_reason == "length"
        await check_nothing_is_left(engine)


async def test_an_abort_ends_the_stream_with_a_last_chunk(tiny_model: Any) -> None:
    async with open_engine(tiny_model) as engine:
        async with engine.stream(tiny_model.prompts[0], greedy_params(40), request_id="aborted") as chunks:
            await anext(chunks)
            assert await engine.abort("aborted")
            rest = [chunk async for chunk in chunks]
        assert rest[-1].finish_reason == "abort"
        await check_nothing_is_left(engine)
