"""Published layouts of embedding models: the vectors are those of transformers, and of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from hermes_async import CheckpointError, ContextLengthError, Engine, RequestError

pytestmark = pytest.mark.anyio

WORDS = [f"w{idx}" for idx in range(4, 60)]
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
TEXTS = ["w4 w5 w6", "", "w7", "W8 w9", " ".join(WORDS[:40]), " ".join(WORDS[10:30])]


def tokenizer(end_only: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: idx for idx, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.NFC()
    begin = "" if end_only else "[CLS]:0 "
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A:0 [SEP]:0",
        pair=f"{begin}$A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is laid out.

    Attributes:
        drop: Entries that its config.json lacks; `architectures` is what it names instead.
        pooling: The file's content; None writes none of sentence-transformers' files.
        limit: Tokens that a text is cut to.
    """

    model: Any
    pooling: dict[str, Any] | None
    limit: int
    folder: str = ""
    sentence: dict[str, Any] | None = None
    general: dict[str, Any] | None = None
    architectures: list[str] | None = None
    no_architectures: bool = False
    normalize: bool = False
    tokenizer: dict[str, Any] | None = None
    bare: bool = False

    def write(self, root: Path) -> tuple[Any, PreTrainedTokenizerFast]:
        torch.manual_seed(5)
        model = self.model().eval()
        path = root / self.folder
        saved = model.base_model if self.bare else model
        saved.save_pretrained(path)
        own = tokenizer(**(self.tokenizer or {}))
        own.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        if self.architectures is not None:
            config["architectures"] = self.architectures
        if self.no_architectures:
            del config["architectures"]
        (path / "config.json").write_text(json.dumps(config))
        if self.pooling is not None:
            kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
            folders = [self.folder, "1_Pooling", "2_Normalize"]
            modules = [
                {"idx": idx, "name": str(idx), "path": folder, "type": f"sentence_transformers.models.{kind}"}
                for idx, (kind, folder) in enumerate(zip(kinds, folders, strict=False))
            ]
            (root / "modules.json").write_text(json.dumps(modules))
            for folder in folders[1:]:
                (root / folder).mkdir()
            pooling = {"word_embedding_dimension": 32} | self.pooling
            (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
            if self.sentence is not None:
                (path / "sentence_bert_config.json").write_text(json.dumps(self.sentence))
            if self.general is not None:
                (root / "config_sentence_transformers.json").write_text(json.dumps(self.general))
        return model, own


def bert() -> Any:
    return BertModel(BertConfig(**SIZES))


def qwen(tied: bool) -> Any:
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": tied}
    return Qwen3ForCausalLM(Qwen3Config(**sizes))


def t5(model_class: Any) -> Any:
    config = T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
    )
    return model_class(config)


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
PROMPTS = {"prompts": {"query": "w50 w51 ", "passage": "w52 "}, "default_prompt_name": "passage"}
LAYOUTS = {
    "max_seq_length": Layout(bert, MEAN, 16, sentence={"max_seq_length": 16, "do_lower_case": False}),
    "tokenizer's length": Layout(bert, MEAN, 20, sentence={}, tokenizer={"model_max_length": 20}),
    "a folder of its own": Layout(bert, MEAN, 16, folder="0_Transformer", sentence={"max_seq_length": 16}),
    "no architectures": Layout(bert, MEAN, 64, no_architectures=True, normalize=True),
    "no files": Layout(bert, None, 64),
    "lower case": Layout(bert, MEAN, 64, sentence={"do_lower_case": True}),
    "left": Layout(
        bert, MEAN, 12, sentence={"max_seq_length": 12}, tokenizer={"truncation_side": "left", "padding_side": "left"}
    ),
    "prompts": Layout(bert, MEAN, 16, sentence={"max_seq_length": 16}, general=PROMPTS),
    "without its prompt": Layout(bert, MEAN | {"include_prompt": False}, 64, general=PROMPTS),
    "several": Layout(bert, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, 64),
    "weightedmean": Layout(bert, {"pooling_mode_weightedmean_tokens": True}, 64),
    "mean_sqrt_len": Layout(bert, {"pooling_mode_mean_sqrt_len_tokens": True}, 64),
    "none named": Layout(bert, {"pooling_mode_mean_tokens": False}, 64),
    "truncated": Layout(bert, MEAN, 64, general={"truncate_dim": 8}, normalize=True),
    "roberta": Layout(
        lambda: RobertaModel(RobertaConfig(**SIZES | {"max_position_embeddings": 66}, pad_token_id=0)), MEAN, 30,
        sentence={"max_seq_length": 30},
    ),
    "bare decoder, tied": Layout(
        lambda: qwen(True), {"pooling_mode_lasttoken": True}, 64, bare=True, architectures=["Qwen3ForCausalLM"],
        tokenizer={"end_only": True, "padding_side": "left"}, normalize=True,
    ),
    "bare decoder, not tied": Layout(
        lambda: qwen(False), {"pooling_mode_lasttoken": True}, 64, bare=True, architectures=["Qwen3ForCausalLM"],
        tokenizer={"end_only": True},
    ),
    "bare decoder, no files": Layout(
        lambda: qwen(False), None, 64, bare=True, architectures=["Qwen3ForCausalLM"], tokenizer={"end_only": True}
    ),
    "bare decoder, no architectures": Layout(
        lambda: qwen(False), {"pooling_mode_cls_token": True}, 64, bare=True, no_architectures=True
    ),
    "t5 encoder": Layout(lambda: t5(T5EncoderModel), MEAN, 32, sentence={"max_seq_length": 32}, normalize=True),
    "t5": Layout(lambda: t5(T5ForConditionalGeneration), MEAN, 32, sentence={"max_seq_length": 32}),
}  # fmt: skip


