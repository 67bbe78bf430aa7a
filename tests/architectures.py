"""Every class of transformers that generates, as a model so small that it is made and run at once.

`tiny_config` shrinks the default configuration of a model type: few layers, one of each kind at least, and small sizes.
Windows, chunks and the like are shorter than a prompt of 40 tokens, as they would make no difference otherwise. Where
this is not enough, `_EXCEPTIONS` has other values for a model type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hermes_async.modeling.skeleton import token_embedding

VOCAB_SIZE = 200
FIRST_SPECIAL_TOKEN = 180  # from here on, token ids may stand for images and the like
CONTEXT_LENGTH = 256
WINDOW = 12
_MAX_LAYERS = 6

_SIZES = {
    # Tokens and positions.
    VOCAB_SIZE: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    CONTEXT_LENGTH: (
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
        "max_source_positions model_max_length num_position_embeddings"
    ),
    # Windows, chunks and what else is counted in tokens.
    WINDOW: (
        "sliding_window sliding_window_size attention_window_size window_size local_attention keep_window_size "
        "rel_extent attention_chunk_size index_topk"
    ),
    # Heads, states and ranks; the most experts.
    8: (
        "chunk_size mamba_chunk_size block_size floor_scale log_scaling_n_floor head_dim swa_head_dim "
        "global_head_dim kv_channels dim_head d_kv d_head attention_head_size qk_nope_head_dim qk_rope_head_dim "
        "v_head_dim index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim "
        "mamba_d_head mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank adapter_rank "
        "hidden_size_per_layer_input laurel_rank d_rel router_hidden_size rotary_dim n_routed_experts num_buckets "
        "relative_attention_num_buckets position_bias_num_buckets"
    ),
    # Widths.
    32: (
        "hidden_size n_embd d_model embedding_dim emb_dim lru_width attention_hidden_size word_embed_proj_dim "
        "query_pre_attn_scalar dim_model_base backbone_hidden_size moe_intermediate_size "
        "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size out_hidden_size embed_dim projection_dim "
        "projection_size projector_hidden_size projector_input_dim projector_output_dim vision_output_dim "
        "text_hidden_size audio_hidden_size output_dim image_size downsample_hidden_size n_state"
    ),
    48: (
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_ff "
        "d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim"
    ),
    # With fewer heads, an indexer scores many keys zero, and rounding chooses among them.
    16: (
        "embedding_size input_embedding_size output_embedding_size kv_lora_rank q_lora_rank o_lora_rank index_n_heads"
    ),
    # Heads, groups, experts and layers.
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads num_experts num_local_experts "
        "moe_num_experts zero_expert_num"
    ),
    2: (
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads "
        "linear_num_key_heads n_groups mamba_n_groups mamba_ngroups n_mamba_heads num_experts_per_tok "
        "num_experts_per_token moe_k moe_topk top_k_experts encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers n_layers_per_attn_res_block depth"
    ),
    1: (
        "n_group num_expert_group topk_group first_k_dense_replace num_dense_layers moe_top_k n_shared_experts "
        "num_shared_experts moe_num_shared_experts"
    ),
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What a model type needs beyond that. Values of parts are in mappings.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED_KV = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_GEMMA3N = _SHARED_KV | {"intermediate_size": [48] * 5, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0]}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "eos_token_id": 2,
}
_BLT_PART = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT_LENGTH, "sliding_window": WINDOW}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": WINDOW,
        "vocab_size": 260,
        "encoder_config": _BLT_PART | {"hidden_size_global": 32, "vocab_size": 260},
        "decoder_config": _BLT_PART | {"hidden_size_global": 32, "vocab_size": 260},
        "patcher_config": _BLT_PART | {"vocab_size": 260},
        "global_config": _BLT_PART,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE | {"mrope_section": [2, 1, 1]}, "sliding_attention": None},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cpmant": {"prompt_length": 4, "segment_types": 4, "prompt_types": 4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 16,
        }.items()
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_groups": 1},
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _SHARED_KV,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "roc_bert": {
        "shape_vocab_size": 64,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 64,
        "pronunciation_embed_dim": 16,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": WINDOW,
    },
}
_EXCEPTIONS["gemma3n"] = {"text_config": _GEMMA3N}
_EXCEPTIONS["gemma4"] = {"text_config": _SHARED_KV}
_EXCEPTIONS["qwen4_exp"] = {"text_config": _QWEN4}
_EXCEPTIONS["dots3_note"] = {
    "text_config": _EXCEPTIONS["dots3_note_text"],
    "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
}
_MROPE = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}}
_EXCEPTIONS |= dict.fromkeys(("glm46v", "glm4v", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), _MROPE)
_EXCEPTIONS["glm_ocr"] = {"text_config": {"head_dim": 16, "rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}}}
_EXCEPTIONS["glmga"] = {
    "text_config": {
        "head_dim": 16,
        "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    }
}
_EXCEPTIONS["glm4v_moe"] = {"text_config": _MROPE["text_config"] | {"head_dim": 16}}
_EXCEPTIONS["cohere_compass"] = {"text_config": _EXCEPTIONS["cohere_compass_text"]}
_EXCEPTIONS["hunyuan_vl"] = {"text_config": _MROPE["text_config"] | {"head_dim": 8}}
_EXCEPTIONS["glm5_next"] = {"text_config": {"index_topk": 16, "index_kpool": 4}}
_EXCEPTIONS["deepseek_ocr2"] = {"text_config": {"mlp_layer_types": ["dense", "sparse"]}}
_EXCEPTIONS["step3p7"] = {"text_config": {"sliding_window": WINDOW}}
_EXCEPTIONS["nemotron_h_omni"] = {"vision_config": {"video_temporal_patch_size": 2}}
_EXCEPTIONS["molmo2"] = {"adapter_config": {"vision_feature_layer": [1, 0]}}

# What transformers itself does not generate text with, from token ids alone.
NOT_FROM_TEXT = {
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "generates codes of audio, in several rows",
    "musicgen_melody": "generates codes of audio, in several rows",
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default configuration of `model_type`, shrunk; `changes` come last."""
    config_class = CONFIG_MAPPING[model_type]
    return AutoConfig.for_model(model_type, **_merged(_shrunk(config_class), _EXCEPTIONS.get(model_type, {}), changes))


