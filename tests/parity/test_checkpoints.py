"""Checkpoints as others saved them: old names, base models, shards, tied heads. All give the tokens of the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, PreTrainedConfig

import hermes_async

pytestmark = pytest.mark.anyio

ATOL = 1e-4  # of log-probabilities in float32
INDEX = "model.safetensors.index.json"
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "bert": BertConfig(**SMALL, is_decoder=True),
    # No expert begins where a block does.
    "mixtral": MixtralConfig(
        **SMALL | {"hidden_size": 56, "intermediate_size": 40},
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    ),
}
NUM_TOKENS = 4

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Two, one of which is computed in chunks: what differs here is how weights are found, not how they are used."""
    return [prompt for prompt in prompts if len(prompt) in (5, 17)]


@pytest.fixture(scope="module")
def models(random_model: Callable[..., Any]) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        return made.setdefault(name, random_model(CONFIGS[name]))

    return model


@pytest.fixture(scope="module")
def originals(
    models: Callable[[str], Any], save_model: Callable[..., Path], greedy_reference: Callable[..., list[Any]],
    prompts: list[list[int]],
) -> Callable[[str], tuple[Path, list[Any]]]:  # fmt: skip
    """A model as transformers saves it, and what transformers generates from that."""
    made: dict[str, tuple[Path, list[Any]]] = {}

    def original(name: str) -> tuple[Path, list[Any]]:
        if name not in made:
            path = save_model(models(name))
            made[name] = path, greedy_reference(path, prompts, num_tokens=NUM_TOKENS)
        return made[name]

    return original


