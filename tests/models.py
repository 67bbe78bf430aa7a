"""A tiny Llama on disk, and its greedy answers as transformers gives them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hermes_async import EngineConfig, SamplingParams
from hermes_async.engine.opening import open_model


class TinyModel:
    """Three layers, with a tokenizer whose words are `w2` to `w95`, and with a chat template.

    Attributes:
        config: The paper's PIPELOAD: a ring of three buffers, and every layer freed after its computation. Without
            self-check, which is half of what opening takes: `parity/` has it for these architectures, and many others.
        prompts: Token ids.
        references: Of each prompt, `num_tokens` tokens.
    """

    config = EngineConfig(
        num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=16, max_sequences=4, self_check="skip"
    )
    num_tokens = 12
    context = 64
    vocab_size = 96
    seed = 11
    prompt_seed = 5
    prompt_lengths: tuple[int, ...] = (1, 5, 12, 20, 33)

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.manual_seed(self.seed)
        self.model = self.make_model(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=self.vocab_size, max_position_embeddings=self.context, initializer_range=0.3,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        ).eval()  # fmt: skip
        self.change_weights()
        self.model.save_pretrained(path)
        self.save_tokenizer()
        self.prompts = self.make_prompts()
        self.references = [self.greedy(prompt) for prompt in self.prompts]
        self.params = SamplingParams(max_tokens=self.num_tokens, temperature=0, ignore_eos=True)

    @property
    def shard(self) -> Path:
        return self.path / "model.safetensors"

    def make_model(self, **sizes: Any) -> PreTrainedModel:
        return LlamaForCausalLM(LlamaConfig(**sizes))

    def change_weights(self) -> None:
        """Nothing here."""

    def make_prompts(self) -> list[list[int]]:
        chosen = random.Random(self.prompt_seed)
        return [[chosen.randrange(2, self.vocab_size) for _ in range(length)] for length in self.prompt_lengths]

    def save_tokenizer(self) -> None:
        words = ["<s>", "</s>", *(f"w{idx}" for idx in range(2, self.vocab_size))]
        tokenizer = Tokenizer(models.WordLevel({word: idx for idx, word in enumerate(words)}, unk_token="w2"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.chat_template = (
            "{% for message in messages %}"
            "{% if message['role'] == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}"
            "{{ message['content'] + ' ' }}{% endfor %}w7"
        )
        fast.save_pretrained(self.path)

    def greedy(self, prompt: Sequence[int], num_tokens: int | None = None) -> tuple[int, ...]:
        """What transformers generates from `prompt` alone."""
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=num_tokens or self.num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        return tuple(output[0, len(prompt) :].tolist())

    def text(self, token_ids: Iterable[int]) -> str:
        return " ".join(f"w{token_id}" for token_id in token_ids if token_id > 1)


class LongModel(TinyModel):
    """The same weights, for longer texts."""

    context = 512


class CopyingModel(TinyModel):
    """Its next token depends most on the last one, so that its texts come back to themselves now and then."""

    num_tokens = 50
    context = 512
    vocab_size = 40
    seed = 3

    def change_weights(self) -> None:
        with torch.no_grad():
            for layer in self.model.model.layers:
                layer.self_attn.o_proj.weight *= 0.02

    def make_prompts(self) -> list[list[int]]:
        chosen = random.Random(2)
        noise = [chosen.randrange(2, self.vocab_size) for _ in range(40)]
        repeating = [[5], [5, 6, 7], [7, 8, 9, 10, 11, 12] * 4, [2] * 10]
        return [*repeating, noise, [*noise, *self.greedy(noise, 40), *noise]]


class SmallVocabulary(CopyingModel):
    """So few words that their frequencies can be compared."""

    vocab_size = 13


class BareModel(TinyModel):
    """Without a tokenizer, and for more sequences at once."""

    config = dataclasses.replace(TinyModel.config, max_sequences=8)
    context = 128
    seed = 7
    prompt_seed = 3
    prompt_lengths = (1, 5, 12, 20, 33, 2)

    def save_tokenizer(self) -> None:
        pass


class TinyMixture(BareModel):
    """Eight experts in each layer, of which a token has two.

    Attributes:
        smallest_budget: At which few experts are in memory at once.
    """

    config = dataclasses.replace(TinyModel.config, max_resident_layers=None, kv_budget="128KiB")
    num_tokens = 6

    def make_model(self, **sizes: Any) -> PreTrainedModel:
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=8)
        )

    @cached_property
    def smallest_budget(self) -> int:
        opened = open_model(self.path, 1 << 26, self.config)
        opened.close()
        return opened.plan.minimum_budget


def mixture_config() -> Qwen3MoeConfig:
    """Of a small mixture: two layers of 16 experts, 4 of which compute each token."""
    return Qwen3MoeConfig(
        vocab_size=300, bos_token_id=1, eos_token_id=2, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16,
        num_experts_per_tok=4, max_position_embeddings=128,
    )  # fmt: skip
