"""What a sweep's activations take is never more than the bound that plans are made with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch.profiler import ProfilerActivity, profile

from hermes_async import EngineConfig
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.modeling.inputs import count_tokens
from hermes_async.modeling.kv_cache import KVPool, SequenceKV, num_blocks
from hermes_async.modeling.module_tensors import replaced_tensors
from hermes_async.modeling.packed import PackedBatch, PackedSequence, forward_packed
from hermes_async.modeling.transformers_api import plain_attention

NUM_TOKENS = 192
SMALL = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HEADS = SMALL | {"head_dim": 32}
CONFIGS: dict[str, Callable[[], t.PreTrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**SMALL),
    "gemma2": lambda: t.Gemma2Config(**HEADS),
    "mixtral": lambda: t.MixtralConfig(**HEADS, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**HEADS, num_experts=16, num_experts_per_tok=8, moe_intermediate_size=48),
    "olmoe": lambda: t.OlmoeConfig(**SMALL, num_experts=16, num_experts_per_tok=8),
    "glm4-moe": lambda: t.Glm4MoeConfig(
        **HEADS, n_routed_experts=16, num_experts_per_tok=8, moe_intermediate_size=48, first_k_dense_replace=0
    ),
    "gpt-oss": lambda: t.GptOssConfig(**HEADS, num_local_experts=8, num_experts_per_tok=4),
    "granitemoe": lambda: t.GraniteMoeConfig(**SMALL, num_local_experts=16, num_experts_per_tok=8),
    "ernie4.5-moe": lambda: t.Ernie4_5_MoeConfig(**SMALL, moe_intermediate_size=48, moe_num_experts=16, moe_k=6),
    # With a table of rows for all layers.
    "gemma3n": lambda: t.Gemma3nTextConfig(
        **HEADS | {"intermediate_size": [512] * 2},
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=240,
        num_kv_shared_layers=0,
        laurel_rank=8,
        activation_sparsity_pattern=[0.95, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    ),
}


# What a plain forward pass of other models is given: of images three, of texts two.
IMAGES = {"pixel_values": torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
TEXTS = {"input_ids": torch.arange(2 * NUM_TOKENS).view(2, -1) % 90}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FORWARD: dict[str, tuple[Callable[[], t.PreTrainedConfig], dict[str, torch.Tensor]]] = {
    "ResNetModel": (lambda: t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]), IMAGES),
    "RegNetModel": (lambda: t.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]), IMAGES),
    "ViTModel": (lambda: t.ViTConfig(**VISION), IMAGES),
    "T5EncoderModel": (
        lambda: t.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=8),
        TEXTS,
    ),
    "BertModel": (lambda: t.BertConfig(**VISION, vocab_size=100), TEXTS),
}


def open_random(
    config: t.PreTrainedConfig, dtype: torch.dtype, path: Path, model_class: Any = None
) -> tuple[OpenedModel, dict[str, torch.Tensor]]:
    """A planned model, and weights for it."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
    model.to(dtype).save_pretrained(path)
    opened = open_model(path, "1GiB", EngineConfig())
    weights = opened.skeleton.model.state_dict()
    return opened, {key: (torch.randn(one.shape) * 0.02).to(one.dtype) for key, one in weights.items()}


def most_bytes(compute: Callable[[], object]) -> int:
    """Most that torch had allocated at one time while it computed, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = compute()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    assert result is not None
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sweep_takes_no_more_than_the_bound(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    opened, values = open_random(CONFIGS[name](), dtype, tmp_path)
    model = opened.skeleton.model
    pool = KVPool(opened.probe.kv, opened.probe.kv.nbytes(NUM_TOKENS))
    sequence = SequenceKV(pool, pool.allocate(num_blocks(NUM_TOKENS)))
    token_ids = torch.arange(NUM_TOKENS)[None] % 90
    batch = PackedBatch.of([PackedSequence(sequence, past=0, token_ids=token_ids[0].tolist(), num_outputs=1)])
    with replaced_tensors(model, values), torch.inference_mode():
        taken = most_bytes(lambda: forward_packed(model, opened.attention, batch))
        model.set_attn_implementation(plain_attention(model))
        alone = most_bytes(lambda: opened.skeleton.named_model(input_ids=token_ids, use_cache=False))
    pool.close()
    opened.close()
    kv_bytes = opened.probe.kv.nbytes(NUM_TOKENS)
    bound = opened.bounds.packed(tokens=NUM_TOKENS, outputs=1, kv_bytes=kv_bytes)
    assert bound / 4 < taken <= bound
    assert alone <= opened.bounds.plain(sequences=1, tokens=NUM_TOKENS)


@pytest.mark.parametrize("name", FORWARD)
def test_a_forward_pass_takes_no_more_than_the_bound(name: str, tmp_path: Path) -> None:
    config, inputs = FORWARD[name]
    opened, values = open_random(config(), torch.float32, tmp_path, getattr(t, name))
    with replaced_tensors(opened.skeleton.model, values), torch.inference_mode():
        taken = most_bytes(lambda: opened.skeleton.named_model(**inputs))
    opened.close()
    sequences, tokens = count_tokens(inputs, opened.probe)
    assert taken <= opened.bounds.plain(sequences=sequences, tokens=tokens) < 8 * taken
