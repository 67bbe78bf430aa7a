"""What goes wrong with one request ends that request, and no other."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from hermes_async import Completion, Engine, RequestError
from hermes_async.modeling.sampling import Sampler
from hermes_async.serving.speculation import PromptLookup
from hermes_async.serving.text_stream import TextStream
from tests.engines import check_nothing_is_left, open_engine

pytestmark = pytest.mark.anyio

# As pyo3 names what a panic of Rust code becomes.
PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


async def _complete(engine: Engine, prompts: list[list[int]], params: Any) -> list[Completion | RequestError]:
    results: dict[int, Completion | RequestError] = {}

    async def run(idx: int) -> None:
        try:
            results[idx] = await engine.complete(prompts[idx], params)
        except RequestError as error:
            results[idx] = error

    async with anyio.create_task_group() as group:
        for idx in range(len(prompts)):
            group.start_soon(run, idx)
    return [results[idx] for idx in range(len(prompts))]


@pytest.mark.parametrize(("owner", "name"), [(Sampler, "sample"), (TextStream, "push"), (PromptLookup, "extend")])
@pytest.mark.parametrize("error", [RuntimeError("broken"), OverflowError("broken"), PanicException("broken")], ids=repr)
async def test_an_error_of_one_request_ends_it_alone(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException
) -> None:
    works = getattr(owner, name)
    calls = 0

    def breaks(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return works(*args, **options)

    async with open_engine(tiny_model) as engine:
        monkeypatch.setattr(owner, name, breaks)
        results = await _complete(engine, tiny_model.prompts[1:4], tiny_model.params)
        failed = [result for result in results if isinstance(result, RequestError)]
        assert len(failed) == 1
        assert "broken" in str(failed[0])
        assert failed[0].__cause__ is error
        for result, reference in zip(results, tiny_model.references[1:4], strict=True):
            assert isinstance(result, RequestError) or result.token_ids == reference
        assert (await engine.complete(tiny_model.prompts[1], tiny_model.params)).token_ids == tiny_model.references[1]
        await check_nothing_is_left(engine)
