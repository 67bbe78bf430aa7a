"""Nothing but errors of the library's own, and cancellation, comes out of a public call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hermes_async import CheckpointError, Engine, HermesError, RequestError, SamplingParams
from hermes_async.engine import model_planner
from hermes_async.serving.tokenizer import SharedTokenizer
from tests.engines import check_nothing_is_left, open_engine

pytestmark = pytest.mark.anyio

ONE_TOKEN = SamplingParams(max_tokens=1)

# As pyo3 names what a panic of Rust code becomes: no `Exception`.
PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


class Broken(list[int]):
    """Nothing of it can be read."""

    def __iter__(self) -> Any:
        raise RuntimeError("broken")

    def __len__(self) -> int:
        raise RuntimeError("broken")

    def __getitem__(self, idx: Any) -> Any:
        raise RuntimeError("broken")


ODD: list[Callable[[], Any]] = [
    lambda: None, lambda: 5, lambda: 1.5, lambda: float("nan"), lambda: True, lambda: b"x", object, list, dict, set,
    lambda: "", lambda: "\ud800", lambda: "w5\0w6", lambda: [None], lambda: [[]], lambda: ["a", 5], lambda: ("a",),
    lambda: {"a": 1}, lambda: [2**70], lambda: [1, [2]], lambda: ["\ud800"], Broken,
    lambda: iter([1]), lambda: Exception,
    lambda: np.array(5), lambda: np.zeros((2, 2)), lambda: torch.tensor(3), lambda: len,
    lambda: [{"role": "user", "content": 5}], lambda: [{"role": "user", "content": None}],
    lambda: [{"role": "user", "content": "\ud800"}], lambda: [{"role": 5}], lambda: [{}],
]  # fmt: skip


async def only_ours(call: Callable[[], Any]) -> None:
    """The call returns, or raises an error of the library's own."""
    with anyio.fail_after(60):
        try:
            result = call()
            if isinstance(result, Awaitable):
                await result
        except HermesError as error:
            assert str(error)


@pytest.fixture(scope="module")
async def engine(tiny_model: Any, anyio_backend: Any) -> AsyncIterator[Engine]:
    """One that every odd argument is given to."""
    async with open_engine(tiny_model) as opened:
        yield opened


@pytest.mark.parametrize("make", ODD, ids=lambda make: type(make()).__name__)
async def test_odd_arguments_of_calls(tiny_model: Any, engine: Engine, make: Callable[[], Any]) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: engine.complete(make(), ONE_TOKEN),
        lambda: engine.complete([5], make() if make() is not None else ONE_TOKEN),
        lambda: engine.complete([5], ONE_TOKEN, request_id=make()),
        lambda: engine.complete([5], ONE_TOKEN, deadline=make()),
        lambda: engine.embed(make()),
        lambda: engine.embed([make()]),
        *[
            lambda name=name: engine.embed("w5", **{name: make()})  # type: ignore[misc]
            for name in ("pooling", "prompt_name", "prompt", "truncate_dim")
        ],
        lambda: engine.classify(make()),
        lambda: engine.forward(input_ids=make()),
        lambda: engine.forward(input_ids=[[5]], attention_mask=make()),
        lambda: engine.forward(input_ids=[[5]], something=make()),
        lambda: engine.session(make()),
        lambda: engine.abort(make()),
        lambda: engine.resize(make()),
    ]
    for call in calls:
        await only_ours(call)
    async with engine.session() as chat:
        await only_ours(lambda: chat.edit(make()))
        await only_ours(lambda: chat.edit(token_ids=make()))
    async with engine.session() as chat:
        await only_ours(lambda: chat.complete(make(), ONE_TOKEN))
        await only_ours(lambda: chat.complete([5], ONE_TOKEN, request_id=make()))
    assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]


@pytest.mark.parametrize("make", ODD, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("name", ["source", "memory_budget", "config", "draft_model", "trace"])
async def test_odd_arguments_of_an_engine(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"source": tiny_model.path, "memory_budget": "8MiB", "config": tiny_model.config} | {name: make()}

    async def open_and_leave() -> None:
        async with Engine(options.pop("source"), **options):
            pass

    await only_ours(open_and_leave)


async def test_panics_while_texts_are_tokenized_or_decoded(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*args: Any, **options: Any) -> Any:
        raise PanicException("retry limit in match over")

    calls: list[Callable[[Engine], Any]] = [
        lambda engine: engine.complete("w5", tiny_model.params),
        lambda engine: engine.complete([{"role": "user", "content": "w5"}], tiny_model.params),
        lambda engine: engine.complete([5], tiny_model.params),  # decodes
        lambda engine: engine.embed("w5"),
        lambda engine: engine.embed("w5", truncate=True),
        lambda engine: engine.classify("w5"),
        lambda engine: engine.classify(("w5", "w6")),
    ]
    async with open_engine(tiny_model) as engine:
        with monkeypatch.context() as patch:
            for name in ("__call__", "decode", "pad", "chat_text"):
                patch.setattr(SharedTokenizer, name, panics)
            for call in calls:
                with pytest.raises(RequestError, match="retry limit in match over"):
                    await call(engine)
        assert (await engine.complete("w5", tiny_model.params)).token_ids == tiny_model.greedy([5])
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("error", [PanicException("no such normalizer"), KeyError("normalizer")], ids=repr)
async def test_a_tokenizer_that_panics_when_it_is_loaded(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    async with open_engine(tiny_model) as engine:
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]
        with pytest.raises(RequestError, match="normalizer"):
            await engine.complete("w5", tiny_model.params)


@pytest.mark.parametrize("error", [PanicException("broken"), RuntimeError("broken"), OSError("broken")], ids=repr)
async def test_an_error_of_a_library_while_the_model_is_opened(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(model_planner, "plan", fails)
    engine = open_engine(tiny_model)
    with pytest.raises(CheckpointError, match="broken") as caught:
        await engine.__aenter__()
    assert caught.value.__cause__ is error
    assert str(tiny_model.path) in str(caught.value)
