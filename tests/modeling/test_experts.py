"""How experts are read: in as few reads as their matrices lie in, and nothing but them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from hermes_async import EngineConfig
from hermes_async.engine.opening import open_model
from hermes_async.planning.plan import Plan
from tests.architectures import random_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
EXPERT_BYTES = 3 * 192 * 128 * 4


def planned(config: PreTrainedConfig, path: Path, **saved: Any) -> Plan:
    random_model(config).save_pretrained(path, **saved)
    return smallest_plan(path)


def smallest_plan(path: Path) -> Plan:
    opened = open_model(path, 1 << 30, EngineConfig())
    opened.close()
    opened = open_model(path, opened.plan.minimum_budget, EngineConfig())
    opened.close()
    assert opened.plan.expert_bytes
    return opened.plan


def check_bytes(plan: Plan, path: Path) -> None:
    """Every expert has its own bytes, and no others; together they are all."""
    assert len(plan.experts) == 2 * SIZES["num_experts"]
    assert {expert.read_bytes for expert in plan.experts} == {EXPERT_BYTES}
    extents = sorted((item.offset, item.nbytes) for expert in plan.experts for item in expert.ranges)
    assert all(first + nbytes <= then for (first, nbytes), (then, _) in pairwise(extents))
    assert sum(nbytes for _, nbytes in extents) == len(plan.experts) * EXPERT_BYTES


def test_an_expert_whose_tensors_are_neighbours_is_one_read(tmp_path: Path) -> None:
    plan = planned(Qwen3MoeConfig(**SIZES), tmp_path)
    check_bytes(plan, tmp_path)
    assert {len(expert.ranges) for expert in plan.experts} == {1}


def test_merged_experts_are_one_read_for_each_projection(tmp_path: Path) -> None:
    plan = planned(Qwen3MoeConfig(**SIZES), tmp_path, save_original_format=False)
    check_bytes(plan, tmp_path)
    assert {len(expert.ranges) for expert in plan.experts} == {2}


def test_transposed_experts_too_and_their_biases_stay(tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size": 192, "layer_types": ["full_attention"] * 2}
    plan = planned(GptOssConfig(**sizes), tmp_path)
    check_bytes(plan, tmp_path)
    assert {len(expert.ranges) for expert in plan.experts} == {2}
    assert not [name for expert in plan.experts for name in expert.placements if "bias" in name.name]


def test_an_expert_in_two_shards_is_read_from_both(tmp_path: Path) -> None:
    random_model(Qwen3MoeConfig(**SIZES)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    apart = "model.layers.0.mlp.experts.4.up_proj.weight"
    save_file({apart: tensors.pop(apart)}, tmp_path / "one.safetensors")
    save_file(tensors, tmp_path / "rest.safetensors")
    plan = smallest_plan(tmp_path)
    divided = next(expert for expert in plan.experts if expert.name == "model.layers.0.mlp.experts.4")
    assert {item.file.name for item in divided.ranges} == {"one.safetensors", "rest.safetensors"}
    assert sum(item.nbytes for item in divided.ranges) == EXPERT_BYTES
    assert {len(expert.ranges) for expert in plan.experts if expert is not divided} == {1}


def test_fp8_experts_are_two_reads(tmp_path: Path) -> None:
    """Scales lie apart: in a file of safetensors, all tensors of one dtype lie together."""
    random_model(Qwen3MoeConfig(**SIZES)).save_pretrained(tmp_path)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if ".experts." in name:
            stored[name] = weight.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.full((weight.shape[0] // 64, weight.shape[1] // 64), 0.5)
        else:
            stored[name] = weight
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = json.loads((tmp_path / "config.json").read_text())
    entries["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    plan = smallest_plan(tmp_path)
    assert {len(expert.ranges) for expert in plan.experts} == {2}
    assert {expert.read_bytes for expert in plan.experts} == {EXPERT_BYTES // 4 + 4 * 3 * 6}