def _shrunk(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments of `config_class`."""
    default = config_class()
    given: dict[str, Any] = {}
    values = vars(default)
    special = iter(range(FIRST_SPECIAL_TOKEN, VOCAB_SIZE))
    for field in dataclasses.fields(config_class):
        value = values.get(config_class.attribute_map.get(field.name, field.name))
        if field.name in config_class.sub_configs:
            if isinstance(value, PreTrainedConfig):
                given[field.name] = {"model_type": type(value).model_type} | _shrunk(type(value))
        elif field.name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            given[field.name] = value | {"mrope_section": [2, 1, 1]}  # of half a head
        elif field.name in _TOKENS:
            if value is not None:
                given[field.name] = _TOKENS[field.name]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif field.name.endswith(("_token_id", "_token_index")):
            given[field.name] = next(special)
        elif field.name in _SMALL and value > 0:
            given[field.name] = _SMALL[field.name]
    if values.get("is_decoder") is False and not values.get("is_encoder_decoder"):
        given["is_decoder"] = True  # of models that are also encoders
    if given.get("num_key_value_heads") and values["num_key_value_heads"] == values.get("num_attention_heads"):
        given["num_key_value_heads"] = given["num_attention_heads"]
    return given | _few_layers(values)


def _few_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and what configurations list for each: the first layers of each kind, at least two."""
    name = next((name for name in _NUM_LAYERS if isinstance(values.get(name), int)), None)
    if name is None:
        return {}
    num_layers = values[name]
    lists = {
        key: value
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == num_layers and not key.startswith("_")
    }
    kinds = [tuple(map(str, kinds)) for kinds in zip(*lists.values(), strict=True)]
    chosen = sorted({kinds.index(kind) for kind in kinds})[:_MAX_LAYERS]
    for idx in range(num_layers):
        if len(chosen) < 2 and idx not in chosen:
            chosen = sorted([*chosen, idx])
    return {name: max(2, len(chosen))} | {key: [value[idx] for idx in chosen] for key, value in lists.items()}


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            old = result.get(name)
            result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


KINDS: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "images": AutoModelForImageTextToText,
    "seq2seq": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
}
_MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "images": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


def model_types(kind: str) -> list[tuple[str, str]]:
    """All model types of a kind, each with the name of its class."""
    return [(model_type, str(name)) for model_type, name in _MAPPINGS[kind].items()]


def random_model(
    config: PreTrainedConfig,
    model_class: Any = AutoModelForCausalLM,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Makes a model whose greedy tokens vary: weights far larger than at the start of a training."""
    torch.manual_seed(seed)
    make_model = getattr(model_class, "from_config", model_class)
    model: PreTrainedModel = make_model(config).float()
    embedding = getattr(token_embedding(model), "weight", None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # A tied head gives an embedding that is not small the last token again and again.
            std = 0.05 if parameter is embedding else 0.3
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)
            else:  # norms, which begin at one (or at zero, where one is added), and biases
                parameter += torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
    start = getattr(config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=(start or 0) if getattr(config, "is_encoder_decoder", False) else None
    )
    return model.to(dtype).eval()
