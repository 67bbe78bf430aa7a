"""Models with a table of rows for all layers: the rows are read, never the table, and tokens are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import hermes_async
from hermes_async.engine.opening import open_model
from tests.inside import inside

pytestmark = pytest.mark.anyio

ATOL = 5e-4
NUM_TOKENS = 10
SMALL = {
    "vocab_size": 2000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "hidden_size_per_layer_input": 512,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], t.PreTrainedConfig]] = {
    # Of the ids from 1500 on, all layers have row 0.
    "gemma3n": lambda: t.Gemma3nTextConfig(
        **SMALL | {"intermediate_size": [48] * 3},
        vocab_size_per_layer_input=1500,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 3,
    ),
    # Takes the row of the padding token from the table of the input embedding in each call.
    "gemma4-with-images": lambda: t.Gemma4Config(
        text_config=CONFIGS["gemma4"]().to_dict(),
        vision_config=t.Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        ),
        audio_config=None,
        **{f"{name}_token_id": 1990 + idx for idx, name in enumerate(("image", "video", "audio", "boi", "eoi"))},
    ),
    "gemma4": lambda: t.Gemma4TextConfig(**SMALL, global_head_dim=8, vocab_size_per_layer_input=2000),
}


@pytest.mark.parametrize("name", CONFIGS)
async def test_tokens_are_equal_and_the_table_stays_on_disk(
    name: str,
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    path = save_model(random_model(CONFIGS[name]()))
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 2000, (length,), generator=generator).tolist() for length in (1, 5, 40, 17)]
    prompts.append([1499, 1500, 1999, 0, 1, 1500])
    if name == "gemma4-with-images":
        prompts = [[min(token_id, 1989) for token_id in prompt] for prompt in prompts]
    expected = greedy_reference(path, prompts, num_tokens=NUM_TOKENS)
    with pytest.raises(hermes_async.MemoryBudgetError) as caught:
        open_model(path, 1, hermes_async.EngineConfig())
    minimum = caught.value.minimum_bytes
    assert minimum is not None
    async with hermes_async.Engine(path, memory_budget=minimum) as engine:
        completions = await complete_all(engine, prompts, num_tokens=NUM_TOKENS)
        output = await engine.forward(input_ids=[prompts[-1]])
        plan = engine.plan
        tables = [table.name for table in inside(engine).row_tables]
    assert_parity(completions, expected, atol=ATOL)
    model = t.AutoModelForCausalLM.from_pretrained(path)
    names = {module: name for name, module in model.named_modules()}
    embeddings = [model.get_input_embeddings(), model.base_model.get_decoder().embed_tokens_per_layer]
    assert tables == [names[module] for module in embeddings]
    table = embeddings[1].weight
    assert minimum < table.nbytes / 2
    assert plan.weight_bytes < table.nbytes / 2
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompts[-1]])).logits
    torch.testing.assert_close(output.logits, logits, atol=ATOL, rtol=0)
