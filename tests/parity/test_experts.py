"""Every architecture that uses transformers' interface for experts: read one by one, they give transformers' tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import transformers
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hermes_async import Engine, EngineConfig
from hermes_async.engine.model_planner import ModelPlanner
from hermes_async.planning.plan import Plan
from tests.architectures import KINDS, random_model, tiny_config

pytestmark = pytest.mark.anyio

ATOL = 5e-4  # of log-probabilities in float32
NUM_TOKENS = 4
LENGTHS = (1, 19, 6)
NUM_EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")  # names of one setting

# By model type, the classes of experts of each, and what its small configuration needs.
CAUSAL = {
    "afmoe": "AfmoeExperts",
    "aria_text": "AriaExperts",
    "axk1": "AXK1Experts",
    "axk2": "AXK2Experts",
    "bailing_hybrid": "BailingHybridExperts",
    "beam": "BeamExperts",
    "cohere2_moe": "Cohere2MoeExperts",
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "deepseek_v32": "DeepseekV32Experts",
    "deepseek_v4": "DeepseekV4Experts",
    "dots1": "Dots1Experts",
    "dots3_note_text": "Dots3NoteExperts",
    "ernie4_5_moe": "Ernie4_5_MoeExperts",
    "exaone_moe": "ExaoneMoeExperts",
    "flex_olmo": "FlexOlmoExperts",
    "flint": "FlintExperts",
    "gemma4_text": "Gemma4TextExperts",
    "glm4_moe": "Glm4MoeExperts",
    "glm4_moe_lite": "Glm4MoeLiteExperts",
    "glm_moe_dsa": "GlmMoeDsaExperts",
    "gpt_oss": "GptOssExperts",
    "granitemoe": "GraniteMoeExperts",
    "granitemoe_swa": "GraniteMoeSWAExperts",
    "granitemoehybrid": "GraniteMoeHybridExperts",
    "granitemoeshared": "GraniteMoeSharedExperts",
    "hunyuan_v1_moe": "HunYuanMoEV1Experts",
    "hy_v3": "HYV3Experts",
    "hy_v4": "HYV4Experts",
    "inkling_text": "InklingExperts",
    "jamba": "JambaExperts",
    "kimi_linear": "KimiLinearExperts",
    "kolibri1": "Kolibri1Experts",
    "laguna": "LagunaExperts",
    "lfm2_moe": "Lfm2MoeExperts",
    "mellum": "MellumExperts",
    "mimo_v2_flash": "MiMoV2FlashExperts",
    "minimax": "MiniMaxExperts",
    "minimax_m2": "MiniMaxM2Experts",
    "minimax_m3_vl_text": "MiniMaxM3VLExperts",
    "mixtral": "MixtralExperts",
    "nemotron_h": "NemotronHExperts",
    "olmoe": "OlmoeExperts",
    "phimoe": "PhimoeExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_5_moe_text": "Qwen3_5MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "qwen3_next": "Qwen3NextExperts",
    "qwen4_exp_text": "Qwen4ExpTextExperts",
    "solar_open": "SolarOpenExperts",
    "zaya": "ZayaExperts",
}
IMAGES = {
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeMoeExperts",
    "hy_v4_vl": "HYV4VLExperts",
    "glm4v_moe": "Glm4vMoeTextExperts",
    "glm5_next": "Glm5NextTextExperts",
    "mistral4": "Mistral4Experts",
    "mistral_large4": "MistralLarge4TextExperts",
    "muse_spark": "MuseSparkExperts",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerTextExperts",
}
CONVERTED = {"ernie4_5_vl_moe", "mistral_large4"}
"""Their own checkpoints would have to be converted, and are refused. These here are as transformers holds them."""

MERGED = {
    "lara_mini": "LaraMiniExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "deepseek_v3": "DeepseekV3Experts",
}
NOT_HERE = {
    "Qwen3VLMoeTextExperts": "stored transposed: refused",
    "DeepseekOcr2TextExperts": "the vision tower takes no attention but transformers' own: refused",
    "UnlimitedOcrTextExperts": "the vision tower takes no attention but transformers' own: refused",
    "Inkling2Experts": "gate and up are stored interleaved: refused, see docs/models.md",
    "Inkling2LoopExperts": "gate and up are stored interleaved: refused",
    "DiffusionGemmaTextExperts": "the model does not generate token by token",
    "OpenAIPrivacyFilterExperts": "the model does not generate: see its own test",
    "Qwen3OmniMoeTalkerTextExperts": "a part of a model that the engine does not use",
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
CHANGES: dict[str, dict[str, Any]] = {
    "ernie4_5_vl_moe": {
        "text_config": {"moe_num_experts": 32, "moe_intermediate_size": [32, 32], "rope_parameters": _ROPE}
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 181},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {"enable_moe_block": True, "moe_intermediate_size": 32, "top_k_experts": 2, "num_experts": 8},
}


def known(model_types: Iterable[str]) -> list[str]:
    """Those that this version of transformers has."""
    return [model_type for model_type in model_types if model_type in CONFIG_MAPPING]


def tiny_mixture(model_type: str, kind: Any) -> PreTrainedModel:
    """Has 8 experts in each layer, or what its configuration lists for each."""
    changes = CHANGES.get(model_type, {})
    config = tiny_config(model_type, **changes)
    text = config.get_text_config()
    own = [name for name in NUM_EXPERTS if name not in text.attribute_map]
    more: dict[str, Any] = {name: 8 for name in own if isinstance(getattr(text, name, None), int)}
    if text is not config:
        more, changes = changes | {"text_config": more | changes.get("text_config", {})}, {}
    return random_model(tiny_config(model_type, **more | changes), kind)


@pytest.fixture
def smallest_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine has the smallest budget that works, whatever it is given; so each model is opened once."""
    plan = ModelPlanner.plan

    def smallest(planner: ModelPlanner, budget: int) -> Plan:
        return plan(planner, plan(planner, budget).minimum_budget)

    monkeypatch.setattr(ModelPlanner, "plan", smallest)


