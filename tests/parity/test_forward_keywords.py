"""Every keyword of a model's forward means what it means in transformers, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hermes_async import Engine, EngineConfig, MemoryBudgetError, RequestError

pytestmark = pytest.mark.anyio

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
VISION: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CROSS = {"is_decoder": True, "add_cross_attention": True}
MODELS: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "bert mlm": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "bert classes": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**SIZES, pad_token_id=1)),
    "bert decoder": lambda: BertModel(BertConfig(**SIZES, **CROSS)),
    "bert lm with cross-attention": lambda: BertLMHeadModel(BertConfig(**SIZES, **CROSS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "gpt2 with cross-attention": lambda: GPT2LMHeadModel(GPT2Config(**GPT, add_cross_attention=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VISION)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=SIZES, vision_config=VISION, projection_dim=16)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "t5 encoder": lambda: T5EncoderModel(T5Config(**T5)),
}
IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]
WIDE = np.random.default_rng(1).standard_normal((2, 4, 32)).astype(np.float32)
PIXELS = np.random.default_rng(2).standard_normal((2, 3, 16, 16)).astype(np.float32)
ENCODED = np.random.default_rng(4).standard_normal((2, 6, 32)).astype(np.float32)
OTHER = [[20, 21, 22], [23, 24, 25]]
LARGER = np.random.default_rng(3).standard_normal((1, 3, 24, 24)).astype(np.float32)
TEXT: list[dict[str, Any]] = [
    {"input_ids": IDS, "attention_mask": MASK},
    {"input_ids": IDS, "return_dict": False},
    {"input_ids": IDS, "return_dict": True, "output_hidden_states": True},
    {"input_ids": IDS, "output_hidden_states": 1},
    {"input_ids": IDS, "output_attentions": True},
    {"input_ids": IDS, "output_attentions": np.bool_(False), "output_hidden_states": False},
]
PLACED: list[dict[str, Any]] = [
    {"input_ids": IDS, "position_ids": [[3, 2, 1, 0]]},
    {"inputs_embeds": WIDE, "attention_mask": MASK},
]
DECODER = [
    *TEXT,
    *PLACED,
    {"input_ids": IDS, "use_cache": False},
    {"input_ids": IDS, "logits_to_keep": 1},
    {"input_ids": IDS, "logits_to_keep": np.int64(2)},
    {"input_ids": IDS, "logits_to_keep": [0, 2]},
    {"input_ids": IDS, "labels": IDS},
    {"input_ids": IDS, "labels": IDS, "num_items_in_batch": 3},
]
IMAGE: list[dict[str, Any]] = [
    {"pixel_values": PIXELS, "output_hidden_states": True},
    {"pixel_values": PIXELS, "return_dict": False},
    {"pixel_values": LARGER, "interpolate_pos_encoding": True},
]
CROSSED: list[dict[str, Any]] = [
    {"input_ids": IDS, "encoder_hidden_states": ENCODED},
    {"input_ids": IDS, "encoder_hidden_states": ENCODED, "encoder_attention_mask": [[1] * 6, [1] * 3 + [0] * 3]},
]
CALLS: dict[str, list[dict[str, Any]]] = {
    # An encoder ignores encoder_hidden_states; so it does here.
    "bert": [*TEXT, *PLACED, {"input_ids": IDS, "token_type_ids": [[0, 0, 1, 1]] * 2}, CROSSED[0]],
    "bert decoder": [*TEXT, *CROSSED],
    "gpt2": [*DECODER, {"input_ids": IDS, "token_type_ids": [[0, 0, 1, 1], [59, 5, 1, 1]]}],
    "bert mlm": [*TEXT, {"input_ids": IDS, "labels": IDS}],
    "bert classes": [*TEXT, {"input_ids": IDS, "labels": [0, 2]}],
    "roberta": [*TEXT, *PLACED, {"input_ids": IDS, "labels": [[0, 1, 0, 1]] * 2}],
    "llama": DECODER,
    "mixtral": [*DECODER, {"input_ids": IDS, "output_router_logits": True}],
    "vit": [*IMAGE, {"pixel_values": PIXELS, "labels": [0, 1]}],
    "clip": [
        {"pixel_values": PIXELS, "input_ids": IDS, "return_loss": True},
        {"pixel_values": PIXELS, "input_ids": IDS, "return_dict": False},
        {"pixel_values": LARGER, "input_ids": IDS, "interpolate_pos_encoding": True},
    ],
    "t5": [
        {"input_ids": IDS, "decoder_input_ids": IDS, "output_hidden_states": True},
        {"input_ids": IDS, "labels": IDS, "return_dict": False},
        {
            "input_ids": IDS,
            "attention_mask": MASK,
            "decoder_input_ids": OTHER,
            "decoder_attention_mask": [[1, 1, 0]] * 2,
        },
        {"inputs_embeds": WIDE, "decoder_input_ids": OTHER},
        {"input_ids": IDS, "decoder_inputs_embeds": WIDE[:, :3]},
    ],
    "t5 encoder": [*TEXT, {"inputs_embeds": WIDE}],
}


def given(inputs: dict[str, Any]) -> dict[str, Any]:
    """As transformers wants it."""
    kept: dict[str, Any] = {}
    for key, value in inputs.items():
        kept[key] = torch.as_tensor(np.asarray(value)) if isinstance(value, (list, np.ndarray)) else value
        kept[key] = value.item() if isinstance(value, np.generic) else kept[key]
        if key == "output_hidden_states":
            kept[key] = bool(value)  # 1 gives a tuple with gaps
    return kept


def check_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            check_same(actual[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            check_same(one, other)
    else:
        assert actual == expected


@pytest.mark.parametrize("budget", ["64MiB", "smallest"])
@pytest.mark.parametrize("name", CALLS)
async def test_keywords_mean_what_they_mean_in_transformers(name: str, budget: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    MODELS[name]().eval().save_pretrained(tmp_path)
    model = type(MODELS[name]()).from_pretrained(tmp_path).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    cached = {"use_cache": False} if name in ("bert decoder", "gpt2", "llama", "mixtral", "t5") else {}
    options: dict[str, Any] = {"memory_budget": "64MiB"}
    if budget == "smallest":
        options = {"config": EngineConfig(max_tokens_per_sweep=32), "memory_budget": 1}
        with pytest.raises(MemoryBudgetError) as caught:
            async with Engine(tmp_path, **options):
                pytest.fail("entered")
        options["memory_budget"] = caught.value.minimum_bytes
    async with Engine(tmp_path, **options) as engine:
        for inputs in CALLS[name]:
            if budget == "smallest" and name == "clip" and "interpolate_pos_encoding" in inputs:
                # The table of positions is loaded for its own forward alone, which then is not called.
                with pytest.raises(RequestError, match=r"cannot be given .*, interpolate_pos_encoding together here"):
                    await engine.forward(**inputs)
                continue
            with torch.inference_mode():
                expected = model(**given(inputs | cached))
            check_same(await engine.forward(**inputs), expected)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("bert", {"interpolate_pos_encoding": True}, "takes no 'interpolate_pos_encoding'"),
        ("bert", {"num_items_in_batch": 2}, "takes no 'num_items_in_batch'"),
        ("bert", {"logits_to_keep": 1}, "takes no 'logits_to_keep'"),
        ("bert", {"cu_seq_lens_q": [0, 4]}, "takes no 'cu_seq_lens_q'"),
        ("bert", {"return_dict": "no"}, "return_dict must be True or False, not str"),
        ("bert", {"output_hidden_states": [True]}, "output_hidden_states must be True or False, not list"),
        ("llama", {"use_cache": True}, "takes no use_cache"),
        ("llama", {"use_cache": 1}, "takes no use_cache"),
        ("llama", {"past_key_values": [1]}, "takes no past_key_values"),
        ("t5", {"encoder_outputs": [WIDE]}, "takes no encoder_outputs"),
        ("llama", {"encoder_hidden_states": ENCODED}, "takes no 'encoder_hidden_states'"),
        ("t5", {"encoder_hidden_states": ENCODED}, "takes no 'encoder_hidden_states'"),
        ("gpt2", {"encoder_hidden_states": ENCODED}, "does not run on these inputs: ValueError: If `encoder_hidden_st"),
        *(
            (name, {"encoder_hidden_states": ENCODED}, "cannot be given input_ids, encoder_hidden_states together here")
            for name in ("gpt2 with cross-attention", "bert lm with cross-attention")
        ),
        ("gpt2", {"token_type_ids": [[0, 60, 0, 0]] * 2}, "token id 60 is out of the vocabulary, which has 60"),
        (
            "gpt2",
            {"token_type_ids": [0, 1]},
            r"token_type_ids must be integers \[batch, tokens\], not torch.int64 \[2\]",
        ),
    ],
)
async def test_keywords_that_are_refused(name: str, inputs: dict[str, Any], message: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        with pytest.raises(RequestError, match=message):
            await engine.forward(input_ids=IDS, **inputs)
