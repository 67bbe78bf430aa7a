"""The self-check of a model in its true size: it takes place, it takes little memory, and it finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t
from transformers import PreTrainedConfig

from hermes_async import EngineConfig, UnsupportedModelError
from hermes_async.engine.opening import open_model
from hermes_async.modeling import selfcheck
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.selfcheck import check_packing
from hermes_async.modeling.skeleton import build_model

# True shapes: wide layers, multi-query and grouped heads, many experts, a head size that differs between layers.
TRUE_SIZES: dict[str, PreTrainedConfig] = {
    "gptj-6b": t.GPTJConfig(),
    "llama-3-70b": t.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
    "falcon-7b": t.FalconConfig(),
    "codegen": t.CodeGenConfig(),
    "gpt-neox-20b": t.GPTNeoXConfig(),
    "opt-30b": t.OPTConfig(
        hidden_size=7168, ffn_dim=28672, num_hidden_layers=48, num_attention_heads=56, word_embed_proj_dim=7168
    ),
    "mixtral-8x7b": t.MixtralConfig(),
    "qwen3-moe": t.Qwen3MoeConfig(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128),
    "cwm": t.CwmConfig(),
    "gemma-2": t.Gemma2Config(),
    "gemma-4": t.Gemma4TextConfig(),
}


@pytest.fixture
def attention():
    packed = PackedAttention()
    yield packed
    packed.close()


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_true_sizes_are_checked_in_little_memory(
    name: str, attention: PackedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []

    def measured(config: PreTrainedConfig, *args: object, **kwargs: object) -> t.PreTrainedModel:
        model = build_model(config, *args, **kwargs)  # type: ignore[arg-type]
        largest.append(max(parameter.numel() * 4 for parameter in model.parameters()))
        return model

    monkeypatch.setattr(selfcheck, "build_model", measured)
    check_packing(TRUE_SIZES[name], attention)  # it raises where a model could not be checked
    assert max(largest) <= 64 * 2**20


def test_positions_that_are_counted_otherwise_are_found(attention: PackedAttention) -> None:
    with pytest.raises(UnsupportedModelError, match="other logits than alone"):
        check_packing(t.RobertaConfig(is_decoder=True), attention)


def test_attention_that_forgets_what_came_before_is_found(
    attention: PackedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = selfcheck.forward_packed

    def forgetting(model: object, attention: PackedAttention, batch: object) -> torch.Tensor:
        batch.segments[-1].past = 0  # type: ignore[attr-defined]
        return packed(model, attention, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(selfcheck, "forward_packed", forgetting)
    with pytest.raises(UnsupportedModelError, match="share sweeps"):
        check_packing(t.LlamaConfig(), attention)


def test_a_model_that_cannot_be_checked_is_refused(attention: PackedAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(config: PreTrainedConfig) -> list[torch.Tensor]:
        raise RuntimeError("no copy of it runs")

    monkeypatch.setattr(selfcheck, "_separately", failing)
    with pytest.raises(UnsupportedModelError, match=r"could not be checked .*no copy of it runs.*self_check"):
        check_packing(t.LlamaConfig(), attention)


def test_the_check_can_be_skipped(
    save_model: Callable[..., Path], random_model: Callable[..., t.PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: PreTrainedConfig) -> list[torch.Tensor]:
        raise RuntimeError("no copy of it runs")

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    path = save_model(random_model(t.LlamaConfig(vocab_size=64, **sizes)))
    monkeypatch.setattr(selfcheck, "_separately", failing)
    with pytest.raises(UnsupportedModelError, match="could not be checked"):
        open_model(path, "32MiB", EngineConfig(batching="packed"))
    open_model(path, "32MiB", EngineConfig(self_check="skip")).close()
