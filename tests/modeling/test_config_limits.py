"""Configurations that are far larger than their checkpoints are refused before anything of that size is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.modeling.config_limits import (
    MAX_LAYERS,
    MAX_TABLE_BYTES,
    MAX_VALUES,
    MAX_WIDTH,
    check_config,
    check_tables,
)
from hermes_async.storage.tensor_spec import TensorSpec

PATH = Path("config.json")


def tensors(count: int = 3, size: int = 64) -> list[TensorSpec]:
    return [
        TensorSpec(name=str(idx), file=PATH, offset=0, nbytes=4 * size, dtype=torch.float32, shape=(size,))
        for idx in range(count)
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**5},
        {"n_layer": 10**9},
        {"encoder_layers": 1e300},
        {"depths": [2, 2, 10**6]},
        {"depths": [2, float("nan"), 10**6]},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"num_labels": 10**8},
        {"num_local_experts": 10**6},
        {"num_attention_heads": 10**9},
        {"head_dim": 10**9},
        {"hidden_size": 10**9},
        {"moe_intermediate_size": 10**30},
        {"vocab_size": 10**9},
        {"max_position_embeddings": 10**8},
        {"n_positions": 10**9},
        {"a": {"b": [{"hidden_size": 10**9}]}},
    ],
)
def test_a_number_that_the_tensors_do_not_bear_out(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .* is .*, of at most \d+, because") as caught:
        check_config(PATH, config, tensors())
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": MAX_LAYERS, "head_dim": MAX_WIDTH, "vocab_size": 2**20, "max_position_embeddings": 10**7},
        {"rope_theta": 10**12, "sliding_window": 2**62, "bos_token_id": 10**9, "layer_norm_eps": 1e-5, "seed": 10**18},
        {"num_hidden_layers": None, "hidden_size": "10", "id2label": {"hidden_size": 10**9}},
        {"quantization_config": {"hidden_size": 10**9}, "layer_types": ["full_attention"], "num_labels": 1024},
        {"dataset_size": 10**12, "num_parameters": 7 * 10**9, "attn_layer_indices": [3]},
        {"a" * 10_000: [10**9] * 10_000, f"{'key_' * 10_000}size": 10**9},
    ],
)
def test_other_numbers_are_left_alone(config: dict[str, Any]) -> None:
    check_config(PATH, config, tensors())


def test_larger_checkpoints_may_have_larger_numbers() -> None:
    check_config(PATH, {"num_hidden_layers": 1000, "num_experts": 2000}, tensors(count=2000))
    check_config(PATH, {"vocab_size": 2**21, "num_labels": 2**21}, tensors(size=2**21))


@pytest.mark.parametrize(
    "config",
    [
        {"vision_config": [0] * (MAX_VALUES + 1)},
        {"a": {"b": [[0] * (MAX_VALUES // 2)] * 3}},
        {"id2label": dict.fromkeys(map(str, range(MAX_VALUES + 1)), "x")},
    ],
)
def test_more_values_than_any_configuration_has(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: it has \d+ values, of at most {MAX_VALUES}"):
        check_config(PATH, config, tensors())
    check_config(PATH, config, tensors(size=MAX_VALUES))


def test_configurations_in_configurations() -> None:
    config: dict[str, Any] = {}
    for _ in range(50):
        config = {"text_config": config}
    with pytest.raises(CheckpointError, match="nested"):
        check_config(PATH, config, tensors())


def test_default_configurations_are_within_the_limits() -> None:
    """Of all models of transformers: what their names of numbers mean was understood."""
    checked = 0
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # some need arguments, or a package
            continue
        check_config(PATH, config, tensors(count=8, size=16384))
        checked += 1
    assert checked > 100


def test_tables_are_compared_with_the_files() -> None:
    with torch.device("meta"):
        tables = {"a.bias": torch.empty(1, MAX_TABLE_BYTES, dtype=torch.uint8), "b": torch.empty(1)}
    check_tables(tables, 2 * MAX_TABLE_BYTES, "here")
    with pytest.raises(UnsupportedModelError, match=r"here: .* a\.bias with the shape \[1, \d+\]"):
        check_tables(tables, 0, "here")
