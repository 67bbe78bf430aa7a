"""Expressions for names of modules: they match as `re.match` does, and none takes for ever or all memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hermes_async.errors import CheckpointError
from hermes_async.quantization import name_patterns
from hermes_async.quantization.compressed_tensors import compressed_tensors_matrices
from hermes_async.quantization.gptq import gptq_matrices
from hermes_async.quantization.name_patterns import NamePatterns
from hermes_async.storage.tensor_spec import TensorSpec

NAMES = (
    *("model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.k_proj", "model.layers.10.mlp.gate_proj"),
    *("model.layers.3.mlp.experts.17.down_proj", "lm_head", "model.embed_tokens", "visual.blocks.1.attn.qkv", ""),
)
EXPRESSIONS = (
    *(
        r".*self_attn.*",
        r".*\.(q|k|v|o)_proj$",
        r"^model\.layers\.\d+\.mlp",
        r"model\.layers\.[1-9]\d{0,1}\.",
        "lm_head",
    ),
    *(r"(?:.*\.)?(?:gate|up|down)_proj", r"^(?!.*(?:lm_head|visual)).*$", r".*experts\.(\d+)\.down_proj", "", r"proj"),
    *(r"(?i)MODEL", r"model.layers.(?:[0-9]|1[0-9])\..*_proj", r".*mlp(?=\.experts)"),
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_names_match_as_the_standard_library_has_it(expression: str) -> None:
    patterns = NamePatterns(None)
    assert [patterns.match(expression, name) for name in NAMES] == [
        re.match(expression, name) is not None for name in NAMES
    ]


REFUSED = [
    ("[", "is no regular expression"),
    ("(" * 400, "is no regular expression"),
    (r"(a)\2", "is no regular expression"),
    ("a" * 501, "has 501 characters, of at most 500"),
    ("a{1000000}", "repeats more than 100 times|has '{'"),
    ("(?:(?:a{9}){9}){9}", "repeats more than 100 times"),
    ("(?:a|(?R))*", r"has '\(\?'"),
    ("(?:model){e<=20}", "has '{'"),
]


@pytest.mark.parametrize(("expression", "message"), REFUSED)
def test_what_is_refused(expression: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"/x: the pattern .* of the configuration's quantization .*{message}"):
        NamePatterns(Path("/x")).match(expression, "a")


def test_limits_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = NamePatterns(None)
    for idx in range(1024):
        patterns.match(f"m{idx}", "m")
    with pytest.raises(CheckpointError, match="is one of more than 1024"):
        patterns.match("x", "m")
    with pytest.raises(CheckpointError, match="a name of 1001 characters"):
        patterns.match("m0", "m" * 1001)
    monkeypatch.setattr(name_patterns, "MAX_SECONDS", 0.01)
    with pytest.raises(CheckpointError, match=r"'.*!' .* takes too long to match"):
        NamePatterns(None).match("(?:a|a)+(?:a|a)+(?:a|a)+!", "a" * 500)


def test_both_methods_that_have_patterns_name_the_checkpoint() -> None:
    def tensors(name: str) -> dict[str, Any]:
        return {name: TensorSpec(name, Path("/checkpoint/model.safetensors"), 0, 0, None, ())}  # type: ignore[arg-type]

    weights = {"num_bits": 4, "strategy": "channel"}
    groups = {"config_groups": {"a": {"targets": ["re:["], "weights": weights, "format": "pack-quantized"}}}
    with pytest.raises(CheckpointError, match=r"^/checkpoint: the pattern '\['"):
        compressed_tensors_matrices(groups, tensors("m.weight_packed"))
    with pytest.raises(CheckpointError, match=r"^/checkpoint: the pattern '\['"):
        gptq_matrices({"bits": 4, "dynamic": {"+:[": {"bits": 8}}}, tensors("m.qweight"))
