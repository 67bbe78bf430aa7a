"""What torch allocates in a sweep is never more than the bounds that plans and leases are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch.profiler import ProfilerActivity, profile

from hermes_async import EngineConfig
from hermes_async.engine.image_prompt import encode_with_images
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.modeling.activations import SweepSize
from hermes_async.modeling.inputs import count_tokens, num_values
from hermes_async.modeling.kv_cache import KVPool, SequenceKV, num_blocks
from hermes_async.modeling.module_tensors import replaced_tensors
from hermes_async.modeling.packed import PackedBatch, PackedSequence, forward_packed
from hermes_async.modeling.transformers_api import plain_attention
from hermes_async.modeling.turn_state import tensors_of
from hermes_async.modeling.turns import TurnInput, Turns
from tests.image_models import NAMES, ImageModel, message, picture

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


# In turns: caches that grow, that have a window, recurrent states, and keys and values in compressed form.
LONG = SMALL | {"max_position_embeddings": 512}
LONG_HEADS = LONG | {"head_dim": 32}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
STATES = {"vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}
TURNS: dict[str, Callable[[], t.PreTrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**LONG),
    "llama-one-kv-head": lambda: t.LlamaConfig(**LONG | {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "gemma2": lambda: t.Gemma2Config(**LONG_HEADS, sliding_window=64),
    "gpt-oss": lambda: t.GptOssConfig(**LONG_HEADS, num_local_experts=8, num_experts_per_tok=4, sliding_window=64),
    "mistral": lambda: t.MistralConfig(**LONG_HEADS, sliding_window=64),
    "mamba": lambda: t.MambaConfig(**STATES),
    "jamba": lambda: t.JambaConfig(**LONG, num_experts=4, attn_layer_period=2, attn_layer_offset=1),
    "qwen3.5": lambda: t.Qwen3_5TextConfig(**LONG_HEADS, **DELTA),
    "qwen3-next": lambda: t.Qwen3NextConfig(
        **LONG_HEADS,
        **DELTA,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
    ),
    "deepseek-v3": lambda: t.DeepseekV3Config(
        **LONG | {"num_key_value_heads": 4},
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
}


def open_random(
    config: t.PreTrainedConfig,
    dtype: torch.dtype,
    path: Path,
    model_class: Any = None,
    batching: str = "auto",
) -> tuple[OpenedModel, dict[str, torch.Tensor]]:
    """A planned model, and weights for it."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config) if model_class is None else model_class(config)
    model.to(dtype).save_pretrained(path)
    opened = open_model(path, "1GiB", EngineConfig(batching=batching))
    weights = opened.skeleton.model.state_dict()
    return opened, {key: (torch.randn(one.shape) * 0.02).to(one.dtype) for key, one in weights.items()}


@dataclass(frozen=True)
class Allocated:
    """What torch allocated while it computed, beyond what was there before: most at one time, and at the end."""

    most_bytes: int
    left_bytes: int


def allocated(compute: Callable[[], object]) -> Allocated:
    """The result of `compute` is not left."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    in_use = list(accumulate((event.nbytes() for event in events), initial=0))
    return Allocated(max(in_use), in_use[-1])


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
        taken = allocated(lambda: forward_packed(model, opened.attention, batch)).most_bytes
        model.set_attn_implementation(plain_attention(model))
        alone = allocated(lambda: opened.skeleton.named_model(input_ids=token_ids, use_cache=False)).most_bytes
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
        taken = allocated(lambda: opened.skeleton.named_model(**inputs)).most_bytes
    opened.close()
    sequences, tokens = count_tokens(inputs, opened.probe)
    assert taken <= opened.bounds.plain(sequences=sequences, tokens=tokens) < 8 * taken


@pytest.mark.parametrize("name", TURNS)
def test_a_turn_takes_no_more_than_the_lease_and_the_bound(name: str, tmp_path: Path) -> None:
    opened, values = open_random(TURNS[name](), torch.bfloat16, tmp_path, batching="turns")
    model, layout = opened.skeleton.model, opened.probe.turns
    assert layout is not None
    turns = Turns(model, layout.traits)
    for length in (1, 40, 300):
        cache, held_bytes = turns.new_cache(drafts=True), 0
        token_ids = [idx % 90 for idx in range(length + 2)]
        chunk = [length * 2 // 3] if layout.traits.chunks and length > 1 else []
        for past, end in pairwise([0, *chunk, length, length + 1, length + 2]):
            turn = TurnInput(cache, token_ids[:end], past, num_outputs=1)
            with replaced_tensors(model, values):
                taken = allocated(lambda turn=turn: turns.forward(turn))  # type: ignore[misc]
            held_bytes += taken.left_bytes
            bound = opened.bounds.turns(layout, tokens=end - past, outputs=1, kv_bytes=layout.nbytes(end))
            assert taken.most_bytes <= bound
            assert bound < 8 * taken.most_bytes or end - past < 40
        lease_bytes = layout.nbytes(length + 2)
        assert held_bytes <= lease_bytes
        assert lease_bytes <= 1.5 * held_bytes + len(tensors_of(cache.contents)) * 4096  # a page for each tensor
    opened.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pixels", [32, 200])
def test_a_prompt_with_images_takes_no_more_than_the_bound(name: str, pixels: int, tmp_path: Path) -> None:
    tiny = ImageModel(tmp_path, name)
    opened = open_model(tmp_path, "1GiB", EngineConfig())
    images = [picture(seed, pixels, pixels) for seed in range(2)]
    prompt = encode_with_images(opened, [message(*images, "?")], tools=None, chat_template_kwargs=None)
    layout = opened.probe.turns
    assert layout is not None
    turns, model = Turns(opened.skeleton.model, layout.traits), opened.skeleton.model
    model.set_attn_implementation(plain_attention(model))
    turn = TurnInput(turns.new_cache(), prompt.token_ids, 0, num_outputs=1, model_inputs=prompt.model_inputs)
    with replaced_tensors(model, tiny.model.state_dict()), torch.inference_mode():
        taken = allocated(lambda: turns.forward(turn)).most_bytes
    size = SweepSize(turn_tokens=len(prompt.token_ids), turn_outputs=1, num_values=(num_values(prompt.model_inputs),))
    bound = opened.bounds.calls(size, kv_bytes=layout.nbytes(len(prompt.token_ids)))
    opened.close()
    assert taken <= bound < 64 * taken  # loose for models that are this small
