"""Encoders, vision models and heads at three budgets: `forward` gives transformers' own output object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    CanineConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    FunnelConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    Kosmos2_5Config,
    LlamaConfig,
    MarianConfig,
    MistralConfig,
    ModernBertConfig,
    NomicBertConfig,
    PreTrainedConfig,
    ProphetNetConfig,
    PvtV2Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from hermes_async import Engine, EngineConfig
from hermes_async.engine.opening import open_model
from hermes_async.modeling.model_classes import encoder_class

pytestmark = pytest.mark.anyio

ATOL = 1e-5
CONFIG = EngineConfig(max_tokens_per_sweep=128)
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = LAYERS | {"vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}
VISION = LAYERS | {"image_size": 16, "patch_size": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GPT = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
CLIP_TEXT = TEXT | {"bos_token_id": 1, "eos_token_id": 2}

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "BertModel": lambda: BertConfig(**TEXT),
    "BertForMaskedLM": lambda: BertConfig(**TEXT),
    "BertForSequenceClassification": lambda: BertConfig(**TEXT, num_labels=5),
    "BertForTokenClassification": lambda: BertConfig(**TEXT, num_labels=5),
    "BertForQuestionAnswering": lambda: BertConfig(**TEXT),
    "RobertaModel": lambda: RobertaConfig(**TEXT),
    "RobertaForMaskedLM": lambda: RobertaConfig(**TEXT),
    "DistilBertModel": lambda: DistilBertConfig(
        vocab_size=300, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=3, n_heads=4
    ),
    "DistilBertForSequenceClassification": lambda: DistilBertConfig(
        vocab_size=300, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=3, n_heads=4
    ),
    "ModernBertModel": lambda: ModernBertConfig(**TEXT, **SPECIAL, local_attention=4),
    "ModernBertForMaskedLM": lambda: ModernBertConfig(**TEXT, **SPECIAL),
    "ViTModel": lambda: ViTConfig(**VISION),
    "ViTForImageClassification": lambda: ViTConfig(**VISION, num_labels=5),
    "DeiTForImageClassification": lambda: DeiTConfig(**VISION, num_labels=5),
    "Dinov2Model": lambda: Dinov2Config(**VISION),
    "Dinov2ForImageClassification": lambda: Dinov2Config(**VISION, num_labels=5),
    "CLIPTextModel": lambda: CLIPTextConfig(**CLIP_TEXT),
    "CLIPTextModelWithProjection": lambda: CLIPTextConfig(**CLIP_TEXT),
    "CLIPVisionModel": lambda: CLIPVisionConfig(**VISION),
    "CLIPVisionModelWithProjection": lambda: CLIPVisionConfig(**VISION),
    "CLIPModel": lambda: CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION),
    "LlamaForSequenceClassification": lambda: LlamaConfig(**TEXT, num_key_value_heads=2, num_labels=5),
    # Its checkpoint has no head: no text, but vectors.
    "MistralModel": lambda: MistralConfig(**TEXT, num_key_value_heads=2),
    "Gemma3TextModel": lambda: Gemma3TextConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, sliding_window=6, use_bidirectional_attention=True
    ),
    "NomicBertModel": lambda: NomicBertConfig(**TEXT),  # its checkpoint has query, key and value in one tensor
    "MarianModel": lambda: MarianConfig(
        vocab_size=300,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
    "T5ForConditionalGeneration": lambda: T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    # Its decoder uses a weight of its position embeddings again when their call is over.
    "ProphetNetModel": lambda: ProphetNetConfig(
        vocab_size=300,
        hidden_size=32,
        encoder_ffn_dim=64,
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
    ),
    # These make groups of tokens, and do not run on two.
    "CanineModel": lambda: CanineConfig(**LAYERS, num_hash_buckets=64, num_hash_functions=4, pad_token_id=0),
    "FunnelModel": lambda: FunnelConfig(
        vocab_size=300, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[1, 1, 1]
    ),
    # Each of its stages has its own number of heads.
    "PvtV2ForImageClassification": lambda: PvtV2Config(
        image_size=16,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        sr_ratios=[2, 1, 1, 1],
        num_labels=5,
    ),
    # These generate too.
    "LlamaForCausalLM": lambda: LlamaConfig(**TEXT, num_key_value_heads=2),
    "GPT2LMHeadModel": lambda: GPT2Config(**GPT),
    "GPT2Model": lambda: GPT2Config(**GPT),  # whose head is tied, so it is not missing
    "GPTJForCausalLM": lambda: GPTJConfig(**GPT, rotary_dim=8),  # attends by itself
}


def some_inputs(name: str, seed: int) -> dict[str, torch.Tensor]:
    """Two sequences of different lengths, or two images, or both; other lengths with another seed."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}
    if any(kind in name for kind in ("ViT", "DeiT", "Dino", "Vision", "CLIPModel", "Pvt")):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    if "pixel_values" not in inputs or name == "CLIPModel":
        length = 7 + seed
        inputs["input_ids"] = torch.randint(3, 300, (2, length), generator=generator)
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        if not name.startswith("GPT"):  # their positions do not follow the mask, and what is masked differs
            inputs["input_ids"][1, -2:] = 0
            inputs["attention_mask"][1, -2:] = 0
    if name.startswith(("T5", "Marian", "ProphetNet")):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    return inputs