@pytest.fixture
def check(
    prompts: list[list[int]],
    originals: Callable[[str], tuple[Path, list[Any]]],
    greedy_reference: Callable[..., list[Any]],
    least_budget: int,
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> Callable[[Path, str], Any]:
    """That a checkpoint gives what the model `name` gives, streamed and resident."""

    async def same_as(path: Path, name: str) -> None:
        expected = originals(name)[1]
        # transformers reads it too, so it is a checkpoint that people have.
        theirs = greedy_reference(path, prompts, num_tokens=NUM_TOKENS)
        assert [item.token_ids for item in theirs] == [item.token_ids for item in expected]
        for budget in (least_budget, 64 * 1024 * 1024):
            async with hermes_async.Engine(path, memory_budget=budget) as engine:
                assert_parity(await complete_all(engine, prompts, num_tokens=NUM_TOKENS), expected, atol=ATOL)

    return same_as


@pytest.fixture
def rewritten(tmp_path: Path, originals: Callable[[str], tuple[Path, list[Any]]]) -> Callable[..., Path]:
    """A copy of a model's checkpoint with other tensors, in one file or in shards."""

    def rewrite(
        name: str, change: Callable[[Tensors], Tensors], *, shard_of: Callable[[str], int] | None = None
    ) -> Path:
        original, _ = originals(name)
        path = tmp_path / name
        shutil.copytree(original, path)
        tensors = change(load_file(path / "model.safetensors"))
        if shard_of is not None:
            (path / "model.safetensors").unlink()
            write_shards(path, tensors, shard_of)
        else:
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return rewrite


def write_shards(path: Path, tensors: Mapping[str, torch.Tensor], shard_of: Callable[[str], int]) -> None:
    shards: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        shards.setdefault(f"model-{shard_of(name):05d}.safetensors", {})[name] = tensor
    for file, part in shards.items():
        save_file(part, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


def renamed(tensors: Tensors, *replacements: tuple[str, str]) -> Tensors:
    result = {}
    for name, tensor in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        result[name] = tensor
    assert result.keys() != tensors.keys()
    return result


# Other names


async def test_old_gpt_neox_names_and_buffers(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    def as_in_2022(tensors: Tensors) -> Tensors:
        assert "embed_out.weight" in tensors  # transformers 5 calls it lm_head, and saves it as it was called
        for layer in range(3):
            attention = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{attention}.bias"] = torch.ones(128, 128, dtype=torch.bool).tril()[None, None]
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{attention}.rotary_emb.inv_freq"] = torch.zeros(2)
        return tensors

    await check(rewritten("gpt-neox", as_in_2022), "gpt-neox")


async def test_gpt_neox_with_todays_name_of_the_head(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    await check(rewritten("gpt-neox", lambda tensors: renamed(tensors, ("embed_out.", "lm_head."))), "gpt-neox")


async def test_old_gpt2_names_and_buffers(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    def as_on_the_hub(tensors: Tensors) -> Tensors:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        tensors = renamed(tensors, ("transformer.", ""))
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(128, 128).tril()[None, None]
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    await check(rewritten("gpt2", as_on_the_hub), "gpt2")


async def test_gpt2_names_with_prefix_and_buffers(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    def with_buffers(tensors: Tensors) -> Tensors:
        assert all(name.startswith(("transformer.", "lm_head.")) for name in tensors)
        for layer in range(3):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(128, 128).tril()[None, None]
        return tensors

    await check(rewritten("gpt2", with_buffers), "gpt2")


async def test_norms_with_gamma_and_beta(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    def as_from_tensorflow(tensors: Tensors) -> Tensors:
        return renamed(tensors, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))

    await check(rewritten("bert", as_from_tensorflow), "bert")


@pytest.mark.parametrize(("name", "base"), [("llama-tied", "model"), ("gpt2", "transformer")])
async def test_base_model_whose_head_is_tied(
    name: str, base: str, models: Callable[[str], Any], save_model: Callable[..., Path], check: Callable[..., Any]
) -> None:
    path = save_model(getattr(models(name), base))
    assert not any(tensor.startswith(f"{base}.") for tensor in load_file(path / "model.safetensors"))
    await check(path, name)


# Shards


async def test_shards_as_transformers_writes_them(
    models: Callable[[str], Any], save_model: Callable[..., Path], check: Callable[..., Any]
) -> None:
    path = save_model(models("llama"), max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    await check(path, "llama")


async def test_layers_whose_tensors_are_in_two_shards(
    rewritten: Callable[..., Path], check: Callable[..., Any]
) -> None:
    await check(rewritten("llama", unchanged, shard_of=lambda name: int("mlp" in name or "norm" in name)), "llama")


async def test_every_tensor_in_a_shard_of_its_own(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    shards: dict[str, int] = {}
    path = rewritten("llama-tied", unchanged, shard_of=lambda name: shards.setdefault(name, len(shards)))
    await check(path, "llama-tied")


# Experts


async def test_experts_that_lie_apart(
    originals: Callable[[str], tuple[Path, list[Any]]], check: Callable[..., Any]
) -> None:
    path, _ = originals("mixtral")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_file(path / "model.safetensors")
    await check(path, "mixtral")


async def test_a_layer_s_experts_in_several_shards(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    def shard_of(name: str) -> int:
        return len(name) if "experts" not in name else int(name.split("experts.")[1][0]) % 2

    await check(rewritten("mixtral", unchanged, shard_of=shard_of), "mixtral")


@pytest.mark.parametrize("lost", ["w1", "w2"])
async def test_an_expert_that_is_missing(rewritten: Callable[..., Path], lost: str) -> None:
    def without(tensors: Tensors) -> Tensors:
        del tensors[f"model.layers.1.block_sparse_moe.experts.2.{lost}.weight"]
        return tensors

    path = rewritten("mixtral", without)
    with pytest.raises(hermes_async.CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.") as caught:
        async with hermes_async.Engine(path, memory_budget="64MiB"):
            pytest.fail("entered")
    assert str(path) in str(caught.value)


async def test_an_expert_of_another_shape(rewritten: Callable[..., Path]) -> None:
    def with_more_columns(tensors: Tensors) -> Tensors:
        name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
        return tensors

    path = rewritten("mixtral", with_more_columns)
    with pytest.raises(hermes_async.CheckpointError, match=r"4 of .* and 4 of .* must be of one dtype and shape"):
        async with hermes_async.Engine(path, memory_budget="64MiB"):
            pytest.fail("entered")


# Tied heads


async def test_a_tied_head_is_not_stored(
    originals: Callable[[str], tuple[Path, list[Any]]], check: Callable[..., Any]
) -> None:
    path, _ = originals("llama-tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    await check(path, "llama-tied")


async def test_a_tied_head_is_stored_twice(rewritten: Callable[..., Path], check: Callable[..., Any]) -> None:
    def with_head(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    await check(rewritten("llama-tied", with_head), "llama-tied")


async def test_a_tied_embedding_is_stored_as_the_head_only(
    rewritten: Callable[..., Path], check: Callable[..., Any]
) -> None:
    def with_head_only(tensors: Tensors) -> Tensors:
        return renamed(tensors, ("model.embed_tokens.", "lm_head."))

    await check(rewritten("llama-tied", with_head_only), "llama-tied")


async def test_an_untied_checkpoint_whose_config_ties(
    rewritten: Callable[..., Path],
    prompts: list[list[int]],
    greedy_reference: Callable[..., list[Any]],
    least_budget: int,
    complete_all: Callable[..., Any],
    assert_parity: Callable[..., None],
) -> None:
    """Whether the head wins that is stored, or the config that ties it, is as in transformers."""

    def with_other_head(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}

    path = rewritten("llama-tied", with_other_head)
    expected = greedy_reference(path, prompts, num_tokens=NUM_TOKENS)
    async with hermes_async.Engine(path, memory_budget=least_budget) as engine:
        assert_parity(await complete_all(engine, prompts, num_tokens=NUM_TOKENS), expected, atol=ATOL)
