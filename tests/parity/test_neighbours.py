"""A request's tokens are those it gets alone, whoever shares its sweeps and whenever they join."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest
import torch
from transformers import GPTJConfig, LlamaConfig, MistralConfig, PreTrainedConfig

import hermes_async

pytestmark = pytest.mark.anyio

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "mistral-window": MistralConfig(**SMALL, sliding_window=8),
    "gptj": GPTJConfig(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=8),
}
NUM_REQUESTS = 8
MAX_PROMPT_TOKENS, MAX_TOKENS = 32, 16


@pytest.fixture(scope="module", params=CONFIGS)
def path(request: pytest.FixtureRequest, random_model: Callable[..., object], save_model: Callable[..., Path]) -> Path:
    return save_model(random_model(CONFIGS[request.param]))


def requests() -> list[tuple[list[int], hermes_async.SamplingParams]]:
    """Prompts of random lengths; every other one sampled with a seed."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for idx in range(NUM_REQUESTS):
        length = int(torch.randint(1, MAX_PROMPT_TOKENS + 1, (), generator=generator))
        max_tokens = int(torch.randint(1, MAX_TOKENS + 1, (), generator=generator))
        prompt = torch.randint(3, 300, (length,), generator=generator).tolist()
        chance = {"temperature": 0.8, "top_p": 0.9, "seed": 100 + idx} if idx % 2 else {"temperature": 0.0}
        made.append((prompt, hermes_async.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **chance)))
    return made


@pytest.mark.parametrize("budget", ["smallest", "resident"])
async def test_tokens_do_not_depend_on_neighbours(
    path: Path, budget: str, minimum_budget: Callable[[Path], int]
) -> None:
    size = minimum_budget(path) if budget == "smallest" else 64 * 1024 * 1024
    everyone = requests()
    async with hermes_async.Engine(path, memory_budget=size) as engine:
        alone = [list((await engine.complete(prompt, params)).token_ids) for prompt, params in everyone]
        together = await all_joining_one_after_another(engine, everyone)
        assert engine.statistics().num_running == 0
    assert together == alone


async def all_joining_one_after_another(
    engine: hermes_async.Engine, everyone: list[tuple[list[int], hermes_async.SamplingParams]]
) -> list[list[int]]:
    """Each request is submitted when the one before it has got a token or has ended."""
    tokens: list[list[int]] = [[] for _ in everyone]
    started = [anyio.Event() for _ in everyone]

    async def one(idx: int) -> None:
        if idx:
            await started[idx - 1].wait()
        async with aclosing(engine.generate(*everyone[idx])) as chunks:
            async for chunk in chunks:
                tokens[idx] += chunk.token_ids
                started[idx].set()

    async with anyio.create_task_group() as tasks:
        for idx in range(len(everyone)):
            tasks.start_soon(one, idx)
    return tokens


async def test_the_same_seed_gives_the_same_tokens_and_another_seed_does_not(path: Path) -> None:
    async with hermes_async.Engine(path, memory_budget="64MiB") as engine:

        async def sample(seed: int) -> tuple[int, ...]:
            params = hermes_async.SamplingParams(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
            return (await engine.complete([5, 6, 7], params)).token_ids

        assert await sample(1) == await sample(1)
        assert await sample(1) != await sample(2)
