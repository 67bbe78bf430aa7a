"""What `SamplingParams` mean in an engine, beside transformers' `generate` and vLLM's rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hermes_async import SamplingParams
from tests.engines import open_engine

pytestmark = pytest.mark.anyio


# No stop before min_tokens


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 12])
async def test_no_end_token_comes_before_min_tokens(tiny_model: Any, min_tokens: int) -> None:
    """The tokens are those of transformers' `min_new_tokens`."""
    prompt, reference = tiny_model.prompts[1], tiny_model.references[1]
    with torch.inference_mode():
        output = tiny_model.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, pad_token_id=0,
            max_new_tokens=12, min_new_tokens=min_tokens, eos_token_id=[1, reference[1]],
        )  # fmt: skip
    expected = tuple(output[0, len(prompt) :].tolist())
    assert len(expected) >= max(2, min_tokens)
    params = SamplingParams(max_tokens=12, temperature=0, min_tokens=min_tokens, stop_token_ids=[reference[1]])
    async with open_engine(tiny_model) as engine:
        assert (await engine.complete(prompt, params)).token_ids == expected


@pytest.mark.parametrize("min_tokens", [0, 1, 3, 4, 12])
async def test_no_stop_text_ends_it_before_min_tokens(tiny_model: Any, min_tokens: int) -> None:
    reference = tiny_model.references[1]
    stop = next(token_id for token_id in reference[2:] if token_id >= 10)  # no other word begins as this one
    ends = [idx for idx, token_id in enumerate(reference) if token_id == stop and idx >= min_tokens]
    num_tokens = ends[0] + 1 if ends else len(reference)
    params = dataclasses.replace(tiny_model.params, stop=f"w{stop}", min_tokens=min_tokens)
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
    assert completion.token_ids == reference[:num_tokens]
    assert completion.finish_reason == ("stop" if ends else "length")
    shown = num_tokens - 1 if ends else num_tokens
    assert completion.text.split() == tiny_model.text(reference[:shown]).split()


@pytest.mark.parametrize("shown", [False, True])
async def test_a_special_token_is_a_stop_text(tiny_model: Any, shown: bool) -> None:
    params = SamplingParams(
        max_tokens=5, temperature=0, logit_bias={1: 1e6}, ignore_eos=True, stop="</s>", skip_special_tokens=shown
    )
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
    assert (completion.token_ids, completion.finish_reason, completion.text.strip()) == ((1,), "stop", "")


# What of a stop is in the text


@pytest.mark.parametrize("included", [False, True])
async def test_the_text_of_a_stop_token_is_no_part_of_the_text_unless_it_is_asked_for(
    tiny_model: Any, included: bool
) -> None:
    reference = tiny_model.references[1]
    first = reference.index(reference[3]) + 1
    params = dataclasses.replace(tiny_model.params, stop_token_ids=[reference[3]], include_stop_str_in_output=included)
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == reference[:first]
    assert completion.text.split() == tiny_model.text(reference[: first if included else first - 1]).split()


@pytest.mark.parametrize("included", [False, True])
async def test_so_is_the_text_of_an_end_of_sequence_token_where_special_tokens_are_shown(
    tiny_model: Any, included: bool
) -> None:
    params = SamplingParams(
        max_tokens=5, temperature=0, logit_bias={1: 1e6}, skip_special_tokens=False, include_stop_str_in_output=included
    )
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
    assert (completion.token_ids, completion.finish_reason) == ((1,), "stop")
    assert completion.text.strip() == ("</s>" if included else "")


@pytest.mark.parametrize("included", [False, True])
async def test_a_stop_text_is_in_the_text_where_it_is_asked_for(tiny_model: Any, included: bool) -> None:
    reference = tiny_model.references[1]
    stop = next(token_id for token_id in reference[2:] if token_id >= 10)
    params = dataclasses.replace(tiny_model.params, stop=f"w{stop}", include_stop_str_in_output=included)
    async with open_engine(tiny_model) as engine:
        completion = await engine.complete(tiny_model.prompts[1], params)
    num_shown = reference.index(stop) + included
    assert completion.text.split() == tiny_model.text(reference[:num_shown]).split()
    assert completion.finish_reason == "stop"
