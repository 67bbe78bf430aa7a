"""More memory never leaves less: what one budget can do, every larger one can."""

from __future__ import annotations

import pytest

from hermes_async import Engine, SamplingParams
from hermes_async.demo import MODEL_PATH

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.mark.parametrize("mib", [4, 6, 8, 10, 12, 16, 20, 24, 32])
async def test_an_answer_that_fits_one_budget_fits_every_larger_one(mib: int) -> None:
    prompt = [10 + idx % 50 for idx in range(300)]  # its memory is that of an answer of so many tokens
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    async with Engine(MODEL_PATH, memory_budget=mib * MIB) as engine:
        completion = await engine.complete(prompt, params)
        assert len(completion.token_ids) == 8
        assert engine.statistics().peak_bytes_in_use <= mib * MIB
