"""What a configuration asks for beside quantized weights, and is not done, is said."""

from __future__ import annotations

from typing import Any

import pytest

from hermes_async.quantization.methods import notes_of

FLOAT_8 = {"num_bits": 8, "type": "float", "dynamic": True}


@pytest.mark.parametrize(
    ("method", "settings", "activations"),
    [
        ("fp8", {"activation_scheme": "dynamic"}, "dynamic fp8"),
        ("fp8", {"activation_scheme": "static"}, "static fp8"),
        ("fp8", {}, "dynamic fp8"),
        ("fbgemm_fp8", {"activation_scale_ub": 1200.0}, "dynamic fp8"),
        ("mxfp8", {}, "dynamic fp8"),
        ("compressed-tensors", {"config_groups": {"group_0": {"input_activations": FLOAT_8}}}, "dynamic fp8"),
        (
            "compressed-tensors",
            {
                "config_groups": {
                    "group_0": {"input_activations": {"num_bits": 8, "type": "int", "dynamic": False}},
                    "group_1": {"input_activations": FLOAT_8},
                    "group_2": {"input_activations": None},
                }
            },
            "static int8, dynamic fp8",
        ),
        ("modelopt", {"quant_algo": "NVFP4"}, "NVFP4"),
        ("bitsandbytes", {"load_in_8bit": True}, "dynamic int8"),
        ("bitnet", {"linear_class": "autobitlinear"}, "dynamic int8"),
        (
            "torchao",
            {"quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
            "Int8DynamicActivationInt8WeightConfig",
        ),
    ],
)
def test_activations(method: str, settings: dict[str, Any], activations: str) -> None:
    (note,) = notes_of(method, settings)
    assert f"({activations}) is not applied" in note


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mxfp4", {}),
        ("gptq", {"bits": 4}),
        ("modelopt", {"quant_algo": "W4A16_AWQ"}),
        ("compressed-tensors", {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}),
    ],
)
def test_formats_of_weights_alone(method: str, settings: dict[str, Any]) -> None:
    assert notes_of(method, settings) == ()


def test_keys_and_values() -> None:
    (note,) = notes_of("compressed-tensors", {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8}})
    assert note.startswith("keys and values keep the model's dtype")
