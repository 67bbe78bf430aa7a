"""How bfloat16 weights are multiplied: measured once, kept, and as close to exact results as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from hermes_async import Completion, Engine, EngineConfig, SamplingParams
from hermes_async.engine import kernel_choice
from hermes_async.modeling import bfloat16_weight
from hermes_async.planning.profile_store import load_products_profile, products_profile_file
from hermes_async.quantization.tile_products import TiledInputs
from tests.inside import inside

pytestmark = pytest.mark.anyio

PROMPT = [5, 6, 7, 8, 9]
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
CONFIG = LlamaConfig(
    vocab_size=600,
    hidden_size=512,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of these models count as large."""
    monkeypatch.setattr(bfloat16_weight, "LEAST_ELEMENTS", 1 << 18)


@pytest.fixture(scope="module")
def models(
    random_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> dict[torch.dtype, tuple[Path, PreTrainedModel]]:
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = random_model(CONFIG, dtype=dtype)
        found[dtype] = save_model(model), model
    return found


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """What the next measurements find. Those that are left were not made."""
    left: list[float] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "measured_gains", lambda: gains_of(left.pop(0)))
    monkeypatch.setattr(kernel_choice, "has_compiler", lambda: False)
    return left


def gains_of(gain: float) -> dict[int, float]:
    """With all numbers of tokens."""
    return {1: gain, 4: gain}


def engine(path: Path, kernels: str = "auto") -> Engine:
    return Engine(path, memory_budget="64MiB", config=EngineConfig(kernels=kernels, prompt_lookup=False))


def log_probabilities(model: PreTrainedModel, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Of each of these tokens after the prompt."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def check_as_close_as_transformers(model: PreTrainedModel, completion: Completion) -> None:
    """The log-probabilities of a bfloat16 model, beside those in float64."""
    assert completion.logprobs is not None
    own = torch.tensor([sampled.logprob for sampled in completion.logprobs], dtype=torch.float64)
    theirs = log_probabilities(model, completion.token_ids)
    exact = log_probabilities(model.double(), completion.token_ids)
    model.bfloat16()
    assert float((own - exact).abs().max()) <= 2 * float((theirs - exact).abs().max()) + 2**-8


async def test_results_are_as_close_to_exact_ones_as_those_of_transformers(
    models: dict[torch.dtype, tuple[Path, PreTrainedModel]], gains: list[float]
) -> None:
    path, model = models[torch.bfloat16]
    gains.append(1.5)
    async with engine(path) as opened:
        for line in ("one token: torch.mv is 1.5 times", "4 tokens and more: bfloat16 is multiplied in float32"):
            assert any(reason.startswith(line) for reason in opened.plan.explanation)
        completion = await opened.complete(PROMPT, PARAMS)
        names = inside(opened).bfloat16_weights
    assert {"lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"} <= names
    check_as_close_as_transformers(model, completion)


async def test_float32_is_computed_as_ever(
    models: dict[torch.dtype, tuple[Path, PreTrainedModel]], gains: list[float]
) -> None:
    path, _ = models[torch.float32]
    gains.append(9.0)
    found = []
    for kernels in ("auto", "transformers"):
        async with engine(path, kernels) as opened:
            found.append((await opened.complete(PROMPT, PARAMS)).logprobs)
            assert inside(opened).bfloat16_weights == set()
    assert found[0] == found[1]
    assert gains == [9.0]  # nothing was measured


async def test_it_is_measured_once(models: dict[torch.dtype, tuple[Path, PreTrainedModel]], gains: list[float]) -> None:
    path, _ = models[torch.bfloat16]
    gains += [1.5, 9.0]
    for _ in range(2):
        async with engine(path) as opened:
            assert any("1.5 times" in line for line in opened.plan.explanation)
    assert gains == [9.0]
    kept = load_products_profile(products_profile_file())
    assert kept is not None
    assert kept.gains == gains_of(1.5)
    products_profile_file().write_text("{")
    async with engine(path) as opened:
        assert any("9.0 times" in line for line in opened.plan.explanation)


@pytest.mark.parametrize(
    ("kernels", "gain", "left"), [("auto", 1.05, []), ("auto", 0.5, []), ("transformers", 2.0, [2.0])]
)
async def test_where_it_is_not_used(
    models: dict[torch.dtype, tuple[Path, PreTrainedModel]],
    gains: list[float],
    kernels: str,
    gain: float,
    left: list[float],
) -> None:
    path, _ = models[torch.bfloat16]
    gains.append(gain)
    async with engine(path, kernels) as opened:
        await opened.complete(PROMPT, PARAMS)
        assert inside(opened).bfloat16_weights == set()
        assert not any("as fast as linear" in line for line in opened.plan.explanation)
    assert gains == left


async def test_nothing_is_measured_where_little_memory_is_free(
    models: dict[torch.dtype, tuple[Path, PreTrainedModel]], gains: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = models[torch.bfloat16]
    gains.append(9.0)
    monkeypatch.setattr(kernel_choice, "free_bytes", lambda: 511 << 20)
    async with engine(path) as opened:
        assert inside(opened).bfloat16_weights == set()
    assert gains == [9.0]
    assert not products_profile_file().exists()  # it is measured when more is free


@pytest.mark.parametrize(("budget", "compiles"), [("256MiB", True), ("64MiB", False)])
async def test_compiled_functions_multiply_where_all_weights_stay(
    models: dict[torch.dtype, tuple[Path, PreTrainedModel]],
    gains: list[float],
    monkeypatch: pytest.MonkeyPatch,
    budget: str,
    compiles: bool,
) -> None:
    path, model = models[torch.bfloat16]
    gains.append(1.0)
    monkeypatch.setattr(kernel_choice, "has_compiler", lambda: True)
    monkeypatch.setattr(kernel_choice, "measured_tiled_gains", lambda: {4: 2.0, 16: 3.0})
    tiled: list[tuple[int, ...]] = []
    multiply = TiledInputs.multiply

    def observed(inputs: TiledInputs, weight: torch.Tensor, *args: Any) -> None:
        tiled.append(tuple(weight.shape))
        multiply(inputs, weight, *args)

    monkeypatch.setattr(TiledInputs, "multiply", observed)
    async with Engine(path, memory_budget=budget, config=EngineConfig(prompt_lookup=False)) as opened:
        lines = [line for line in opened.plan.explanation if line.startswith("4 to 16 tokens: compiled functions")]
        completion = await opened.complete(PROMPT, PARAMS)
    assert (len(lines) == 1) is compiles
    assert ((768, 512) in tiled) is compiles  # with the five tokens of the prompt
    kept = load_products_profile(products_profile_file(compiles=compiles))
    assert kept is not None
    assert kept.tiled_gains == ({4: 2.0, 16: 3.0} if compiles else {})
    check_as_close_as_transformers(model, completion)


async def test_small_models_are_not_measured(tiny_model: Any, gains: list[float]) -> None:
    gains.append(2.0)
    config = replace(tiny_model.config, dtype="bfloat16")
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as opened:
        await opened.complete(PROMPT, PARAMS)
    assert gains == [2.0]