@dataclass(frozen=True)
class Subject:
    path: Path
    inputs: list[dict[str, torch.Tensor]]
    expected: list[Any]
    budgets: dict[str, int]


@pytest.fixture(scope="module", params=MODELS)
def subject(
    request: pytest.FixtureRequest, random_model: Callable[..., Any], save_model: Callable[..., Path]
) -> Subject:
    model_class = getattr(transformers, request.param)
    path = save_model(random_model(MODELS[request.param](), model_class=model_class))
    model = model_class.from_pretrained(path).eval()
    inputs = [some_inputs(request.param, seed) for seed in range(3)]
    with torch.inference_mode():
        expected = [model(**given) for given in inputs]
    opened = open_model(path, "64MiB", CONFIG)
    opened.close()
    least = opened.plan.minimum_budget
    budgets = {"smallest": least, "middle": least + opened.plan.weight_bytes // 4, "resident": 64 << 20}
    return Subject(path, inputs, expected, budgets)


def check_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    names = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert names
    for name in names:
        torch.testing.assert_close(actual[name], expected[name], atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("budget", ["smallest", "middle", "resident"])
async def test_passes_together_and_alone_are_those_of_transformers(subject: Subject, budget: str) -> None:
    outputs: list[Any] = [None] * 3
    async with Engine(subject.path, memory_budget=subject.budgets[budget], config=CONFIG) as engine:

        async def run(idx: int) -> None:
            outputs[idx] = await engine.forward(**subject.inputs[idx])

        async with anyio.create_task_group() as group:
            for idx in range(3):
                group.start_soon(run, idx)
        together = engine.statistics().sweeps
        outputs.append(await engine.forward(**subject.inputs[0]))
        statistics = engine.statistics()
        assert statistics.sweeps == together + 1
        assert together < 3
        assert statistics.peak_bytes_in_use <= engine.plan.memory_budget
        assert (engine.plan.bytes_per_sweep == 0) == (budget == "resident")
    for actual, expected in zip(outputs, [*subject.expected, subject.expected[0]], strict=True):
        check_same(actual, expected)


async def test_a_weight_that_is_asked_for_its_device_before_it_is_loaded(
    random_model: Callable[..., Any], save_model: Callable[..., Path]
) -> None:
    """A model that makes tensors on that device would compute with ones that hold nothing."""
    text = {"vocab_size": 300, "embed_dim": 32, "ffn_dim": 64, "layers": 2, "attention_heads": 4}
    vision = LAYERS | {"head_dim": 8, "patch_embed_hidden_size": 48, "patch_size": 4, "max_num_patches": 16}
    config = Kosmos2_5Config(text_config=text | {"max_position_embeddings": 64}, vision_config=vision)
    path = save_model(random_model(config, model_class=transformers.Kosmos2_5Model))
    inputs = some_inputs("Kosmos2_5Model", 0)
    with torch.inference_mode():
        expected = transformers.Kosmos2_5Model.from_pretrained(path).eval()(**inputs)
    async with Engine(path, memory_budget="64MiB") as engine:
        check_same(await engine.forward(**inputs), expected)


def test_what_a_checkpoint_names_decides_whether_it_generates() -> None:
    def named(config: PreTrainedConfig, *architectures: str) -> Any:
        config.architectures = list(architectures)
        return encoder_class(config)

    assert named(LlamaConfig(), "LlamaForCausalLM") is named(LlamaConfig(), "LlamaModel") is None
    assert named(LlamaConfig()) is named(LlamaConfig(), "NoSuchModel") is named(LlamaConfig(), "LlamaConfig") is None
    assert named(BertConfig(is_decoder=True), "BertLMHeadModel") is None
    assert named(BertConfig(), "BertModel") is transformers.BertModel
    assert named(LlamaConfig(), "LlamaForTokenClassification") is transformers.LlamaForTokenClassification
    assert named(MarianConfig(), "MarianModel") is transformers.MarianModel
    assert named(Gemma3TextConfig(), "Gemma3TextModel") is None
    both_ways = Gemma3TextConfig(use_bidirectional_attention=True)
    assert named(both_ways, "Gemma3TextModel") is transformers.Gemma3TextModel
    assert named(ViTConfig(), "ViTModel") is transformers.ViTModel
