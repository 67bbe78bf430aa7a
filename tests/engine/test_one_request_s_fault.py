"""Whatever is raised while one request's tokens are chosen, decoded or delivered ends that request alone."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from hermes_async import HermesError, RequestError, SamplingParams
from hermes_async.engine.serving import Serving
from hermes_async.engine.text import TextStream
from hermes_async.modeling.sampling import Sampler
from tests.engines import check_nothing_is_left, one_loop, open_engine

pytestmark = pytest.mark.anyio
anyio_backend = one_loop(use_uvloop=False)


PLACES = ((Sampler, "sample"), (TextStream, "push"), (Serving, "_deliver_tokens"))


class Panic(BaseException):
    """As a tokenizer's native code raises it: no `Exception`."""


@pytest.mark.parametrize(
    ("where", "error"),
    [
        *((where, error) for where in PLACES for error in (RuntimeError("cannot"), ZeroDivisionError(), MemoryError())),
        *((where, Panic("unreachable")) for where in PLACES[:2]),  # no native code runs in the delivery
    ],
)
async def test_others_go_on(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], error: BaseException
) -> None:
    owner, name = where
    original, calls = getattr(owner, name), []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Fails the third time for whichever request comes first."""
        victim = args[0].item.request if owner is Serving else self
        if not calls or victim is calls[0]:
            calls.append(victim)
            if len(calls) == 3:
                raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    results: list[Any] = [None, None]
    async with open_engine(tiny_model, prompt_lookup=False) as engine:

        async def run(idx: int) -> None:
            try:
                results[idx] = (await engine.complete(tiny_model.prompts[idx], tiny_model.params)).token_ids
            except HermesError as raised:
                results[idx] = raised

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, 0)
            tasks.start_soon(run, 1)
        failed = [idx for idx, result in enumerate(results) if isinstance(result, HermesError)]
        assert len(failed) == 1
        assert isinstance(results[failed[0]], RequestError)
        assert results[1 - failed[0]] == tiny_model.references[1 - failed[0]]
        again = await engine.complete(tiny_model.prompts[2], tiny_model.params)
        assert again.token_ids == tiny_model.references[2]
        await check_nothing_is_left(engine)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 2**64},
        {"temperature": 1e300},
        {"logit_bias": {0: -1e300}},
        {"logit_bias": {0: 10**60}},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"presence_penalty": 1e300},
    ],
)
def test_a_number_that_would_not_fit_is_refused_when_it_is_given(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(params))):
        SamplingParams(**params)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e6},
        {"temperature": 1_000_000},
        {"temperature": 1e-300},
        {"logit_bias": {3: -1e30, 4: 10**30}},
        {"repetition_penalty": 1e3, "temperature": 1e-4},
        {"repetition_penalty": 1e-3, "presence_penalty": 2, "frequency_penalty": -2},
        {"top_k": 2**70, "min_p": 1.0, "top_p": 1e-300},
        {"seed": 2**64 - 1},
    ],
)
async def test_numbers_at_the_ends_of_their_ranges_generate(tiny_model: Any, params: dict[str, Any]) -> None:
    async with open_engine(tiny_model) as engine:
        given = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **params})
        assert len((await engine.complete(tiny_model.prompts[1], given)).token_ids) == 4
        await check_nothing_is_left(engine)
