"""Tiny models on disk, and a disk that can hold and fail its reads."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hermes_async import EngineConfig, SamplingParams

STREAMING = EngineConfig(num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=16, max_sequences=8)
"""The paper's PIPELOAD: a ring of three buffers, and every layer freed after its computation."""


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


class TinyModel:
    """A Llama of a few layers, on disk, and its greedy answers as transformers gives them."""

    config = STREAMING
    num_tokens = 12

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.manual_seed(7)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(path)
        chosen = random.Random(3)
        self.prompts = [[chosen.randrange(2, 96) for _ in range(length)] for length in (1, 5, 12, 20, 33, 2)]
        self.references = [self._generate(model, prompt) for prompt in self.prompts]
        self.params = SamplingParams(max_tokens=self.num_tokens, temperature=0, ignore_eos=True)

    @property
    def shard(self) -> Path:
        return self.path / "model.safetensors"

    def _generate(self, model: LlamaForCausalLM, prompt: Sequence[int]) -> tuple[int, ...]:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=self.num_tokens,
                do_sample=False, eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        return tuple(output[0, len(prompt) :].tolist())


@pytest.fixture(scope="session")
def _tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_model(_tiny_model: TinyModel) -> Iterator[TinyModel]:
    """Whole again afterwards, whatever a test does to its shard."""
    data = _tiny_model.shard.read_bytes()
    yield _tiny_model
    if not _tiny_model.shard.exists() or _tiny_model.shard.read_bytes() != data:
        _tiny_model.shard.write_bytes(data)
