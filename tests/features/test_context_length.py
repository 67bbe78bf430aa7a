"""How long a sequence may be: by the model's configuration, by its RoPE scaling, and by the engine's option."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaForCausalLM

from hermes_async import Completion, ConfigError, ContextLengthError, Engine, EngineConfig, SamplingParams
from hermes_async.engine.opening import open_model
from tests.engines import tokens

pytestmark = pytest.mark.anyio

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def with_rope(model: Any, path: Path, max_positions: int, **rope: Any) -> Path:
    """The tiny model with RoPE scaling."""
    shutil.copytree(model.path, path)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = max_positions
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (path / "config.json").write_text(json.dumps(config))
    return path


def greedy(path: Path, prompt: list[int]) -> tuple[int, ...]:
    model = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
    return tuple(output[0, len(prompt) :].tolist())


def open_engine(path: Path, model: Any, **options: Any) -> Engine:
    return Engine(path, memory_budget="8MiB", config=dataclasses.replace(model.config, **options))


@pytest.mark.parametrize(
    ("max_positions", "rope", "context"),
    [
        (64, {"rope_type": "default"}, 64),
        # As Qwen 2.5 and 3 are told to reach their longest: the positions stay those of the training.
        (16, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (20, {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 16}, 40),
        (16, {"rope_type": "yarn", "factor": 4.0}, 64),
        # As gpt-oss: the positions are the scaled ones.
        (64, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (16, {"rope_type": "linear", "factor": 4.0}, 64),
        (64, {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16, **LLAMA3}, 64),
        # Past 16 tokens transformers changes the frequencies of everything that is in a row.
        (16, {"rope_type": "dynamic", "factor": 4.0}, 16),
    ],
)
async def test_the_context_under_rope_scaling_is_used_to_its_end(
    tiny_model: Any, tmp_path: Path, max_positions: int, rope: dict[str, Any], context: int
) -> None:
    path = with_rope(tiny_model, tmp_path / "scaled", max_positions, **rope)
    longest = tokens(3, context - 4)
    expected = greedy(path, longest), greedy(path, longest[:5])
    async with open_engine(path, tiny_model) as engine:
        assert engine.plan.context_length == engine.plan.as_dict()["context_length"] == context
        completions: list[Completion | None] = [None, None]
        for idx, prompt in enumerate((longest, longest[:5])):
            completions[idx] = await engine.complete(prompt, PARAMS)
        assert tuple(item.token_ids for item in completions if item) == expected
        with pytest.raises(ContextLengthError) as caught:
            await engine.complete(tokens(3, context), PARAMS)
        assert caught.value.context_length == context


@pytest.mark.parametrize("positions", [64, 256])
def test_scaling_of_some_layers_only_is_in_what_the_configuration_says(
    random_model: Callable[..., Any], save_model: Callable[..., Path], positions: int
) -> None:
    """As Gemma 3: windows beside layers whose positions are scaled."""
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=96, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=positions, pad_token_id=0, eos_token_id=1, bos_token_id=0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    )  # fmt: skip
    opened = open_model(save_model(random_model(config)), "8MiB", EngineConfig())
    opened.close()
    assert opened.plan.context_length == positions


async def test_a_context_length_that_is_asked_for_ends_sequences(tiny_model: Any) -> None:
    prompt, reference = tiny_model.prompts[2], tiny_model.references[2]
    async with open_engine(tiny_model.path, tiny_model, context_length=16) as engine:
        assert engine.plan.context_length == 16
        assert "of up to 16 tokens each" in str(engine.plan)
        for max_tokens in (12, None):
            params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
            completion = await engine.complete(prompt, params)
            assert (completion.token_ids, completion.finish_reason) == (reference[:4], "length")
        with pytest.raises(ContextLengthError, match="the prompt has 20 tokens; the model's context is 16") as caught:
            await engine.complete(tiny_model.prompts[3], PARAMS)
        assert (caught.value.context_length, caught.value.num_tokens) == (16, 20)


@pytest.mark.parametrize(
    ("max_positions", "rope"),
    [
        (64, {"rope_type": "default"}),
        (16, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ],
)
async def test_a_context_length_cannot_be_more_than_the_model_s(
    tiny_model: Any, tmp_path: Path, max_positions: int, rope: dict[str, Any]
) -> None:
    path = with_rope(tiny_model, tmp_path / "scaled", max_positions, **rope)
    with pytest.raises(ConfigError, match="context_length is 65; the context of this LlamaForCausalLM is 64"):
        async with open_engine(path, tiny_model, context_length=65):
            pytest.fail("entered")
    async with open_engine(path, tiny_model, context_length=64) as engine:
        assert engine.plan.context_length == 64


async def test_a_draft_model_keeps_its_own_context(tiny_model: Any, tmp_path: Path) -> None:
    draft = with_rope(tiny_model, tmp_path / "draft", 20, rope_type="default")
    config = dataclasses.replace(tiny_model.config, context_length=48)
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config, draft_model=draft) as engine:
        assert engine.plan.context_length == 48
        for prompt, reference in zip(tiny_model.prompts[1:4], tiny_model.references[1:4], strict=True):
            assert (await engine.complete(prompt, PARAMS)).token_ids == reference[:4]


@pytest.mark.parametrize("value", [1, 0, -1, 2.0, "16", True])
def test_a_context_length_must_be_an_int_of_at_least_two(value: Any) -> None:
    with pytest.raises(ConfigError, match="context_length must be an int of at least 2"):
        EngineConfig(context_length=value)