def expected(layout: Layout, model: Any, own: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """One text alone, by transformers."""
    general = layout.general or {}
    prompt = (general.get("prompts") or {}).get(general.get("default_prompt_name"), "")
    text = prompt + text
    if (layout.sentence or {}).get("do_lower_case"):
        text = text.lower()
    inputs = own(text, truncation=True, max_length=layout.limit, return_tensors="pt")
    base = model.base_model
    base = base.get_encoder() if base.config.is_encoder_decoder else base
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        hidden_states = base(**inputs).last_hidden_state[0]
    pooling = layout.pooling
    if pooling is not None and pooling.get("include_prompt") is False:
        hidden_states = hidden_states[1 + len(prompt.split()) :]
    weights = torch.arange(1.0, len(hidden_states) + 1)[:, None]
    pools = {
        "pooling_mode_cls_token": lambda: hidden_states[0],
        "pooling_mode_max_tokens": lambda: hidden_states.amax(0),
        "pooling_mode_mean_tokens": lambda: hidden_states.mean(0),
        "pooling_mode_weightedmean_tokens": lambda: (hidden_states * weights).sum(0) / weights.sum(),
        "pooling_mode_mean_sqrt_len_tokens": lambda: hidden_states.sum(0) / len(hidden_states) ** 0.5,
        "pooling_mode_lasttoken": lambda: hidden_states[-1],
    }
    asked = [mode for mode in pools if (pooling or {}).get(mode)]
    bare_default = "pooling_mode_lasttoken" if layout.bare and pooling is None else "pooling_mode_mean_tokens"
    vector = torch.cat([pools[mode]() for mode in asked or [bare_default]])
    vector = torch.nn.functional.normalize(vector, dim=0) if layout.normalize else vector
    return vector[: general.get("truncate_dim")]


@pytest.mark.parametrize("name", LAYOUTS)
async def test_vectors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    model, own = layout.write(tmp_path)
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        vectors = await engine.embed(TEXTS)
    wanted = torch.stack([expected(layout, model, own, text) for text in TEXTS])
    np.testing.assert_allclose(vectors, wanted.numpy(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
async def test_vectors_are_those_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    LAYOUTS[name].write(tmp_path)
    has_prompts = (LAYOUTS[name].general or {}).get("prompts")
    asked: list[dict[str, Any]] = [{}, {"prompt": "w30 w31 "}, {"truncate_dim": 5}]
    asked.append({"prompt_name": "query"} if has_prompts else {"prompt": ""})
    wanted = library.SentenceTransformer(str(tmp_path), device="cpu")
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        for options in asked:
            for normalize in (True, None):
                vectors = await engine.embed(TEXTS, normalize=normalize, **options)
                theirs = wanted.encode(TEXTS, batch_size=1, normalize_embeddings=bool(normalize), **options)
                np.testing.assert_allclose(vectors, theirs, atol=2e-5, rtol=1e-4, err_msg=str(options))


async def test_truncation_that_is_asked_for(tmp_path: Path) -> None:
    layout = LAYOUTS["max_seq_length"]
    model, own = layout.write(tmp_path)
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        with pytest.raises(ContextLengthError, match="text 1 has 42 tokens; the most that the checkpoint takes is 16"):
            await engine.embed(["w5", TEXTS[4]], truncate=False)
        vector = await engine.embed(TEXTS[4], truncate=True)
    np.testing.assert_allclose(vector, expected(layout, model, own, TEXTS[4]).numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length must be a whole number"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task='fill-mask'"),
        ("sentence_bert_config.json", {"processor_kwargs": {"do_lower_case": True}}, "processor_kwargs="),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "describes a SparseEncoder"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts must be"),
        ("config_sentence_transformers.json", {"default_prompt_name": "no"}, "default_prompt_name 'no' is none"),
        ("config_sentence_transformers.json", {"truncate_dim": -3}, "truncate_dim must be"),
    ],
)
async def test_settings_that_cannot_be_followed(
    file: str, content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    LAYOUTS["max_seq_length"].write(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        with pytest.raises(CheckpointError, match=message):
            await engine.embed("w5")


async def test_a_length_that_leaves_no_room(tmp_path: Path) -> None:
    Layout(bert, MEAN, 2, sentence={"max_seq_length": 2}).write(tmp_path)
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        with pytest.raises(RequestError, match="2 tokens leave no room for a text"):
            await engine.embed("w5")


@pytest.mark.parametrize("side", ["left", "right"])
async def test_pairs_of_texts(side: str, tmp_path: Path) -> None:
    """Cut as transformers cuts them, with their segments."""
    torch.manual_seed(6)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)).eval()
    model.save_pretrained(tmp_path)
    tokenizer(truncation_side=side).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    own = AutoTokenizer.from_pretrained(tmp_path)
    async with Engine(tmp_path, memory_budget="64MiB") as engine:
        for lengths in [(3, 4), (50, 3), (3, 50), (40, 45), (70, 70), (31, 30)]:
            first, second = (
                " ".join((WORDS * 2)[start : start + length]) for start, length in zip((0, 9), lengths, strict=True)
            )
            inputs = own(first, second, truncation=True, max_length=64, return_tensors="pt")
            assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
            with torch.inference_mode():
                wanted = model(**inputs).logits[0].sigmoid()
            for pair in ((first, second), [first, second]):
                (label,) = await engine.classify(pair, truncate=True)
                assert label.score == pytest.approx(wanted.item(), abs=1e-5), lengths
            if sum(lengths) > 61:
                with pytest.raises(ContextLengthError, match="the model's context of 64"):
                    await engine.classify((first, second))
            for wrong in [(first,), (first, second, second), (first, 3), []]:
                with pytest.raises(RequestError, match="two texts"):
                    await engine.classify(wrong)
