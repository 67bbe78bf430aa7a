"""More memory never leaves less: what one budget can do, every larger one can."""

from __future__ import annotations

import pytest

from hermes_async import Engine, SamplingParams
from hermes_async.demo import MODEL_PATH

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.mark.parametrize("mib", [4, 6, 8, 10, 12, 16, 20, 24, 32])
async def test_an_answer_that_fits_one_budget_fits_every_larger_one(mib: int) -> None:
    params = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    async with Engine(MODEL_PATH, memory_budget=mib * MIB) as engine:
        completion = await engine.complete("Once upon a time", params)
        assert len(completion.token_ids) == 300
        assert engine.statistics().peak_bytes_in_use <= mib * MIB
