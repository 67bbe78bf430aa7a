"""Engines on GGUF files, against transformers' own models of the same files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from hermes_async import (
    CheckpointError,
    CorruptShardError,
    Engine,
    EngineConfig,
    MissingTensorError,
    UnsupportedModelError,
)
from hermes_async.cli import app
from hermes_async.engine.opening import open_model
from tests import gguf_models
from tests.engines import greedy_params
from tests.gguf_models import Written, greedy, loaded, save_gguf

PROMPT = [5, 9, 2, 33, 17, 40, 8]
NUM_TOKENS = 8
RESIDENT = "200MiB"
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
ATTENTION = {
    "attention__head_count": 4, "attention__head_count_kv": 2, "attention__layer_norm_rms_epsilon": 1e-6,
    "feed_forward_length": 128, "rope__freq_base": 10000.0,
}  # fmt: skip
QWEN35 = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
QWEN35_METADATA = {
    "attention__key_length": 16, "ssm__time_step_rank": 4, "full_attention_interval": 2, "ssm__conv_kernel": 4,
    "ssm__state_size": 16, "ssm__group_count": 2, "ssm__inner_size": 128, "rope__dimension_sections": [2, 1, 1, 0],
    "rope__dimension_count": 8, "expert_count": 16, "expert_used_count": 2, "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
}  # fmt: skip


def written(config_class: str, architecture: str, changes: Any, sizes: Any, **metadata: Any) -> Written:
    return Written(getattr(transformers, config_class)(**sizes), architecture, changes, metadata)


def llama(**changed: int) -> Written:
    sizes = SIZES | {"tie_word_embeddings": False} | changed
    metadata = ATTENTION | {"rope__dimension_count": sizes["hidden_size"] // 4}
    metadata["feed_forward_length"] = sizes["intermediate_size"]
    return written("LlamaConfig", "llama", gguf_models.llama_changes, sizes, **metadata)


def gpt2() -> Written:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "initializer_range": 0.3}
    metadata = {"attention__head_count": 4, "attention__layer_norm_epsilon": 1e-5, "context_length": 1024}
    return written("GPT2Config", "gpt2", gguf_models.gpt2_changes, sizes, **metadata)


def bloom() -> Written:
    sizes = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "initializer_range": 0.3}
    metadata = {"attention__head_count": 4, "attention__layer_norm_epsilon": 1e-5}
    return written("BloomConfig", "bloom", gguf_models.bloom_changes, sizes, **metadata)


def mamba() -> Written:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320, "initializer_range": 0.3}
    metadata = {
        "ssm__conv_kernel": 4, "ssm__state_size": 16, "ssm__time_step_rank": 4, "ssm__inner_size": 128,
        "attention__layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    return written("MambaConfig", "mamba", gguf_models.mamba_changes, sizes, **metadata)


def gemma3() -> Written:
    metadata = ATTENTION | {"attention__key_length": 16, "attention__sliding_window": 32}
    return written("Gemma3TextConfig", "gemma3", gguf_models.norm_changes, SIZES | {"head_dim": 16}, **metadata)


def qwen3moe() -> Written:
    sizes = SIZES | {
        "head_dim": 16, "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }  # fmt: skip
    metadata = ATTENTION | {"attention__key_length": 16, "expert_count": 16, "expert_used_count": 2}
    return written("Qwen3MoeConfig", "qwen3moe", gguf_models.expert_changes, sizes, **metadata)


def lfm2() -> Written:
    sizes = SIZES | {
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False
    }  # fmt: skip
    metadata = ATTENTION | {"attention__head_count_kv": [0, 2], "shortconv__l_cache": 3}
    return written("Lfm2Config", "lfm2", gguf_models.conv_changes, sizes, **metadata)


def qwen35moe() -> Written:
    metadata = ATTENTION | QWEN35_METADATA
    return written("Qwen3_5MoeTextConfig", "qwen35moe", gguf_models.qwen35_changes, SIZES | QWEN35, **metadata)


KINDS: dict[str, tuple[Callable[[], Written], str]] = {
    "permuted rows": (llama, "Q8_0"),
    "half precision": (llama, "F16"),
    "several types": (partial(llama, hidden_size=256, intermediate_size=256), "Q4_K"),
    "norms": (gemma3, "Q5_0"),
    "experts": (qwen3moe, "Q4_0"),
    "transposed": (gpt2, "Q8_0"),
    "heads apart": (bloom, "Q4_1"),
    "logarithms": (mamba, "Q8_0"),
    "convolutions": (lfm2, "Q4_1"),
    "columns": (qwen35moe, "Q8_0"),
}


async def check(engine: Engine, reference: PreTrainedModel, tolerance: float = 1e-4) -> None:
    completion = await engine.complete(PROMPT, greedy_params(NUM_TOKENS))
    assert list(completion.token_ids) == greedy(reference, PROMPT, NUM_TOKENS)
    inputs = torch.tensor([PROMPT])
    output = await engine.forward(input_ids=inputs)
    with torch.inference_mode():
        assert torch.allclose(output.logits, reference(inputs).logits, rtol=0, atol=tolerance)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_and_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    make, quantization = KINDS[kind]
    path = save_gguf(make(), tmp_path / "model.gguf", quantization=quantization)
    reference = loaded(path, AutoModelForCausalLM)
    async with Engine(path, memory_budget=RESIDENT) as engine:
        assert engine.plan.weight_bytes <= path.stat().st_size
        await check(engine, reference)
        smallest = engine.plan.minimum_budget
    async with Engine(path, memory_budget=smallest) as engine:
        assert engine.plan.num_buffers
        assert (engine.plan.expert_bytes > 0) == (make in (qwen3moe, qwen35moe))
        await check(engine, reference)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(llama(), tmp_path_factory.mktemp("llama") / "model.gguf", quantization="Q8_0")


@pytest.mark.anyio
async def test_a_model_of_several_files(llama_file: Path, tmp_path: Path) -> None:
    first = save_gguf(llama(), tmp_path / "model.gguf", quantization="Q8_0", split_max_tensors=5)
    assert first.name == "model-00001-of-00005.gguf"
    async with Engine(tmp_path, memory_budget=RESIDENT) as engine:
        await check(engine, loaded(llama_file, AutoModelForCausalLM))


@pytest.mark.anyio
async def test_another_dtype(llama_file: Path) -> None:
    reference = loaded(llama_file, AutoModelForCausalLM, dtype=torch.bfloat16)
    async with Engine(llama_file, memory_budget=RESIDENT, config=EngineConfig(dtype="bfloat16")) as engine:
        output = await engine.forward(input_ids=torch.tensor([PROMPT]))
        assert output.logits.dtype == torch.bfloat16
        with torch.inference_mode():
            expected = reference(torch.tensor([PROMPT])).logits
        assert (output.logits - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.anyio
async def test_the_tokenizer_and_the_chat_template_are_the_file_s(llama_file: Path) -> None:
    reference = AutoTokenizer.from_pretrained(llama_file.parent, gguf_file=llama_file.name)
    messages = [{"role": "user", "content": "Hello all!"}]
    async with Engine(llama_file, memory_budget=RESIDENT) as engine:
        for text in ("Hello world", "who go. Hello, all!"):
            token_ids = await engine.tokenize(text)
            assert list(token_ids) == reference(text)["input_ids"]
            assert await engine.detokenize(token_ids) == reference.decode(token_ids)
        templated = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert templated == "[user] Hello all!\n"
        in_template = await engine.tokenize(messages)
        assert list(in_template) == reference(templated, add_special_tokens=False)["input_ids"]


@pytest.mark.anyio
async def test_the_vector_of_a_text_is_the_last_token_s_as_of_safetensors(llama_file: Path) -> None:
    reference = loaded(llama_file, AutoModelForCausalLM)
    async with Engine(llama_file, memory_budget=RESIDENT) as engine:
        (vector,) = await engine.embed(["Hello world"])
        token_ids = await engine.tokenize("Hello world")
        with torch.inference_mode():
            hidden_states = reference.base_model(torch.tensor([list(token_ids)])).last_hidden_state
        assert torch.allclose(torch.from_numpy(vector), hidden_states[0, -1], rtol=0, atol=1e-4)


def test_commands_take_a_file(llama_file: Path) -> None:
    planned = CliRunner().invoke(app, ["plan", str(llama_file), "--memory", "2MiB", "--json"])
    assert json.loads(planned.stdout)["weight_bytes"] < llama_file.stat().st_size
    budgets = CliRunner().invoke(app, ["plan", str(llama_file), "--sweep", "--json"])
    assert json.loads(budgets.stdout)[-1]["bytes_per_sweep"] == 0  # also where no model fits into twice its weights
    args = ["--memory", "2MiB", "--max-tokens", "3", "--temperature", "0", "--json"]
    generated = CliRunner().invoke(app, ["generate", str(llama_file), "Hello", *args])
    assert json.loads(generated.stdout)["usage"]["completion_tokens"] == 3


@pytest.mark.anyio
async def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    path = save_gguf(llama(), tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(UnsupportedModelError, match=r"architecture 'lxama'.*safetensors"):
        async with Engine(path, memory_budget=RESIDENT):
            pass


@pytest.mark.anyio
async def test_without_the_package_the_extra_is_named(llama_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'hermes-async\[gguf\]'"):
        async with Engine(llama_file, memory_budget=RESIDENT):
            pass


@pytest.mark.anyio
async def test_without_a_compiler_only_plain_numbers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hermes_async.modeling.gguf_tensors.has_compiler", lambda: False)
    async with Engine(save_gguf(llama(), tmp_path / "plain.gguf"), memory_budget=RESIDENT):
        pass
    quantized = save_gguf(llama(), tmp_path / "model.gguf", quantization="Q8_0")
    message = r"'.*' is of GGUF's type Q8_0, which needs the package numba; .*pip install 'hermes-async\[gguf\]'"
    with pytest.raises(UnsupportedModelError, match=message):
        async with Engine(quantized, memory_budget=RESIDENT):
            pass


def number(key: str, value: int) -> bytes:
    """An entry of metadata."""
    return f"llama.{key}".encode() + struct.pack("<II", 4, value)


def vector(name: str, kind: int) -> bytes:
    """A tensor of 64 numbers in the table of tensors, up to its type."""
    return name.encode() + struct.pack("<IQI", 1, 64, kind)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (b"blk.1.attn_q.weight", b"blk.7.attn_q.weight", MissingTensorError, r"layers\.1\.self_attn\.q_proj"),
        (b"blk.1.attn_v.weight", b"blk.1.attn_q.weighd", CheckpointError, r"lacks 1 of the"),
        (number("block_count", 2), number("block_count", 2**31), CorruptShardError, f"claims {2**31} layers"),
        (number("embedding_length", 64), number("embedding_length", 96), CheckpointError, "has shape .* needs"),
        (vector("blk.1.attn_norm.weight", 0), vector("blk.1.attn_norm.weight", 26), UnsupportedModelError, "type I32"),
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", CorruptShardError, r"two tensors 'blk\.0\.attn_q\.weight'"),
    ],
)
def test_files_that_do_not_fit_their_model(
    llama_file: Path, tmp_path: Path, old: bytes, new: bytes, error: type[CheckpointError], message: str
) -> None:
    content = llama_file.read_bytes()
    assert content.count(old) == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(content.replace(old, new))
    with pytest.raises(error, match=message):
        open_model(path, RESIDENT, EngineConfig())
