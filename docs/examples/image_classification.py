"""Labels of images: python image_classification.py [MODEL IMAGE...]; needs the extra `vision`.

Without arguments, a tiny random model labels a random image. Its labels mean nothing. google/vit-base-patch16-224 is
a model whose labels do.
"""

import sys
import tempfile
from pathlib import Path

import anyio

from hermes_async import Engine, Label


async def main(model: str, images: list[str]) -> None:
    """Prints the three likeliest labels of each image. All images share the passes over the weights."""
    labels: dict[str, list[Label]] = {}

    async def label(image: str) -> None:
        labels[image] = list(await engine.classify(image))

    async with Engine(model) as engine, anyio.create_task_group() as tasks:
        for image in images:
            tasks.start_soon(label, image)
    for image in images:
        likeliest = ", ".join(f"{label.label} {label.score:.1%}" for label in labels[image][:3])
        print(f"{Path(image).name}: {likeliest}")


def random_model_and_image(folder: Path) -> tuple[str, list[str]]:
    """Makes a model with random weights, and an image of noise."""
    import numpy as np
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    size = 32
    config = ViTConfig(image_size=size, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, id2label={0: "cat", 1: "dog", 2: "owl"})  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    image = folder / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(image)
    return str(folder), [str(image)]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        anyio.run(main, sys.argv[1], sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            print("a tiny random model; its labels mean nothing")
            anyio.run(main, *random_model_and_image(Path(folder)))
