"""Each architecture at three budgets: greedy tokens and log-probabilities are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import hermes_async

pytestmark = pytest.mark.anyio

ATOL = 1e-4  # of log-probabilities in float32
WINDOW = 8  # shorter than most prompts
TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
GPT = TOKENS | {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
OPT = TOKENS | {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "factor": 2.0,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "mistral-window": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED | {"num_hidden_layers": 6},
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "phi": lambda: PhiConfig(**SMALL),
    "phi3": lambda: Phi3Config(**SMALL, num_key_value_heads=2),
    "phi3-longrope": lambda: Phi3Config(
        **SMALL, num_key_value_heads=2, original_max_position_embeddings=128, rope_parameters=LONGROPE
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**SMALL),
    "gpt-neox-sequential": lambda: GPTNeoXConfig(**SMALL, use_parallel_residual=False, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(**OPT),
    "opt-projected": lambda: OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-norm-after": lambda: OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": lambda: GPT2Config(**GPT),
    "gptj": lambda: GPTJConfig(**GPT, rotary_dim=8),
    "falcon": lambda: FalconConfig(**SMALL, alibi=False, multi_query=True, new_decoder_architecture=False),
    "falcon-new": lambda: FalconConfig(**SMALL, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-sequential": lambda: FalconConfig(
        **SMALL, alibi=False, multi_query=False, new_decoder_architecture=False, parallel_attn=False, bias=True
    ),
    "codegen": lambda: CodeGenConfig(**GPT, rotary_dim=8),
}


@dataclass(frozen=True)
class Subject:
    path: Path
    expected: list[Any]
    budgets: dict[str, int]


@pytest.fixture(scope="module", params=CONFIGS)
def subject(
    request: pytest.FixtureRequest,
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
    budgets_of: Callable[[Path], dict[str, int]],
) -> Subject:
    path = save_model(random_model(CONFIGS[request.param]()))
    return Subject(path, greedy_reference(path, prompts), budgets_of(path))


@pytest.mark.parametrize("budget", ["smallest", "middle", "resident"])
async def test_tokens_and_logprobs_are_those_of_transformers(
    subject: Subject,
    budget: str,
    prompts: list[list[int]],
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    async with hermes_async.Engine(subject.path, memory_budget=subject.budgets[budget]) as engine:
        plan = engine.plan
        assert plan.minimum_budget == subject.budgets["smallest"]
        if budget == "smallest":
            assert plan.num_buffers > 0
            assert plan.max_prompt_tokens < max(map(len, prompts))  # so prompts are computed in chunks
        elif budget == "middle":
            assert 0 < len(plan.resident) < len(plan.stages)
        else:
            assert len(plan.resident) == len(plan.stages)
            assert plan.bytes_per_sweep == 0
        assert_parity(await complete_all(engine, prompts), subject.expected, atol=ATOL)


def test_references_vary(subject: Subject) -> None:
    """Otherwise equal tokens would say little."""
    assert sum(len(set(expected.token_ids)) for expected in subject.expected) > 2 * len(subject.expected)
