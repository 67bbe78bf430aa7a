"""Every other architecture: refused by name when the engine opens, or right. Never wrong tokens.

Not here are those of which another file compares tokens and log-probabilities: mixtures whose experts lie apart
(`test_experts.py`), caches that are no keys and values (`test_turns.py`), and tables of rows (`test_row_tables.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import transformers as t
from transformers import PreTrainedConfig

import hermes_async

pytestmark = pytest.mark.anyio

ATOL = 5e-4  # of log-probabilities in float32; routers and scaled residuals make noise louder
WINDOW = 8  # shorter than most prompts
TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
GPT = TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
MIXED = ["sliding_attention", "full_attention"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    # Rotary embeddings that scale; windows; masks that are not plainly causal.
    "llama-rope-llama3": lambda: t.LlamaConfig(
        **GROUPED,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-rope-linear": lambda: t.LlamaConfig(**GROUPED, **rope("linear", factor=4.0)),
    "llama-rope-yarn": lambda: t.LlamaConfig(
        **GROUPED, **rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "llama-rope-dynamic": lambda: t.LlamaConfig(**GROUPED, **rope("dynamic", factor=4.0)),
    "llama-rope-dynamic-passed": lambda: t.LlamaConfig(
        **GROUPED, **rope("dynamic", factor=4.0, original_max_position_embeddings=16)
    ),
    "qwen2-mixed-windows": lambda: t.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3-mixed-windows": lambda: t.Qwen3Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma3-bidirectional": lambda: t.Gemma3TextConfig(
        **GROUPED, sliding_window=WINDOW, use_bidirectional_attention=True
    ),
    "falcon-alibi": lambda: t.FalconConfig(**SMALL, alibi=True),
    "llama4-chunked": lambda: t.Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=96, attention_chunk_size=WINDOW, moe_layers=[], num_local_experts=2
    ),
    "llama4-chunks-of-20": lambda: t.Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=96, attention_chunk_size=20, moe_layers=[], num_local_experts=2
    ),
    "llama4-experts": lambda: t.Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=96, attention_chunk_size=128, num_local_experts=2
    ),
    # Dense decoders.
    "apertus": lambda: t.ApertusConfig(**SMALL, num_key_value_heads=2),
    "arcee": lambda: t.ArceeConfig(**GROUPED),
    "bitnet": lambda: t.BitNetConfig(**SMALL, num_key_value_heads=2),
    "cohere": lambda: t.CohereConfig(**SMALL, num_key_value_heads=2, use_qk_norm=True),
    "cohere2": lambda: t.Cohere2Config(**GROUPED, sliding_window=WINDOW, layer_types=MIXED),
    "ctrl": lambda: t.CTRLConfig(**GPT, dff=96),
    "cwm": lambda: t.CwmConfig(**GROUPED, sliding_window=WINDOW, layer_types=MIXED),
    "diffllama": lambda: t.DiffLlamaConfig(**SMALL, num_key_value_heads=2),
    "doge": lambda: t.DogeConfig(**SMALL, num_key_value_heads=2),
    "ernie4.5": lambda: t.Ernie4_5Config(**GROUPED),
    "exaone4": lambda: t.Exaone4Config(**GROUPED, sliding_window=WINDOW, layer_types=MIXED),
    "gemma": lambda: t.GemmaConfig(**GROUPED),
    "glm": lambda: t.GlmConfig(**GROUPED),
    "glm4": lambda: t.Glm4Config(**GROUPED),
    "gpt-bigcode": lambda: t.GPTBigCodeConfig(**GPT, multi_query=True),
    "gpt-bigcode-multi-head": lambda: t.GPTBigCodeConfig(**GPT, multi_query=False),
    "gpt-neo-local": lambda: t.GPTNeoConfig(
        **TOKENS,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
    ),
    "gpt-neo-wide": lambda: t.GPTNeoConfig(
        **TOKENS,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=20,
        max_position_embeddings=128,
    ),
    "gpt-neox-japanese": lambda: t.GPTNeoXJapaneseConfig(**SMALL),
    "granite": lambda: t.GraniteConfig(**SMALL, num_key_value_heads=2, attention_multiplier=0.2),
    "granite-swa": lambda: t.GraniteSWAConfig(**SMALL, num_key_value_heads=2, sliding_window=WINDOW),
    "helium": lambda: t.HeliumConfig(**GROUPED),
    "hunyuan": lambda: t.HunYuanDenseV1Config(**GROUPED),
    "hyperclovax": lambda: t.HyperCLOVAXConfig(**SMALL, num_key_value_heads=2),
    "jais2": lambda: t.Jais2Config(**GROUPED),
    "ministral": lambda: t.MinistralConfig(**GROUPED, sliding_window=WINDOW, layer_types=MIXED),
    "ministral3": lambda: t.Ministral3Config(**GROUPED),
    "modernbert-decoder": lambda: t.ModernBertDecoderConfig(**SMALL, local_attention=WINDOW),
    "modernbert-decoder-wide": lambda: t.ModernBertDecoderConfig(**SMALL, local_attention=20),
    "moshi": lambda: t.MoshiConfig(**GROUPED, ffn_dim=192),
    "moshi-window": lambda: t.MoshiConfig(**GROUPED, ffn_dim=192, sliding_window=WINDOW),
    "nanochat": lambda: t.NanoChatConfig(**GROUPED),
    "nemotron": lambda: t.NemotronConfig(**GROUPED),
    "olmo": lambda: t.OlmoConfig(**SMALL, num_key_value_heads=2, clip_qkv=1.0),
    "olmo2": lambda: t.Olmo2Config(**SMALL, num_key_value_heads=2),
    "olmo3": lambda: t.Olmo3Config(**SMALL, num_key_value_heads=2, sliding_window=WINDOW, layer_types=MIXED),
    "persimmon": lambda: t.PersimmonConfig(**SMALL),
    "seed-oss": lambda: t.SeedOssConfig(**GROUPED),
    "smollm3": lambda: t.SmolLM3Config(**SMALL, num_key_value_heads=2, no_rope_layer_interval=2),
    "stablelm": lambda: t.StableLmConfig(**SMALL, num_key_value_heads=2),
    "stablelm-parallel": lambda: t.StableLmConfig(
        **SMALL, num_key_value_heads=2, use_parallel_residual=True, qk_layernorm=True
    ),
    "starcoder2-window": lambda: t.Starcoder2Config(**SMALL, num_key_value_heads=2, sliding_window=WINDOW),
    "vaultgemma": lambda: t.VaultGemmaConfig(
        **GROUPED, sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=16
    ),
    # Positions that are not given, or that come from the attention mask.
    "bart": lambda: t.BartConfig(
        **TOKENS,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        max_position_embeddings=128,
        is_decoder=True,
    ),
    "bert-decoder": lambda: t.BertConfig(**SMALL, is_decoder=True),
    "bert": lambda: t.BertConfig(**SMALL),
    "big-bird": lambda: t.BigBirdConfig(**SMALL, is_decoder=True, attention_type="original_full"),
    "biogpt": lambda: t.BioGptConfig(**SMALL),
    "electra-decoder": lambda: t.ElectraConfig(**SMALL, embedding_size=32, is_decoder=True),
    "megatron-bert-decoder": lambda: t.MegatronBertConfig(**SMALL, is_decoder=True),
    "mpt": lambda: t.MptConfig(**TOKENS, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    "rembert-decoder": lambda: t.RemBertConfig(
        **SMALL, input_embedding_size=32, output_embedding_size=32, is_decoder=True
    ),
    "roberta-decoder": lambda: t.RobertaConfig(**SMALL, is_decoder=True),
    "roformer-decoder": lambda: t.RoFormerConfig(**SMALL, is_decoder=True),
    "xglm": lambda: t.XGLMConfig(
        **TOKENS, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, max_position_embeddings=128
    ),
    "xlm-roberta-xl-decoder": lambda: t.XLMRobertaXLConfig(**SMALL, is_decoder=True),
    "xlnet": lambda: t.XLNetConfig(**TOKENS, d_model=64, n_layer=2, n_head=4, d_inner=96),
    # Keys and values that are not cached as they are used.
    "minicpm3": lambda: t.MiniCPM3Config(
        **SMALL, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
    ),
    "youtu": lambda: t.YoutuConfig(  # of a padding token, transformers clears the row of tied weights
        **{**SMALL, "pad_token_id": None},
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "gemma4-shared-kv": lambda: t.Gemma4TextConfig(
        **GROUPED | {"num_hidden_layers": 4},
        sliding_window=WINDOW,
        layer_types=MIXED * 2,
        global_head_dim=16,
        vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
    ),
    # Mixtures of experts.
    "jetmoe": lambda: t.JetMoeConfig(**SMALL, num_key_value_heads=2, kv_channels=16, num_local_experts=2),
    "mixtral-window": lambda: t.MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=WINDOW),
    # States that are not keys and values.
    "bamba": lambda: t.BambaConfig(
        **SMALL,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "falcon-mamba": lambda: t.FalconMambaConfig(**TOKENS, hidden_size=64, num_hidden_layers=4, state_size=8),
    "granitemoehybrid": lambda: t.GraniteMoeHybridConfig(
        **SMALL,
        num_key_value_heads=2,
        layers_block_type=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=8,
        mamba_n_groups=1,
        shared_intermediate_size=32,
        num_local_experts=0,
    ),
    # With pictures, and not causal at all.
    "gemma3-multimodal": lambda: t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**GROUPED, sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=16),
        vision_config=t.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=299,
        boi_token_index=298,
        eoi_token_index=297,
    ),
    "whisper": lambda: t.WhisperConfig(
        **TOKENS,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        decoder_start_token_id=1,
    ),
}
NUM_TOKENS = 6


# transformers up to 5.22 compiles functions of GPT-BigCode with what torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CONFIGS)
async def test_refused_by_name_or_right(
    name: str,
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
    least_budget: int,
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    model = random_model(CONFIGS[name]())
    path = save_model(model)
    try:
        async with hermes_async.Engine(path, memory_budget=least_budget) as engine:
            assert engine.plan.memory_budget == engine.plan.minimum_budget
            completions = await complete_all(engine, prompts, num_tokens=NUM_TOKENS)
    except hermes_async.UnsupportedModelError as error:
        assert name != "mixtral-window"  # each expert's matrices lie apart in its checkpoint
        family = re.sub(r"ForCausalLM|ForConditionalGeneration|LMHeadModel|Model|_", "", type(model).__name__)
        assert family.lower() in re.sub(r"[-_]", "", str(error)).lower()
        return
    assert_parity(completions, greedy_reference(path, prompts, num_tokens=NUM_TOKENS), atol=ATOL)


async def test_longrope_past_its_original_context_is_refused_or_right(
    random_model: Callable[..., Any],
    save_model: Callable[..., Path],
    greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
    least_budget: int,
) -> None:
    """There transformers turns to other frequencies, by the longest sequence in the row."""
    config = t.Phi3Config(
        **SMALL,
        num_key_value_heads=2,
        original_max_position_embeddings=32,
        **rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0 + i for i in range(8)], factor=4.0),
    )
    path = save_model(random_model(config))
    expected = greedy_reference(path, prompts, num_tokens=24)
    assert max(len(item.prompt) for item in expected) > 32
    params = hermes_async.SamplingParams(max_tokens=len(expected[0].token_ids), temperature=0.0, ignore_eos=True)
    completed: list[int] = []

    async def one(idx: int) -> None:
        try:
            completion = await engine.complete(prompts[idx], params)
        except hermes_async.ContextLengthError:
            assert len(prompts[idx]) >= 32
            return
        # A context of 32 tokens may also end a sequence.
        assert len(completion.token_ids) >= min(params.max_tokens or 0, 32 - len(prompts[idx]))
        assert list(completion.token_ids) == expected[idx].token_ids[: len(completion.token_ids)]
        completed.append(idx)

    async with (
        hermes_async.Engine(path, memory_budget=least_budget) as engine,
        anyio.create_task_group() as tasks,
    ):
        for idx in range(len(prompts)):
            tasks.start_soon(one, idx)
    assert len(completed) >= 3
