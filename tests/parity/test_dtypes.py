"""Checkpoints in bf16 and fp16 against transformers in the same dtype, and ones whose tensors are in another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, GPTJConfig, LlamaConfig, OPTConfig, PreTrainedConfig

import hermes_async

pytestmark = pytest.mark.anyio

TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
GPT = TOKENS | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=8, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=8),
    "opt": OPTConfig(
        **TOKENS,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
}
# Of log-probabilities. One sequence in one piece runs the same kernels in the same order, so only attention over a
# cache may round another way; a bf16 number has 8 bits, an fp16 number 11, and these logits reach 10 to 20.
ATOL = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}
# What two tokens may be apart and still count as equally likely: a few steps of numbers of that size.
TIES = {torch.float32: 0.0, torch.bfloat16: 0.1, torch.float16: 0.01}
NUM_TOKENS = 12


@pytest.mark.parametrize("dtype", ATOL, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CONFIGS)
async def test_a_prompt_alone_in_the_checkpoints_dtype(
    name: str,
    dtype: torch.dtype,
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    path = save_model(random_model(CONFIGS[name], dtype=dtype))
    expected = greedy_reference(path, prompts, dtype=dtype, num_tokens=NUM_TOKENS)
    async with hermes_async.Engine(path, memory_budget="64MiB") as engine:
        for idx, prompt in enumerate(prompts):
            completions = await complete_all(engine, [prompt], num_tokens=NUM_TOKENS)
            assert_parity(completions, expected[idx : idx + 1], atol=ATOL[dtype], ties=TIES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
async def test_streamed_logprobs_are_close_in_half_precision(
    dtype: torch.dtype,
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
    minimum_budget: Callable[[Path], int],
    complete_all: Callable[..., Any],
) -> None:
    """In chunks and beside others a sum rounds another way, so tokens may part; the first ones have one history."""
    path = save_model(random_model(CONFIGS["llama"], dtype=dtype))
    expected = greedy_reference(path, prompts, dtype=dtype, num_tokens=1)
    async with hermes_async.Engine(path, memory_budget=minimum_budget(path)) as engine:
        completions = await complete_all(engine, prompts, num_tokens=1)
    for completion, item in zip(completions, expected, strict=True):
        top = completion.logprobs[0].top_logprobs
        given = torch.tensor(list(top.values()))
        torch.testing.assert_close(given, item.logprobs[0, list(top)], atol=2 * ATOL[dtype], rtol=0)


@pytest.mark.parametrize("budget", ["smallest", "resident"])
async def test_float32_tensors_under_a_config_that_says_bfloat16(
    budget: str,
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
    minimum_budget: Callable[[Path], int],
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    """They are cast as transformers casts them: `dtype="auto"` follows the config."""
    path = save_model(random_model(CONFIGS["llama"]))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    short = [prompts[0]]
    expected = greedy_reference(path, short, dtype="auto", num_tokens=NUM_TOKENS)
    size = minimum_budget(path) if budget == "smallest" else 64 * 1024 * 1024
    async with hermes_async.Engine(path, memory_budget=size) as engine:
        completions = await complete_all(engine, short, num_tokens=NUM_TOKENS)
    assert_parity(completions, expected, atol=ATOL[torch.bfloat16], ties=TIES[torch.bfloat16])
