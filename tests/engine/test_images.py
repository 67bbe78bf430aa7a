"""Images in chat messages: what is an image, what is refused, and that a prompt is prepared as transformers does."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hermes_async import EngineConfig, SamplingParams
from hermes_async.engine import image_prompt, images
from hermes_async.engine.image_prompt import encode_with_images
from hermes_async.engine.images import MAX_IMAGES, load_image, load_images
from hermes_async.engine.opening import OpenedModel, open_model
from hermes_async.engine.prompt import encode, prepare, prompt_text, tokenize
from hermes_async.errors import CheckpointError, RequestError
from hermes_async.serving.speculation import AcceptanceRates
from tests.image_models import NAMES, ImageModel, message, picture


def png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, format="PNG")
    return written.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# --- reading one image ---


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_an_image_is_the_same_in_every_form(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    forms = [image, pixels, torch.from_numpy(pixels), data_url(png(image))]
    if width not in (1, 3, 4) and height > 4:  # otherwise a dimension could be that of channels
        forms += [np.moveaxis(pixels, -1, 0), torch.from_numpy(pixels).permute(2, 0, 1)]
    for form in forms:
        assert (np.asarray(load_image(form, where="it")) == pixels).all()


def test_a_file_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "turned.jpg", exif=exif)
    for form in (tmp_path / "turned.jpg", str(tmp_path / "turned.jpg")):
        loaded = load_image(form, where="it")
        assert (loaded.mode, loaded.size) == ("RGB", (56, 40))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_an_image_of_any_mode_becomes_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (3, 2)), where="it").mode == "RGB"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"no image", "cannot be read as an image: UnidentifiedImageError"),
        (b"", "cannot be read as an image"),
        (png(picture(0))[:200], "cannot be read as an image: OSError"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot be read as an image: Unidentified"),
        (bomb(50_000, 50_000), "cannot be read as an image"),
        (bomb(9_000, 9_000), "9000 by 9000 pixels are more than 64000000"),
    ],
)
def test_what_is_no_image(source: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(source)
    for form in (tmp_path / "file.png", data_url(source)):
        with pytest.raises(RequestError, match=says) as caught:
            load_image(form, where="part 0 of message 1")
        assert str(caught.value).startswith("part 0 of message 1")


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(image: Any) -> None:
        raise AssertionError("the pixels were unpacked")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", unpack)
    with pytest.raises(RequestError, match="pixels are more than"):
        load_image(data_url(bomb(8_001, 8_001)), where="it")
    with pytest.raises(RequestError, match="9000 by 9000 pixels"):
        load_image(Image.new("1", (9_000, 9_000)), where="it")
    with pytest.raises(RequestError, match="9000 by 9000 pixels"):
        load_image(np.broadcast_to(np.zeros((), np.uint8), (9_000, 9_000)), where="it")


def test_a_directory_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no file"):
        load_image(tmp_path, where="it")
    with pytest.raises(RequestError, match="FileNotFoundError"):
        load_image(tmp_path / "missing.png", where="it")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64,####", "a data URL that is not base64"),
        ("data:image/png;base64,é", "a data URL that is not base64"),
        ("data:image/png,abc", "does not begin like"),
        ("data:text/plain;base64,YQ==", "does not begin like"),
        ("data:", "does not begin like"),
    ],
)
def test_what_is_no_data_url(url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load_image(url, where="it")


def test_a_data_url_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_DATA_URL_CHARS", 100)
    with pytest.raises(RequestError, match="a data URL of 101 characters; at most 100 are taken"):
        load_image("data:".ljust(101, "a"), where="it")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(3, 8, 8),
        np.zeros((5, 5, 2), np.uint8),
        np.zeros((1, 3, 8, 8), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4), np.uint8),
    ],
)
def test_arrays_that_are_no_image(array: Any) -> None:
    with pytest.raises(RequestError, match=r"it is an array of .* an image is uint8"):
        load_image(array, where="it")


# --- the parts of messages ---


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image"}, "has no 'image'"),
        ({"type": "image", "image": "http://a/b.png"}, "no path and no data URL: 'http://a/b.png'; images are not"),
        ({"type": "image", "image": "HTTPS://a/b.png"}, "images are not fetched"),
        ({"type": "image", "image": ""}, "no path and no data URL"),
        ({"type": "image", "image": 5}, "is of type int"),
        ({"type": "image", "image": picture(0), "url": "http://a"}, "also has url"),
        ({"type": "image", "url": "http://a"}, "also has url"),
        ({"type": "image_url", "image_url": {"url": "http://a/b.png"}}, "needs a data URL"),
        ({"type": "image_url", "image_url": "/etc/passwd"}, "needs a data URL"),
        ({"type": "image_url", "image_url": {}}, "needs a data URL"),
    ],
)
def test_parts_that_are_no_image(part: dict[str, Any], says: str, opened: OpenedModel) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    with pytest.raises(RequestError, match=f"part 1 of message 0 .*{says}"):
        encode(opened, messages)


def test_the_number_of_images_has_a_bound() -> None:
    with pytest.raises(RequestError, match=f"{MAX_IMAGES + 1} images; at most {MAX_IMAGES}"):
        load_images([message(*[np.zeros((1, 1), np.uint8)] * (MAX_IMAGES + 1))])


def test_all_images_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_CONVERSATION_PIXELS", 5_000)
    assert [image.size for image in load_images([message(picture(0), picture(1))])] == [(40, 56)] * 2
    with pytest.raises(RequestError, match=r"part 2 of message 0 .*40 by 56 pixels are more than 520"):
        load_images([message(picture(0), picture(1), picture(2))])


# --- whole prompts ---


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = ImageModel(tmp_path_factory.mktemp(request.param), request.param)
    found = open_model(model.path, "64MiB", EngineConfig(batching="turns"))
    yield model, found
    found.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedModel]:
    found = open_model(ImageModel(tmp_path_factory.mktemp("llava"), "llava").path, "64MiB", EngineConfig())
    yield found
    found.close()


def test_a_prompt_is_prepared_as_by_transformers(made: Any) -> None:
    _, opened = made
    messages = [
        {"role": "system", "content": "short"},
        message("What is", picture(1), "and", picture(2, 64, 32), "?"),
        {"role": "assistant", "content": "a cat"},
        message("and this?"),
    ]
    encoded = encode(opened, messages)
    for_transformers = [
        {**each, "content": [{"type": "text", "text": each["content"]}]} if isinstance(each["content"], str) else each
        for each in messages
    ]
    with opened.processor.taken() as processor:
        expected = processor.apply_chat_template(
            for_transformers, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
    assert encoded.token_ids == expected.pop("input_ids")[0].tolist()
    expected.pop("attention_mask")
    assert set(encoded.model_inputs) == set(expected)
    assert all(torch.equal(encoded.model_inputs[name], expected[name]) for name in expected)
    assert encoded.token_ids == tokenize(opened, messages)
    image_id = opened.skeleton.model.config.image_token_id
    assert image_id in encoded.token_ids
    assert encoded.token_ids[encoded.image_end - 1] == image_id
    assert image_id not in encoded.token_ids[encoded.image_end :]
    params = SamplingParams(max_tokens=5)
    prepared = prepare(opened, encoded, params, prompt_lookup=False, prior=AcceptanceRates())
    assert prepared.capacity == len(encoded.token_ids) + 5
    assert prepared.model_inputs is encoded.model_inputs
    assert prepared.inputs_digest == encoded.inputs_digest


def test_the_digest_is_that_of_the_images(made: Any) -> None:
    _, opened = made

    def digest(*parts: Any) -> str:
        return encode(opened, [message(*parts)]).inputs_digest

    assert digest("a", picture(1)) == digest("another text", picture(1), "behind it") != ""
    assert len({digest(picture(1)), digest(picture(2)), digest(picture(1), picture(2)), digest("a")}) == 4
    assert digest("a") == ""


def test_the_text_of_a_prompt_has_a_placeholder_for_an_image(made: Any) -> None:
    model, opened = made
    text = prompt_text(opened, [message("a", picture(0), "b")])
    assert text.count(model.placeholder) == 1
    assert text.startswith("[user]a")


def test_a_text_may_have_no_placeholder(made: Any) -> None:
    model, opened = made
    with pytest.raises(RequestError, match=r"2 image placeholders .* for 1 images"):
        encode(opened, [message(f"a {model.placeholder}", picture(0))])
    image_id = opened.skeleton.model.config.image_token_id
    piece = opened.tokenizer.decode([image_id])
    with pytest.raises(RequestError, match="2 image placeholders"):
        encode(opened, [message(f"a {piece}", picture(0))])
    for prompt in (f"a {piece}", [5, image_id], [message(f"a {piece}")]):
        with pytest.raises(
            RequestError, match=f"has the token {image_id}, a placeholder for an image, without an image"
        ):
            prepare(opened, encode(opened, prompt), SamplingParams(), prompt_lookup=False, prior=AcceptanceRates())


def test_a_prompt_may_have_no_placeholder_for_a_video(opened: OpenedModel) -> None:
    config = opened.skeleton.model.config
    before = getattr(config, "video_token_id", None)
    params, prior = SamplingParams(), AcceptanceRates()
    try:
        config.video_token_id = 7
        for prompt in ([5, 7], [message("a", picture(0))]):
            encoded = encode(opened, prompt)
            encoded = replace(encoded, token_ids=[*encoded.token_ids, 7])
            with pytest.raises(RequestError, match="has the token 7, a placeholder for a video, without a video"):
                prepare(opened, encoded, params, prompt_lookup=False, prior=prior)
        config.video_token_id = config.image_token_id  # as some models have it
        prepare(opened, encode(opened, [message("a", picture(0))]), params, prompt_lookup=False, prior=prior)
    finally:
        config.video_token_id = before


def test_a_template_that_leaves_an_image_out(opened: OpenedModel) -> None:
    with opened.processor.taken() as processor:
        whole = processor.chat_template
        processor.chat_template = whole.replace("<image>", "")
    try:
        with pytest.raises(RequestError, match=r"0 image placeholders .* for 1 images"):
            encode(opened, [message("a", picture(0))])
    finally:
        processor.chat_template = whole


def test_a_processor_that_fails(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("by its fault")

    with opened.processor.taken() as processor:
        monkeypatch.setattr(type(processor), "__call__", fail)
    with pytest.raises(RequestError, match="by the checkpoint's processor failed: ZeroDivisionError: by its fault"):
        encode(opened, [message("a", picture(0))])


def test_the_tensors_of_a_prompt_have_a_bound(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_prompt, "MAX_INPUT_BYTES", 6_200)
    encode(opened, [message(picture(0), picture(1))])
    with pytest.raises(RequestError, match=r"the images become 9.00 KiB of the model's inputs; at most 6.05 KiB"):
        encode(opened, [message(picture(0), picture(1), picture(2))])


def test_a_checkpoint_without_a_processor(tmp_path: Path) -> None:
    path = ImageModel(tmp_path, "llava").path
    (path / "preprocessor_config.json").unlink()
    found = open_model(path, "64MiB", EngineConfig())
    try:
        with pytest.raises(CheckpointError, match="does not say how images are prepared"):
            encode(found, [message(picture(0))])
        assert encode(found, [message("a text")]).model_inputs == {}
    finally:
        found.close()


def test_a_model_that_takes_no_images(tiny_model: Any) -> None:
    found = open_model(tiny_model.path, "8MiB", EngineConfig())
    try:
        with pytest.raises(RequestError, match="LlamaForCausalLM takes no images"):
            encode_with_images(found, [message(picture(0))], tools=None, chat_template_kwargs=None)
        with pytest.raises(RequestError, match="LlamaForCausalLM takes no images"):
            tokenize(found, [message("a", picture(0))])
    finally:
        found.close()
