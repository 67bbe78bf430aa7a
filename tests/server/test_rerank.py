"""`/v1/rerank`: scores and order are those of sentence-transformers' `CrossEncoder`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from hermes_async import Engine, RequestError
from tests.server.small_models import MODEL, WORDS, save_cross_encoder, save_embedder, serving

pytestmark = pytest.mark.anyio

QUERY = "w4 w5 w6"
_chosen = random.Random(4)
DOCUMENTS = [" ".join(_chosen.choices(WORDS, k=_chosen.randint(1, 40))) for _ in range(23)]


def reference(path: Path, query: str = QUERY) -> list[dict[str, Any]]:
    library = pytest.importorskip("sentence_transformers")
    ranked: list[dict[str, Any]] = library.CrossEncoder(str(path), device="cpu").rank(query, DOCUMENTS)
    return ranked


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


ACTIVATIONS = {
    "default": {},
    "identity": {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}},
    "old name": {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
    "other code": {"sentence_transformers": {"activation_fn": "os.system"}},
}


@pytest.mark.parametrize("name", ACTIVATIONS)
async def test_scores_are_those_of_sentence_transformers(name: str, tmp_path: Path) -> None:
    path = save_cross_encoder(tmp_path / "model", **ACTIVATIONS[name])
    expected = reference(path)
    async with serving(path) as server:
        answer = await server.post("/v1/rerank", model=MODEL, query=QUERY, documents=DOCUMENTS)
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
    assert [result["index"] for result in results] == [item["corpus_id"] for item in expected]
    assert [result["relevance_score"] for result in results] == pytest.approx(
        [item["score"] for item in expected], abs=1e-5
    )


async def test_the_layout_of_newer_versions(path: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    import torch

    model = library.CrossEncoder(str(path), device="cpu", activation_fn=torch.nn.Identity(), max_length=12)
    model.save_pretrained(str(tmp_path / "model"))
    expected = reference(tmp_path / "model")
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        ranked = await engine.rank(QUERY, DOCUMENTS)
    assert [document.index for document in ranked] == [item["corpus_id"] for item in expected]
    assert [document.score for document in ranked] == pytest.approx([item["score"] for item in expected], abs=1e-5)
    assert max(document.num_tokens for document in ranked) == 12


async def test_fields_of_the_answer(path: Path) -> None:
    async with serving(path) as server:
        texts = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]
        whole = (await server.post("/v1/rerank", query=QUERY, documents=texts)).json()
        assert whole["id"].startswith("rerank-") and whole["model"] == MODEL
        assert {result["document"]["text"] for result in whole["results"]} == set(DOCUMENTS[:3])
        lengths = [min(24, 3 + len(QUERY.split()) + len(text.split())) for text in DOCUMENTS[:3]]
        assert whole["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
        for route in ("/rerank", "/v2/rerank"):
            answer = await server.post(route, query=QUERY, documents=texts, top_n=2, return_documents=False)
            best = [
                (result["index"], result["relevance_score"], result["document"]) for result in answer.json()["results"]
            ]
            assert best == [(result["index"], result["relevance_score"], None) for result in whole["results"][:2]]
        assert len((await server.post("/rerank", query=QUERY, documents=texts, top_n=0)).json()["results"]) == 3


async def test_all_documents_share_sweeps(path: Path) -> None:
    async with Engine(path, memory_budget="8MiB") as engine:
        before = engine.statistics().sweeps
        ranked = await engine.rank(QUERY, DOCUMENTS)
        assert engine.statistics().sweeps - before < len(DOCUMENTS) / 4
        assert [document.score for document in ranked] == sorted((each.score for each in ranked), reverse=True)
        assert await engine.rank(QUERY, []) == []
        with pytest.raises(RequestError, match="document 1 is no text"):
            await engine.rank(QUERY, ["w4", 5])  # type: ignore[list-item]


async def test_models_that_do_not_rank(tmp_path: Path) -> None:
    for name, path in (
        ("labels", save_cross_encoder(tmp_path / "labels", num_labels=3)),
        ("vectors", save_embedder(tmp_path / "vectors")),
    ):
        async with serving(path) as server:
            answer = await server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS[:1])
            assert answer.status_code == 400, name
            assert "does not rank documents" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Dense")]),
        ("config_sentence_transformers.json", {"default_prompt_name": "query", "prompts": {"query": "w4 "}}),
        ("config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Softplus"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": "long"}),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}),
    ],
)  # fmt: skip
async def test_settings_that_are_not_supported(path: Path, tmp_path: Path, file: str, content: Any) -> None:
    shutil.copytree(path, tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(content))
    async with serving(tmp_path / "model") as server:
        answer = await server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS[:1])
        assert answer.status_code == 400
        assert "not" in answer.json()["error"]["message"]
        assert str(tmp_path) not in answer.text


async def test_what_is_refused(path: Path) -> None:
    good: dict[str, Any] = {"query": QUERY, "documents": ["w4"]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"documents": []}, "documents"),
        ({"documents": ["w4"] * 2049}, "documents"),
        ({"documents": [{"text": "w4", "title": "x"}]}, "documents.0.title"),
        ({"documents": [5]}, "documents.0"),
        ({"query": None}, "query"),
        ({"query": ["w4"]}, "query"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": 2**40}, "top_n"),
        ({"rank_fields": ["x"]}, "rank_fields"),
    ]
    async with serving(path) as server:
        for fields, param in cases:
            answer = await server.post("/v1/rerank", **{**good, **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
        answer = await server.post("/v1/rerank", **{**good, "query": "w4 " * 5000})
        assert answer.json()["error"]["code"] == "context_length_exceeded"
