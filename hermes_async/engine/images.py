"""Reads the images of chat messages. Nothing is fetched from a network, and no large image is unpacked.

Pillow reads an image's header first; the number of its pixels is checked before they are unpacked.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hermes_async.errors import RequestError
from hermes_async.storage.file_kinds import exists, is_file

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 64
"""The most images of a conversation."""

MAX_PIXELS = 64_000_000
"""The most pixels of an image: a small file may unpack to any number."""

MAX_CONVERSATION_PIXELS = 2 * MAX_PIXELS
"""The most pixels of all images of a conversation, which are in memory at the same time."""

MAX_DATA_URL_CHARS = 64 * 1024**2

IMAGE_KINDS = ("image", "image_url")

# Formats that Pillow reads itself. For others, such as EPS, it would run a program.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_URL_SCHEMES = ("http:", "https:", "ftp:", "file:", "s3:", "gs:")


def is_image_part(part: Any) -> bool:
    """Whether this is an image among the parts of a message's content."""
    return isinstance(part, Mapping) and part.get("type") in IMAGE_KINDS


def image_parts(messages: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The images of a conversation in their order, each with where it is."""
    for message_idx, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part_idx, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            if is_image_part(part):
                yield f"part {part_idx} of message {message_idx}", part


def image_source(where: str, part: Mapping[str, Any]) -> Any:
    """What an image part names: a path, a data URL, or the image itself.

    Raises:
        RequestError: It names nothing that can be an image, or more than that.
    """
    kind = part["type"]
    unknown = [str(key) for key in part if key not in ("type", kind)]
    if kind not in part or unknown:
        wanted = "'image': a path, image, array or data URL" if kind == "image" else "'image_url': {'url': a data URL}"
        found = f"also has {', '.join(unknown)}" if unknown else f"has no {kind!r}"
        raise RequestError(f"{where} {found}; an image is {{'type': {kind!r}, {wanted}}}")
    source = part[kind]
    if kind == "image_url":
        url = source.get("url") if isinstance(source, Mapping) else source
        if not isinstance(url, str) or not url.startswith("data:"):
            raise RequestError(f"{where} needs a data URL (data:image/png;base64,...): images are not fetched")
        return url
    if isinstance(source, str):
        if not source or source.lower().startswith(_URL_SCHEMES):
            raise RequestError(f"{where} is no path and no data URL: {source!r:.100}; images are not fetched")
        return source
    if isinstance(source, os.PathLike) or _is_array(source) or hasattr(source, "convert"):
        return source
    raise RequestError(f"{where} is of type {type(source).__name__}; it must be a path, image, array or data URL")


def load_images(messages: Sequence[Any]) -> list[Image]:
    """All images of a conversation, in RGB; for a worker thread.

    Raises:
        RequestError: There are too many images or pixels, Pillow is not installed, or something is no image.
    """
    parts = list(image_parts(messages))
    if len(parts) > MAX_IMAGES:
        raise RequestError(f"the messages have {len(parts)} images; at most {MAX_IMAGES} are taken")
    images: list[Image] = []
    left = MAX_CONVERSATION_PIXELS
    for where, part in parts:
        images.append(load_image(image_source(where, part), where=where, max_pixels=min(left, MAX_PIXELS)))
        left -= images[-1].width * images[-1].height
    return images


def load_image(source: Any, *, where: str, max_pixels: int = MAX_PIXELS) -> Image:
    """An image in RGB, turned as its EXIF data says, as transformers loads images.

    Args:
        source: A path, a data URL, an image of Pillow, or an array or tensor: uint8, [H, W], [H, W, C] or [C, H, W],
            with 1, 3 or 4 channels.
        where: The beginning of error messages.

    Raises:
        RequestError: Pillow is not installed, or this is no image, or one with too many pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RequestError("images need Pillow: pip install 'hermes_async[vision]'") from error
    if _is_array(source):
        source = _image_of_array(source, where, max_pixels)
    elif isinstance(source, str) and source.startswith("data:"):
        source = io.BytesIO(_decoded(source, where))
    elif isinstance(source, (str, os.PathLike)):
        source = Path(source)
        if exists(source) and not is_file(source):
            raise RequestError(f"{where} cannot be read as an image: {source} is no file")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # as this Pillow was built
    try:
        with ExitStack() as exits:
            own = isinstance(source, Image.Image)
            image: Image.Image = source if own else exits.enter_context(Image.open(source, formats=formats))
            _check_pixels(where, image.width, image.height, max_pixels)
            return ImageOps.exif_transpose(image).convert("RGB")
    except RequestError:
        raise
    # Pillow may raise any error for a broken file.
    except Exception as error:
        raise RequestError(f"{where} cannot be read as an image: {type(error).__name__}: {error}") from error


def _check_pixels(where: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RequestError(f"{where} cannot be read as an image: {width} by {height} pixels are more than {max_pixels}")


def _decoded(url: str, where: str) -> bytes:
    """The bytes of a data URL."""
    if len(url) > MAX_DATA_URL_CHARS:
        raise RequestError(f"{where} is a data URL of {len(url)} characters; at most {MAX_DATA_URL_CHARS} are taken")
    head, comma, data = url.partition(",")
    kind, *options = head.removeprefix("data:").split(";")
    if not comma or not kind.startswith("image/") or not options or options[-1] != "base64":
        raise RequestError(f"{where} is a data URL that does not begin like data:image/png;base64, but {url!r:.60}")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where} is a data URL that is not base64: {error}") from error


def _is_array(source: Any) -> bool:
    """Whether this is an array or a tensor. Tensors are known by their method: this module imports no torch."""
    return isinstance(source, np.ndarray) or (hasattr(source, "detach") and hasattr(source, "shape"))


def _image_of_array(array: Any, where: str, max_pixels: int) -> Image:
    from PIL import Image

    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    channels_first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    height_width = shape[1:] if channels_first else shape[:2]
    channels = 1 if len(shape) == 2 else shape[0] if channels_first else shape[-1]
    if dtype != "uint8" or len(shape) not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise RequestError(
            f"{where} is an array of {dtype} with shape {list(shape)}; an image is uint8, [height, width] or "
            "[height, width, channels] or [channels, height, width], with 1, 3 or 4 channels"
        )
    _check_pixels(where, height_width[1], height_width[0], max_pixels)
    values = array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()
    values = np.moveaxis(values, 0, -1) if channels_first else values
    values = values[..., 0] if values.ndim == 3 and channels == 1 else values
    return Image.fromarray(np.ascontiguousarray(values))
