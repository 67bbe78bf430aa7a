"""The seeds of the fuzzer: tiny checkpoints of several kinds, made by transformers from configurations."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hermes_async.planning.machine_speeds import DiskRate
from hermes_async.planning.profile import KernelProfile, Profile, StageProfile
from hermes_async.planning.profile_store import profile_file, save_profile
from hermes_async.storage.checkpoint import Checkpoint
from tests.gguf_models import Written, llama_changes, save_gguf

VOCAB_SIZE = 96

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'nobody' %}{{ raise_exception('nobody may not speak') }}"
    "{% endif %}{{ bos_token }}{{ message['role'] | trim }} {{ message['content'] + ' ' }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w7{% endif %}"
)

RESPONSE_TEMPLATE = {
    "start_anchor_pattern": r"w7\s*",
    "fields": {
        "reasoning_content": {"open_pattern": r"\s*<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>", "close_pattern": r"</call>\s*", "content": "xml-inline", "repeats": True,
            "content_args": {"tag_pattern": r"(?P<key>\w+)=(?P<value>\w+)"},
        },
        "content": {},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A checkpoint of the corpus.

    Attributes:
        name: Of its folder.
        parts: The files that are mutated, by what they are: "config", "header", ...
        gguf: Its file, if it is a GGUF model; empty otherwise.
    """

    name: str
    parts: dict[str, str]
    gguf: str = ""

    def source(self, folder: Path) -> Path:
        """What an engine opens."""
        return folder / self.name / self.gguf


_TEXT = {
    "config": "config.json",
    "header": "model.safetensors",
    "generation": "generation_config.json",
    "tokenizer": "tokenizer.json",
    "tokenizer settings": "tokenizer_config.json",
    "template": "chat_template.jinja",
}
MODELS = (
    Model("llama", _TEXT),
    Model("gpt2", {"config": "config.json", "index": "model.safetensors.index.json", "header": "one.safetensors"}),
    Model("mixture", {"config": "config.json", "header": "model.safetensors", "generation": "generation_config.json"}),
    Model("bert", {"config": "config.json", "header": "model.safetensors", "pooling": "1_Pooling/config.json"}),
    Model("gguf", {"gguf": "model.gguf"}, "model.gguf"),
)


def make_corpus(folder: Path) -> None:
    """Writes all checkpoints, each into a folder with its name."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1}
    llama: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**llama)).save_pretrained(folder / "llama")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes))
    gpt2.save_pretrained(folder / "gpt2", max_shard_size="40KB")
    (folder / "gpt2" / "one.safetensors").write_bytes(b"")
    mixture = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **llama)
    Qwen3MoeForCausalLM(mixture).save_pretrained(folder / "mixture")
    bert = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(bert).save_pretrained(folder / "bert")
    _name_first_shard(folder / "gpt2")
    _save_pooling(folder / "bert")
    (folder / "gguf").mkdir()
    save_gguf(Written(LlamaConfig(**llama), "llama", llama_changes, _GGUF), folder / "gguf" / "model.gguf")
    for name in ("llama", "gpt2", "mixture", "bert"):
        _save_tokenizer(folder / name)


_GGUF = {
    "feed_forward_length": 48,
    "attention__head_count": 4,
    "attention__head_count_kv": 2,
    "attention__layer_norm_rms_epsilon": 1e-6,
    "rope__dimension_count": 8,
    "rope__freq_base": 10000.0,
    "vocab_size": VOCAB_SIZE,
}


def _name_first_shard(directory: Path) -> None:
    """Renames the first shard, so that its name is the same whatever transformers calls it."""
    index = directory / "model.safetensors.index.json"
    first = min(path for path in directory.glob("model-*.safetensors"))
    first.replace(directory / "one.safetensors")
    index.write_text(index.read_text().replace(first.name, "one.safetensors"))


def _save_pooling(directory: Path) -> None:
    (directory / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
        '{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}'
    )


def _save_tokenizer(directory: Path) -> None:
    words = ["<s>", "</s>", *(f"w{idx}" for idx in range(2, VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: idx for idx, word in enumerate(words)}, unk_token="w2"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[\p{L}\p{N}]+|\s+"), "removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Replace("w2", "w3")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"response_template": RESPONSE_TEMPLATE}))


def save_profile_of(source: Path) -> Path:
    """Writes a profile of a checkpoint into the user's cache, and returns its file."""
    file = profile_file(Checkpoint.open(source))
    by_tokens = {1: 1e-9, 64: 1e-10}
    stages = (StageProfile("model.layers.0", 2**20, False, False, 0.01, {1: 0.01, 64: 0.02}),)
    profile = Profile(
        memory_budget=2**23, asked_for="8MiB", dtype="float32", created_at=time.time() - 3600, stages=stages,
        layer_s=by_tokens, head_s=by_tokens, sweep_s={1: 1e-3, 64: 2e-3}, handover_s=3e-4,
        disk=(DiskRate(1, 2**20, 2e9), DiskRate(2, 2**20, 3e9)), read_share=0.9,
        kernels=(KernelProfile("float32", "oneDNN", {1: 1e9, 64: 1e10}),), expert_uses=(1.0, 0.5),
    )  # fmt: skip
    save_profile(file, profile)
    return file
