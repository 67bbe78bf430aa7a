"""An engine in bf16 holds no more after prompts of many lengths; only a process of its own can show it.

The caches of kernels are bounded, attention keeps no kernels, and the heap gives back what sweeps have freed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

MOST_GROWTH_MIB = 24
"""What the caches and the heap may still come to hold; without bounds it is twice that, and goes on."""

PROGRAM = """
import sys
import anyio
import hermes_async
from hermes_async.memory.available import process_rss_bytes

async def main(path, kind):
    params = hermes_async.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    async with hermes_async.Engine(path, memory_budget="80MiB") as engine:
        async def run(num_tokens):
            token_ids = [2 + idx % 100 for idx in range(num_tokens)]
            if kind == "generate":
                await engine.complete(token_ids, params)
                engine.drop_prefixes()
            else:
                await engine.forward(input_ids=[token_ids])

        for num_tokens in range(260, 250, -1):  # the caches fill, and what is needed once is made
            await run(num_tokens)
        before = process_rss_bytes()
        for num_tokens in range(64, 250, 2):
            await run(num_tokens)
        print(process_rss_bytes() - before)

anyio.run(main, *sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["generate", "forward"])
def test_memory_does_not_grow_with_the_lengths(
    kind: str, random_model: Callable[..., PreTrainedModel], save_model: Callable[..., Path]
) -> None:
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=128,
        max_position_embeddings=512,
    )
    path = save_model(random_model(config, dtype=torch.bfloat16))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # each thread would keep its own kernels
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert int(done.stdout) < MOST_GROWTH_MIB << 20
