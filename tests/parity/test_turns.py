"""Architectures that have no exact packed row run in turns: their tokens and log-probabilities are transformers' own.

Each stands for a kind of cache or of attention. `python -m benchmarks.architectures` runs all others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hermes_async
from tests.architectures import FIRST_SPECIAL_TOKEN, WINDOW, tiny_config
from tests.engines import check_nothing_is_left

pytestmark = pytest.mark.anyio

ATOL = 5e-4  # of log-probabilities in float32
NUM_TOKENS = 8
MODEL_TYPES = (
    "qwen3_5_text",  # gated delta rule
    "mamba",  # recurrent states, without positions
    "mamba2",
    "jamba",  # recurrent states beside keys and values, experts
    "zamba2",  # layers that share their attention
    "lfm2",  # short convolutions
    "minimax",  # linear attention with a cache of its own
    "deepseek_v3",  # compressed keys and values
    "deepseek_v32",  # the same, with the keys that an indexer chooses
    "llama4_text",  # chunks of positions
    "gemma3n_text",  # keys and values that layers share, embeddings for each layer
    "bloom",  # ALiBi
    "gpt_neo",  # windows that only the mask knows
    "recurrent_gemma",  # states that are kept on the modules
    "rwkv",  # a list of tensors
    "xlstm",  # a state of its own
    "openai-gpt",  # no cache at all
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The shortest comes first: some models of transformers keep a state that a call for one token goes on from."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, FIRST_SPECIAL_TOKEN, (length,), generator=generator).tolist() for length in (1, 5, 40)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
async def test_turns_give_the_tokens_of_transformers(
    model_type: str,
    prompts: list[list[int]],
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    least_budget: int,
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    assert max(map(len, prompts)) > 2 * WINDOW
    path = save_model(random_model(tiny_config(model_type)))
    expected = greedy_reference(path, prompts, num_tokens=NUM_TOKENS)
    async with hermes_async.Engine(path, memory_budget=least_budget) as engine:
        assert engine.plan.memory_budget == engine.plan.minimum_budget
        assert engine.plan.as_dict()["batching"] == "turns"
        assert_parity(await complete_all(engine, prompts, num_tokens=NUM_TOKENS), expected, atol=ATOL)
        await check_nothing_is_left(engine)
