"""Images in the bodies of requests: data URLs alone."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
from PIL import Image

from hermes_async import EngineConfig, SamplingParams
from tests.image_models import ImageModel, picture
from tests.server.small_models import Serving, serving

pytestmark = pytest.mark.anyio


def data_url(image: Image.Image, kind: str = "png") -> str:
    written = io.BytesIO()
    image.save(written, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def message(*urls: str, role: str = "user", text: str = "What is it?") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": role, "content": [{"type": "text", "text": text}, *parts]}


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory, anyio_backend: Any) -> AsyncIterator[Serving]:
    path = ImageModel(tmp_path_factory.mktemp("model"), "llava").path
    async with serving(path, EngineConfig(batching="turns")) as running:
        yield running


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
async def test_an_image_becomes_tokens(server: Serving, kind: str) -> None:
    answer = await server.post("/tokenize", messages=[message(data_url(picture(0), kind), text="a")])
    assert answer.status_code == 200
    expected = await server.engine.tokenize([message(data_url(picture(0), kind), text="a")])
    assert answer.json()["tokens"] == expected
    without = (await server.post("/tokenize", messages=[message(text="a")])).json()["count"]
    assert answer.json()["count"] == without + 16


async def test_an_image_is_answered(server: Serving) -> None:
    messages = [message(data_url(picture(0)))]
    params = SamplingParams(max_tokens=6, temperature=0)
    expected = await server.engine.complete(messages, params)
    answer = await server.post("/v1/chat/completions", messages=messages, max_tokens=6, temperature=0, n=2)
    assert answer.status_code == 200
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [expected.text] * 2
    assert answer.json()["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    parts = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": data_url(picture(0))}]
    body = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 6, "temperature": 0}
    answer = await server.post("/v1/responses", **body)
    assert answer.status_code == 200
    assert answer.json()["output"][0]["content"][0]["text"] == expected.text


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1/a.png", "images are not fetched"),
        ("https://localhost/a.png", "images are not fetched"),
        ("file:///etc/passwd", "images are not fetched"),
        ("/etc/passwd", "images are not fetched"),
        ("a.png", "images are not fetched"),
        ("", "images are not fetched"),
        ("data:text/plain;base64,YQ==", "images are not fetched"),
    ],
)
async def test_only_data_urls_are_taken(server: Serving, url: str, says: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = await server.post(path, messages=[message(url)])
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert says in error["message"]
        assert error["param"] == "messages.0.content.1.image_url.url"
    parts = [{"type": "input_image", "image_url": url}]
    answer = await server.post("/v1/responses", input=[{"role": "user", "content": parts}])
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "input.0.content.0.image_url"


@pytest.mark.parametrize("part", [{"type": "image", "image": "/etc/passwd"}, {"type": "image_url"}, {"type": "video"}])
async def test_other_parts_are_not_taken(server: Serving, part: dict[str, Any]) -> None:
    answer = await server.post("/v1/chat/completions", messages=[{"role": "user", "content": [part]}])
    assert answer.status_code == 422


async def test_only_users_have_images(server: Serving) -> None:
    for role in ("system", "assistant", "tool"):
        answer = await server.post("/v1/chat/completions", messages=[message(data_url(picture(0)), role=role)])
        assert answer.status_code == 422
        assert "only messages of role 'user' may have images" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("data:image/png;base64,####", "a data URL that is not base64"),
        ("data:image/png,abc", "a data URL that does not begin like"),
        ("data:image/png;base64,YWJj", "part 1 of message 0 cannot be read as an image"),
        (data_url(Image.new("1", (9_000, 9_000))), "9000 by 9000 pixels are more than 64000000"),
    ],
)
async def test_what_is_no_image(server: Serving, content: str, says: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = await server.post(path, messages=[message(content)])
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]


async def test_a_placeholder_in_a_text(server: Serving) -> None:
    body = [message(data_url(picture(0)), text="<image>")]
    answer = await server.post("/v1/chat/completions", messages=body)
    assert answer.status_code == 400
    assert "2 image placeholders (<image>) for 1 images" in answer.json()["error"]["message"]
    answer = await server.post("/v1/chat/completions", messages=[message(text="<image>")])
    assert answer.status_code == 400
    assert "a placeholder for an image, without an image" in answer.json()["error"]["message"]


async def test_after_all_that_a_text_is_answered(server: Serving) -> None:
    answer = await server.post("/v1/chat/completions", messages=[message()], max_tokens=3)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 3
