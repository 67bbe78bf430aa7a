"""`/v1/embeddings`: the vectors are those of sentence-transformers, whatever form inputs and vectors have."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import openai
import pytest

from hermes_async.server.model_server import model_server_of
from tests.server.small_models import MODEL, WORDS, save_embedder, serving

pytestmark = pytest.mark.anyio

TEXTS = ["w4 w5 w6", "w7", "w9 w8", " ".join(WORDS[:40]), " ".join(WORDS[10:20])]
NUM_TOKENS = [5, 3, 4, 16, 12]
"""With special tokens, and cut at 16."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


def reference(path: Path, **options: Any) -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(path), device="cpu").encode(TEXTS, **options)


def vectors_of(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)


async def test_vectors_are_those_of_sentence_transformers(path: Path) -> None:
    async with serving(path) as server:
        answer = await server.post("/v1/embeddings", model=MODEL, input=TEXTS, user="somebody")
        np.testing.assert_allclose(vectors_of(answer), reference(path), atol=1e-6)
        body = answer.json()
        assert (body["object"], body["model"]) == ("list", MODEL)
        assert body["usage"] == {"prompt_tokens": sum(NUM_TOKENS), "total_tokens": sum(NUM_TOKENS)}
        assert [(item["index"], item["object"]) for item in body["data"]] == [(idx, "embedding") for idx in range(5)]
        one = await server.post("/v1/embeddings", input=TEXTS[0], encoding_format="float")
        np.testing.assert_allclose(vectors_of(one), vectors_of(answer)[:1], atol=1e-6)
        assert one.json()["usage"]["total_tokens"] == NUM_TOKENS[0]
        assert (await server.post("/v1/embeddings", input=[])).status_code == 422
        counts = await server.counts()
        assert counts["hermes_async_encoded_tokens_total"] == sum(NUM_TOKENS) + NUM_TOKENS[0]
        assert counts['hermes_async_requests_total{route="/v1/embeddings",status="200"}'] == 2
        assert counts['hermes_async_requests_total{route="/v1/embeddings",status="422"}'] == 1


async def test_base64_and_openais_client(path: Path) -> None:
    async with serving(path) as server:
        numbers = vectors_of(await server.post("/v1/embeddings", input=TEXTS))
        encoded = (await server.post("/v1/embeddings", input=TEXTS, encoding_format="base64")).json()["data"]
        for item, expected in zip(encoded, numbers, strict=True):
            assert np.array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), expected)
        async with openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="none", http_client=server.client, max_retries=0
        ) as client:
            for form in ({}, {"encoding_format": "float"}):
                answer = await client.embeddings.create(model=MODEL, input=TEXTS, **form)  # type: ignore[arg-type]
                np.testing.assert_allclose([item.embedding for item in answer.data], numbers, rtol=1e-6)


async def test_token_ids(path: Path) -> None:
    async with serving(path) as server:
        token_ids = [(await server.post("/tokenize", prompt=text)).json()["tokens"] for text in TEXTS[:3]]
        answer = await server.post("/v1/embeddings", input=token_ids)
        np.testing.assert_allclose(vectors_of(answer), reference(path)[:3], atol=1e-6)
        assert answer.json()["usage"]["total_tokens"] == sum(NUM_TOKENS[:3])
        one = await server.post("/v1/embeddings", input=token_ids[1])
        np.testing.assert_allclose(vectors_of(one), vectors_of(answer)[1:2], atol=1e-6)
        assert (await server.post("/v1/embeddings", input=[60])).status_code == 400  # not in the vocabulary
        assert (await server.post("/v1/embeddings", input=[5] * 65)).json()["error"][
            "code"
        ] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("config", "general", "allowed", "refused"),
    [
        ({"matryoshka_dimensions": [8, 16]}, {}, [8, 16, 32], [4, 12, 33]),
        ({"is_matryoshka": True}, {}, [1, 31, 32], [33]),
        ({}, {"truncate_dim": 24}, [6, 24], [25, 32]),
        ({}, {}, [32], [8, 31, 33]),
    ],
    ids=["dimensions", "any", "truncate_dim", "none"],
)
async def test_dimensions_where_the_model_allows_them(
    config: Any, general: Any, allowed: list[int], refused: list[int], tmp_path: Path
) -> None:
    path = save_embedder(tmp_path / "model", general, **config)
    async with serving(path) as server:
        for dimensions in allowed:
            answer = await server.post("/v1/embeddings", input=TEXTS, dimensions=dimensions)
            whole = dimensions == general.get("truncate_dim", 32)
            expected = reference(path, truncate_dim=dimensions, normalize_embeddings=not whole)
            np.testing.assert_allclose(vectors_of(answer), expected, atol=1e-6)
        for dimensions in refused:
            answer = await server.post("/v1/embeddings", input=TEXTS, dimensions=dimensions)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("dimensions must be")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input.0"),
        ({"input": ["w4", 5]}, "input.1"),
        ({"input": ["w4", [5]]}, "input.1"),
        ({"input": [5, "w4"]}, "input.1"),
        ({"input": [-1]}, "input.0"),
        ({"input": ["w4"] * 2049}, "input"),
        ({"input": None}, "input"),
        ({}, "input"),
        ({"input": "w4", "dimensions": 0}, "dimensions"),
        ({"input": "w4", "dimensions": 2**20}, "dimensions"),
        ({"input": "w4", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "w4", "truncate": True}, "truncate"),
    ],
)
async def test_what_is_refused(path: Path, fields: dict[str, Any], param: str) -> None:
    async with serving(path) as server:
        answer = await server.post("/v1/embeddings", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text


async def test_settings_that_are_not_supported_show_no_path(path: Path, tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "model")
    (model / "2_Normalize" / "config.json").write_text('{"module_input_name": "other"}')
    async with serving(model) as server:
        answer = await server.post("/v1/embeddings", input="w4")
        assert answer.status_code == 400
        assert str(tmp_path) not in answer.text
        assert (await server.post("/v1/embeddings", input="w4", model="other")).status_code == 404
        assert (await server.post("/v1/responses", input="w4")).status_code == 400  # it does not generate


async def test_a_request_ends_at_its_deadline_and_with_the_server(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(path, request_timeout_s=0.01) as server:
        monkeypatch.setattr(server.engine, "embed_counted", lambda *args, **options: anyio.sleep_forever())
        answer = await server.post("/v1/embeddings", input="w4")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    async with serving(path) as server:
        begun = anyio.Event()

        async def embed(*args: Any, **options: Any) -> None:
            begun.set()
            await anyio.sleep_forever()

        monkeypatch.setattr(server.engine, "embed_counted", embed)
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await server.post("/v1/embeddings", input="w4")).status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await begun.wait()
            await model_server_of(server.app).stop(0.001)
        assert statuses == [503]
        assert (await server.post("/v1/embeddings", input="w4")).status_code == 503


async def test_a_client_that_goes_away_ends_its_passes(path: Path) -> None:
    async with serving(path) as server:
        body = b'{"input": "w4 w5"}'
        sent = [{"type": "http.request", "body": body, "more_body": False}]
        gone = anyio.Event()

        async def receive() -> Any:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def ignore(message: Any) -> None:
            pass

        ended = anyio.Event()

        async def embed(*args: Any, **options: Any) -> None:
            gone.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        server.engine.embed_counted = embed  # type: ignore[method-assign, assignment]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"", "http_version": "1.1",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")], "scheme": "http",
            "server": ("localhost", 80), "client": ("localhost", 5), "root_path": "",
        }  # fmt: skip
        with anyio.fail_after(30):
            await server.app(scope, receive, ignore)
        assert ended.is_set()
