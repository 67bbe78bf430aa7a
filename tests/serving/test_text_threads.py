"""Texts that a tokenizer never finishes: they take some threads, and no more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from transformers import PreTrainedTokenizerFast

from hermes_async import DeadlineExceededError, RequestError
from hermes_async.serving import tokenizer
from tests.engines import open_engine, until

pytestmark = pytest.mark.anyio


class Hanging:
    """The tokenizer never finishes texts that begin with "w13", until the test lets it go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.let_go, self.num_hanging = threading.Event(), 0
        works = PreTrainedTokenizerFast.__call__

        def call(fast: Any, texts: list[str], *args: Any, **options: Any) -> Any:
            if texts[0].startswith("w13"):
                self.num_hanging += 1
                if not self.let_go.wait(60):
                    raise TimeoutError("the test did not let the tokenizer go")
            return works(fast, texts, *args, **options)

        patch.setattr(PreTrainedTokenizerFast, "__call__", call)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr(tokenizer, "NUM_THREADS", 2)
    hanging = Hanging(monkeypatch)
    yield hanging
    hanging.let_go.set()


async def test_when_all_places_are_lost_other_texts_are_refused(tiny_model: Any, hanging: Hanging) -> None:
    async with open_engine(tiny_model) as engine:
        for _ in range(2):
            assert (await engine.complete("w5", tiny_model.params)).token_ids
            with pytest.raises(DeadlineExceededError):
                await engine.complete("w13 w6", tiny_model.params, deadline=anyio.current_time() + 0.05)
        assert hanging.num_hanging == 2
        with pytest.raises(RequestError, match="still at work on 2 texts of requests that have ended"):
            await engine.complete("w5", tiny_model.params)
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
        hanging.let_go.set()
        await until_taken(engine, tiny_model)


async def test_a_text_waits_for_a_place_and_can_be_left(tiny_model: Any, hanging: Hanging) -> None:
    async with open_engine(tiny_model) as engine, anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(engine.complete, "w13 w6", tiny_model.params)
        await until(lambda: hanging.num_hanging == 2)
        with anyio.move_on_after(0.05) as left:
            await engine.complete("w5", tiny_model.params)
        assert left.cancelled_caught
        with pytest.raises(DeadlineExceededError):
            await engine.complete("w5", tiny_model.params, deadline=anyio.current_time() + 0.05)
        group.start_soon(engine.complete, "w13 w7", tiny_model.params)
        hanging.let_go.set()


async def until_taken(engine: Any, model: Any) -> None:
    """The threads return a moment after they were let go."""
    while True:
        try:
            assert (await engine.complete("w5", model.params)).token_ids
            return
        except RequestError:
            await anyio.sleep(0.01)
