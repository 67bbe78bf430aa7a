"""Turns chat messages with images into token ids and the model's other inputs, with the checkpoint's own processor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from hermes_async.config import format_bytes
from hermes_async.engine.chat_messages import render
from hermes_async.engine.images import load_images
from hermes_async.errors import MemoryBudgetError, RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.modeling.activations import SweepSize
from hermes_async.modeling.inputs import input_names, num_values
from hermes_async.serving.request import EncodedPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from hermes_async.engine.opening import OpenedModel
    from hermes_async.modeling.skeleton import Skeleton
    from hermes_async.serving.processor import SharedProcessor
    from hermes_async.serving.tokenizer import SharedTokenizer

EXAMPLE_PIXELS = 448
"""Width and height of the image with which a model is tried. Every engine has memory for one of this size."""

MAX_INPUT_BYTES = 1024**3
"""The most bytes of a request's tensors, which are in memory until its prompt is computed."""

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


class PreparesImages(Protocol):
    """What the preparation needs of a model; see `OpenedModel`."""

    @property
    def skeleton(self) -> Skeleton: ...
    @property
    def tokenizer(self) -> SharedTokenizer | None: ...
    @property
    def tokenizer_error(self) -> str | None: ...
    @property
    def processor(self) -> SharedProcessor: ...


def takes_images(skeleton: Skeleton) -> bool:
    """Whether the model generates from texts and images."""
    return skeleton.generates and not skeleton.is_encoder_decoder and "pixel_values" in input_names(skeleton.model)


def image_token_id(skeleton: Skeleton) -> int | None:
    """The token that stands for a piece of an image; None if the model takes no images."""
    token_id = getattr(skeleton.model.config, "image_token_id", None)
    return token_id if isinstance(token_id, int) and takes_images(skeleton) else None


def _placeholders(skeleton: Skeleton, *, images: bool) -> dict[int, str]:
    """Tokens in whose place a model puts what is no text, with what that is, for a prompt that has none of it.

    Args:
        images: Whether images count.
    """
    if not takes_images(skeleton):
        return {}
    named = {"video_token_id": "a video", "audio_token_id": "audio"}
    found = {getattr(skeleton.model.config, name, None): what for name, what in named.items()}
    found.pop(image_token_id(skeleton), None)  # some models have one token for images and videos
    if images:
        found[image_token_id(skeleton)] = "an image"
    return {token_id: what for token_id, what in found.items() if isinstance(token_id, int)}


