"""A tiny Llama with a tokenizer and a chat template, on disk, and its greedy answers as transformers gives them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blockbuster import BlockBuster
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hermes_async import EngineConfig, SamplingParams

VOCAB_SIZE = 96
CONTEXT = 64


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


class TinyModel:
    """Words are `w2` to `w95`."""

    config = EngineConfig(num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=16, max_sequences=4)
    num_tokens = 12
    context = CONTEXT
    vocab_size = VOCAB_SIZE

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.manual_seed(11)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB_SIZE, max_position_embeddings=self.context, initializer_range=0.3,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        self.model.save_pretrained(path)
        words = ["<s>", "</s>", *(f"w{idx}" for idx in range(2, VOCAB_SIZE))]
        tokenizer = Tokenizer(models.WordLevel({word: idx for idx, word in enumerate(words)}, unk_token="w2"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.chat_template = (
            "{% for message in messages %}"
            "{% if message['role'] == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}"
            "{{ message['content'] + ' ' }}{% endfor %}w7"
        )
        fast.save_pretrained(path)
        chosen = random.Random(5)
        self.prompts = [[chosen.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 12, 20, 33)]
        self.references = [self.greedy(prompt) for prompt in self.prompts]
        self.params = SamplingParams(max_tokens=self.num_tokens, temperature=0, ignore_eos=True)

    def greedy(self, prompt: list[int], num_tokens: int | None = None) -> tuple[int, ...]:
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=num_tokens or self.num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        return tuple(output[0, len(prompt) :].tolist())

    def text(self, token_ids: Any) -> str:
        return " ".join(f"w{token_id}" for token_id in token_ids if token_id > 1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny"))


class LongModel(TinyModel):
    """The same weights, for longer texts."""

    context = 512


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> LongModel:
    return LongModel(tmp_path_factory.mktemp("long"))


@pytest.fixture
def no_blocking() -> Iterator[BlockBuster]:
    """Fails whatever blocks the event loop, in the package or below it."""
    blockbuster = BlockBuster()
    # The interpreter's own: an import that is already under way, and a pool's idle threads, told to end.
    blockbuster.functions["os.stat"].can_block_in("<frozen importlib._bootstrap>", {"_find_and_load"})
    blockbuster.activate()
    try:
        yield blockbuster
    finally:
        blockbuster.deactivate()