@pytest.fixture
def check(
    smallest_budget: None,
    tmp_path: Path,
    generated_by: Callable[..., list[Any]],
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> Callable[..., Any]:
    """That experts are read one by one, and all prompts at once give transformers' tokens and log-probabilities."""

    async def same(model: PreTrainedModel, **saved: Any) -> None:
        model.save_pretrained(tmp_path, **saved)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(3, 180, (length,), generator=generator).tolist() for length in LENGTHS]
        expected = generated_by(model, prompts, num_tokens=NUM_TOKENS)
        async with Engine(tmp_path, memory_budget="64MiB") as engine:
            completions = await complete_all(engine, prompts, num_tokens=NUM_TOKENS)
            plan = engine.plan
        assert plan.minimum_budget == plan.memory_budget
        assert plan.experts
        assert plan.expert_bytes < sum(expert.slot_bytes for expert in plan.experts)
        assert_parity(completions, expected, atol=ATOL)

    return same


@pytest.mark.parametrize("model_type", known(CAUSAL))
async def test_tokens_are_those_of_transformers(model_type: str, check: Callable[..., Any]) -> None:
    await check(tiny_mixture(model_type, KINDS["causal"]))


@pytest.mark.parametrize("model_type", known(IMAGES))
async def test_tokens_of_models_that_see_are_those_of_transformers(model_type: str, check: Callable[..., Any]) -> None:
    saved = {"save_original_format": False} if model_type in CONVERTED else {}
    await check(tiny_mixture(model_type, KINDS["images"]), **saved)


@pytest.mark.parametrize("model_type", known(MERGED))
async def test_tokens_of_merged_experts_are_those_of_transformers(model_type: str, check: Callable[..., Any]) -> None:
    """All experts of a layer in one tensor, which most checkpoints have not."""
    await check(tiny_mixture(model_type, KINDS["causal"]), save_original_format=False)


@pytest.mark.usefixtures("smallest_budget")
async def test_forward_passes_of_a_model_that_does_not_generate(tmp_path: Path) -> None:
    """Three at once, which share what is read."""
    config = tiny_config("openai_privacy_filter", num_local_experts=16)
    model = random_model(config, AutoModelForTokenClassification)
    model.save_pretrained(tmp_path)
    input_ids = torch.randint(3, 180, (1, 20))
    with torch.inference_mode():
        expected = model(input_ids=input_ids).logits
    async with Engine(tmp_path, memory_budget="64MiB", config=EngineConfig(max_tokens_per_sweep=64)) as engine:

        async def check_logits() -> None:
            output = await engine.forward(input_ids=input_ids)
            torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-4)

        assert 0 < engine.plan.expert_bytes < sum(expert.slot_bytes for expert in engine.plan.experts)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(check_logits)


def test_every_class_of_experts_is_here() -> None:
    """That this version of transformers decorates."""
    found: set[str] = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        found.update(re.findall(r"^@use_experts_implementation.*\nclass (\w+)", file.read_text(), re.MULTILINE))
    assert found
    assert found <= {*CAUSAL.values(), *IMAGES.values(), *MERGED.values(), *NOT_HERE}
