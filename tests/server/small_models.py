"""Small models for the routes that do not generate, made on the spot, and a server for each in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from hermes_async import Engine, EngineConfig
from hermes_async.server import ServerSettings, create_app
from tests.server.running import counts_of

MODEL = "small"
WORDS = [f"w{idx}" for idx in range(4, 60)]
_SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip


def save_tokenizer(path: Path, **options: Any) -> None:
    """Saves a tokenizer whose words are `w4` to `w59`, with special tokens around texts and pairs."""
    vocabulary = {word: idx for idx, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options).save_pretrained(path)


def save_embedder(path: Path, general: dict[str, Any] | None = None, **config: Any) -> Path:
    """Saves a model of sentence vectors: the mean of a small BERT, scaled to length 1.

    Args:
        general: Of `config_sentence_transformers.json`.
        config: Entries of `config.json`.
    """
    torch.manual_seed(3)
    BertModel(BertConfig(**_SIZES, **config)).eval().save_pretrained(path)
    save_tokenizer(path)
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": idx, "name": str(idx), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for idx, (kind, folder) in enumerate(kinds)
    ]
    for folder in ("1_Pooling", "2_Normalize"):
        (path / folder).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
        "config_sentence_transformers.json": general or {},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


def save_cross_encoder(path: Path, num_labels: int = 1, **config: Any) -> Path:
    """Saves a cross-encoder."""
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(**_SIZES, num_labels=num_labels, **config))
    model.eval().save_pretrained(path)
    save_tokenizer(path, model_max_length=24)
    return path


@dataclass(frozen=True, slots=True)
class Serving:
    """An application with its open engine, and a client of it."""

    app: FastAPI
    engine: Engine
    client: httpx.AsyncClient

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def counts(self) -> dict[str, float]:
        """The server's metrics."""
        return counts_of((await self.client.get("/metrics")).text)


@contextlib.asynccontextmanager
async def serving(path: Path, config: EngineConfig | None = None, **settings: Any) -> AsyncIterator[Serving]:
    """Serves a model without a socket."""
    engine = Engine(path, memory_budget="8MiB", config=config)
    app = create_app(engine, ServerSettings(served_model_name=MODEL, **settings))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield Serving(app, engine, client)
