"""What tests of FP8 and FP4 checkpoints share: how one is saved, and that an engine gives a plain model's answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hermes_async import Engine, EngineConfig, MemoryBudgetError, SamplingParams

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PROMPT = [5, 9, 2, 33, 17, 40, 8]
NUM_TOKENS = 8


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """The numbers of packed bytes in float32, one by one."""
    numbers = [
        (-1) ** (half >> 3) * MAGNITUDES[half & 7]
        for byte in packed.flatten().tolist()
        for half in (byte & 0xF, byte >> 4)
    ]
    return torch.tensor(numbers).view(*packed.shape[:-1], 2 * packed.shape[-1])


def save(
    path: Path,
    config: PreTrainedConfig,
    settings: Mapping[str, Any],
    quantize: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor] | None],
    arrange: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> PreTrainedModel:
    """Saves a small model with random weights, some of them quantized, and returns it with their values.

    Args:
        settings: Of the quantization, for `config.json`.
        quantize: From a name and a weight to the tensors that are stored for it, and what they stand for; None for
            weights that are not quantized.
        arrange: From the tensors to be stored to those that are.
    """
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(path)
    file = path / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        found = quantize(name, weight)
        own, values[name] = ({name: weight}, weight) if found is None else found
        stored |= own
    assert len(stored) > len(values)
    save_file(values, file, metadata={"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    save_file(arrange(stored), file, metadata={"format": "pt"})
    entries = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**entries, "quantization_config": dict(settings)}))
    return plain


async def check_engine(path: Path, plain: PreTrainedModel, batching: str, budget: int | None = None) -> None:
    """In a budget, or the smallest one, an engine gives the tokens and logits of the plain model."""
    config = EngineConfig(batching=batching, dtype="float32", max_tokens_per_sweep=16, max_sequences=2)
    if budget is None:
        with pytest.raises(MemoryBudgetError) as caught:
            async with Engine(path, memory_budget=1 << 16, config=config):
                pass
        budget = caught.value.minimum_bytes
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        logits = plain(ids).logits
        output = plain.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    async with Engine(path, memory_budget=budget, config=config) as engine:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        tokens = [token async for chunk in engine.generate(PROMPT, params) for token in chunk.token_ids]
        found = await engine.forward(input_ids=ids)
        if any(".experts." in name for name, _ in plain.named_parameters()):  # of a mixture they are read one by one
            every_expert_bytes = sum(expert.slot_bytes for expert in engine.plan.experts)
            assert 0 < engine.plan.expert_bytes < every_expert_bytes
    assert tokens == output[0, len(PROMPT) :].tolist()
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-4)
