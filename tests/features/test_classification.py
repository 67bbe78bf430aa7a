"""Texts and image files to labels, as the model and the checkpoint's own preparation give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hermes_async import CheckpointError, ContextLengthError, Engine, Label, RequestError

pytestmark = pytest.mark.anyio

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}


@pytest.fixture
def texts(tmp_path: Path, tiny_model: Any) -> Any:
    """Saves a classifier with the tiny model's tokenizer."""

    def save(model_class: Any = BertForSequenceClassification, **config: Any) -> Any:
        torch.manual_seed(1)
        options = SMALL | NAMES | {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.5} | config
        model = model_class(BertConfig(**options)).eval()
        model.save_pretrained(tmp_path / "model")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "model" / file).write_bytes((tiny_model.path / file).read_bytes())
        return model

    return save


@pytest.fixture
def images(tmp_path: Path) -> Any:
    torch.manual_seed(1)
    model = ViTForImageClassification(ViTConfig(**SMALL, **NAMES, image_size=16, patch_size=4)).eval()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return model


async def test_a_text(texts: Any, tmp_path: Path) -> None:
    model = texts()
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        labels = await engine.classify("w5 w6 w7")
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0].softmax(0)
    assert all(isinstance(label, Label) for label in labels)
    assert {label.label: pytest.approx(label.score, abs=1e-5) for label in labels} == {
        "bad": float(scores[0]),
        "so-so": float(scores[1]),
        "good": float(scores[2]),
    }
    assert [label.score for label in labels] == sorted((label.score for label in labels), reverse=True)


async def test_labels_that_do_not_exclude_each_other(texts: Any, tmp_path: Path) -> None:
    model = texts(problem_type="multi_label_classification")
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        labels = await engine.classify("w5 w6 w7")
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0].sigmoid()
    assert sorted(label.score for label in labels) == pytest.approx(sorted(scores.tolist()), abs=1e-5)


async def test_a_long_text(texts: Any, tmp_path: Path) -> None:
    texts()
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        with pytest.raises(ContextLengthError):
            await engine.classify("w5 " * 70)
        assert len(await engine.classify("w5 " * 70, truncate=True)) == 3
        with pytest.raises(RequestError, match="the text has no tokens"):
            await engine.classify("")


async def test_an_image(images: Any, tmp_path: Path) -> None:
    image = Image.effect_noise((30, 20), 90.0)
    image.save(tmp_path / "image.png")
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        labels = await engine.classify(tmp_path / "image.png")
        assert labels == await engine.classify(str(tmp_path / "image.png"))
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        scores = images(**processor(images=image.convert("RGB"), return_tensors="pt")).logits[0].softmax(0)
    best = int(scores.argmax())
    assert labels[0].label == NAMES["id2label"][best]
    assert labels[0].score == pytest.approx(float(scores[best]), abs=1e-5)


async def test_no_two_images_are_in_one_processor(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "image.png")
    used: list[ViTImageProcessorPil] = []
    works = ViTImageProcessorPil.__call__

    def call(processor: ViTImageProcessorPil, *args: Any, **options: Any) -> Any:
        used.append(processor)
        return works(processor, *args, **options)

    monkeypatch.setattr(ViTImageProcessorPil, "__call__", call)
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        labels = [await engine.classify(tmp_path / "image.png") for _ in range(2)]
    assert labels[0] == labels[1]
    assert used[0] is not used[1]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", None])
async def test_what_is_no_image(images: Any, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "image.png"
    if content is not None:
        file.write_bytes(content)
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        with pytest.raises(RequestError, match=r"image\.png cannot be read as an image"):
            await engine.classify(file)


async def test_an_image_of_too_many_pixels(images: Any, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.new("1", (9_000, 9_000)).save(file)
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        with pytest.raises(RequestError, match="9000 by 9000 pixels are more than"):
            await engine.classify(file)
        with pytest.raises(RequestError, match="a text, two texts or the path of an image is wanted, not int"):
            await engine.classify(5)


async def test_a_checkpoint_that_does_not_say_how_images_are_prepared(images: Any, tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "image.png")
    for file in (tmp_path / "model").glob("*processor*"):
        file.unlink()
    async with Engine(tmp_path / "model", memory_budget="8MiB") as engine:
        with pytest.raises(CheckpointError, match="does not say how images are prepared"):
            await engine.classify(tmp_path / "image.png")


async def test_models_that_do_not_classify(texts: Any, tmp_path: Path, tiny_model: Any) -> None:
    texts(BertForTokenClassification)
    for path, name in ((tmp_path / "model", "BertForTokenClassification"), (tiny_model.path, "LlamaForCausalLM")):
        async with Engine(path, memory_budget="8MiB") as engine:
            with pytest.raises(RequestError, match=f"{name} does not classify"):
                await engine.classify("w5 w6")