def example_with_image(opened: PreparesImages) -> EncodedPrompt:
    """A prompt with one image, to try a model with.

    Raises:
        RequestError, CheckpointError: As `encode_with_images`.
    """
    pixels = np.zeros((EXAMPLE_PIXELS, EXAMPLE_PIXELS, 3), np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": "?"}]
    return encode_with_images(opened, [{"role": "user", "content": content}], tools=None, chat_template_kwargs=None)


def check_images(opened: OpenedModel, prompt: EncodedPrompt) -> None:
    """Checks whether the engine can compute a prompt with images, and that it has no other placeholders.

    Raises:
        RequestError: It cannot, or there is one.
        MemoryBudgetError: The activations may take more memory than the plan's workspace.
    """
    placeholders = _placeholders(opened.skeleton, images=not prompt.model_inputs)
    token_id = next((token_id for token_id in prompt.token_ids if token_id in placeholders), None)
    if token_id is not None:
        what = placeholders[token_id]
        instead = (
            "images as parts of chat messages" if what == "an image" else "text and images: the engine takes these"
        )
        raise RequestError(
            f"the prompt has the token {token_id}, a placeholder for {what}, without {what}; give {instead}"
        )
    if not prompt.model_inputs:
        return
    if opened.probe.images is None:
        raise RequestError(f"this engine takes no images: {opened.images_refusal}")
    num_tokens = len(prompt.token_ids)
    size = SweepSize(turn_tokens=num_tokens, turn_outputs=1, num_values=(num_values(prompt.model_inputs),))
    bounds, kv_bytes, room = opened.bounds, opened.plan.kv_bytes, opened.plan.workspace_bytes
    nbytes = bounds.calls(size, kv_bytes=kv_bytes)
    if nbytes > room:
        most_bytes = max(nbytes, bounds.prompt_with_image(num_tokens, kv_bytes=kv_bytes))
        minimum = opened.plan.memory_budget + most_bytes - room
        raise MemoryBudgetError(
            f"the images and the {num_tokens} tokens of the prompt may take {format_bytes(nbytes)} of activations; the "
            f"plan has {format_bytes(room)} for them. Give fewer or smaller images, or open the engine with "
            f"max_tokens_per_sweep={num_tokens} and a memory_budget of about {format_bytes(minimum)}",
            requested_bytes=nbytes,
            budget_bytes=room,
            minimum_bytes=minimum,
        )
    most = opened.plan.max_prompt_tokens
    if num_tokens > most:
        raise RequestError(
            f"the prompt has {num_tokens} tokens; one with images is computed in one sweep, which has at most {most}. "
            f"Give fewer or smaller images, or open the engine with max_tokens_per_sweep={num_tokens}"
        )


def encode_with_images(
    opened: PreparesImages,
    messages: Sequence[Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    add_generation_prompt: bool = True,
) -> EncodedPrompt:
    """Prepares messages with images as `AutoProcessor.apply_chat_template` does; for a worker thread.

    The prompt's text is rendered first, with a placeholder for each image. The processor then puts as many tokens there
    as the image becomes.

    Raises:
        RequestError: The model takes no images, a message or an image cannot be used, or the text has other
            placeholders than the images'.
        CheckpointError: The checkpoint has no processor, or a package that it needs is missing.
    """
    name = type(opened.skeleton.model).__name__
    if not takes_images(opened.skeleton):
        raise RequestError(f"{name} takes no images")
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"chat messages need a tokenizer: {opened.tokenizer_error}")
    images = load_images(messages)
    with opened.processor.taken() as processor:
        template = processor.chat_template or tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            raise RequestError("chat messages need a chat template, and the checkpoint has none")
        text = render(
            tokenizer,
            messages,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            chat_template=template,
        )
        _check_placeholders(processor, image_token_id(opened.skeleton), text, len(images))
        with one_request("the preparation of the images by the checkpoint's processor"):
            prepared = _prepared(processor, text, images)
    token_ids = _token_ids_of(prepared.pop("input_ids", None))
    inputs = _model_inputs(opened.skeleton, prepared)
    return EncodedPrompt(
        token_ids=token_ids,
        model_inputs=inputs,
        inputs_digest=_digest(inputs),
        image_end=_image_end(token_ids, image_token_id(opened.skeleton)),
    )


def _check_placeholders(processor: Any, token_id: int | None, text: str, num_images: int) -> None:
    """There must be one placeholder for each image: a user's text may have some, and a template may leave some out."""
    tokens = {getattr(processor, "image_token", None)}
    if token_id is not None:  # where it is not the placeholder itself, as in Gemma 3, the processor puts it there
        tokens.add(processor.tokenizer.convert_ids_to_tokens(token_id))
    placeholders = [token for token in tokens if isinstance(token, str) and token]
    num_placeholders = sum(text.count(token) for token in placeholders)
    if placeholders and num_placeholders != num_images:
        names = " or ".join(sorted(placeholders))
        raise RequestError(
            f"the prompt has {num_placeholders} image placeholders ({names}) for {num_images} images; each image is a "
            "part of a message, the chat template must show it, and no text may have a placeholder"
        )


def _prepared(processor: Any, text: str, images: list[Image]) -> dict[str, Any]:
    options: dict[str, Any] = {"return_tensors": "pt"}
    begin = processor.tokenizer.bos_token
    if begin is not None and text.startswith(begin):  # as `apply_chat_template` of transformers' processors
        options["add_special_tokens"] = False
    return dict(processor(text=[text], images=[images], **options))


def _token_ids_of(input_ids: Any) -> list[int]:
    shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else ()
    if len(shape) != 2 or shape[0] != 1 or not shape[1]:
        raise RequestError("the checkpoint's processor gives no token ids for these messages")
    token_ids: list[int] = input_ids[0].tolist()
    return token_ids


def _model_inputs(skeleton: Skeleton, prepared: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the model's forward takes, floats in the model's dtype."""
    names = set(input_names(skeleton.model)) - {"attention_mask", "input_ids"}
    inputs: dict[str, torch.Tensor] = {}
    for name, value in prepared.items():
        if name not in names:
            continue
        if not isinstance(value, torch.Tensor):
            raise RequestError(f"the checkpoint's processor gives {name} as {type(value).__name__}, not as a tensor")
        inputs[name] = value.to(skeleton.dtype) if value.is_floating_point() else value
    num_bytes = sum(value.nbytes for value in inputs.values())
    if num_bytes > MAX_INPUT_BYTES:
        most = format_bytes(MAX_INPUT_BYTES)
        raise RequestError(
            f"the images become {format_bytes(num_bytes)} of the model's inputs; at most {most} are taken. Give fewer "
            "or smaller images"
        )
    return inputs


def _digest(inputs: Mapping[str, torch.Tensor]) -> str:
    """Identifies the images. It does not depend on the text around them."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        if name not in _PER_TOKEN:
            value = inputs[name].contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.view(torch.uint8).numpy().data if value.dim() else value.numpy().tobytes())
    return digest.hexdigest()


def _image_end(token_ids: Sequence[int], token_id: int | None) -> int:
    if token_id is None:
        return len(token_ids)
    return max((idx + 1 for idx, each in enumerate(token_ids) if each == token_id), default=len(token_ids))
