"""Turns chat messages with images into token ids and the model's other inputs, with the checkpoint's own processor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hermes_async.config import format_bytes
from hermes_async.engine.chat_messages import render
from hermes_async.engine.images import load_images
from hermes_async.errors import RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.modeling.inputs import input_names
from hermes_async.serving.request import EncodedPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from hermes_async.engine.opening import OpenedModel

MAX_INPUT_BYTES = 1024**3
"""The most bytes of a request's tensors, which are in memory until its prompt is computed."""

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


def takes_images(opened: OpenedModel) -> bool:
    """Whether the model generates from texts and images."""
    return opened.skeleton.generates and "pixel_values" in input_names(opened.skeleton.model)


def image_token_id(opened: OpenedModel) -> int | None:
    """The token that stands for a piece of an image; None if the model takes no images."""
    token_id = getattr(opened.skeleton.model.config, "image_token_id", None)
    return token_id if isinstance(token_id, int) and takes_images(opened) else None


def check_images(opened: OpenedModel, prompt: EncodedPrompt) -> None:
    """Checks whether the engine can compute a prompt with images, and that one without has no placeholder of one.

    Raises:
        RequestError: It cannot, or there is one.
    """
    if not prompt.model_inputs:
        if image_token_id(opened) in prompt.token_ids:
            raise RequestError(
                f"the prompt has the token {image_token_id(opened)}, a placeholder for an image, and no image; give "
                "images as parts of chat messages"
            )
        return
    if opened.probe.turns is None:
        raise RequestError("images need an engine that runs in turns: EngineConfig(batching='turns')")
    num_tokens, most = len(prompt.token_ids), opened.plan.max_tokens_per_sweep
    if num_tokens > most:
        raise RequestError(
            f"the prompt has {num_tokens} tokens; one with images is computed in one sweep, which has at most {most}. "
            "Give fewer or smaller images, or the engine more max_tokens_per_sweep"
        )


def encode_with_images(
    opened: OpenedModel,
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
    if not takes_images(opened):
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
        _check_placeholders(processor, image_token_id(opened), text, len(images))
        with one_request("the preparation of the images by the checkpoint's processor"):
            prepared = _prepared(processor, text, images)
    token_ids = _token_ids_of(prepared.pop("input_ids", None))
    inputs = _model_inputs(opened, prepared)
    return EncodedPrompt(
        token_ids=token_ids,
        model_inputs=inputs,
        inputs_digest=_digest(inputs),
        image_end=_image_end(token_ids, image_token_id(opened)),
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


def _model_inputs(opened: OpenedModel, prepared: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the model's forward takes, floats in the model's dtype."""
    names = set(input_names(opened.skeleton.model)) - {"attention_mask", "input_ids"}
    inputs: dict[str, torch.Tensor] = {}
    for name, value in prepared.items():
        if name not in names:
            continue
        if not isinstance(value, torch.Tensor):
            raise RequestError(f"the checkpoint's processor gives {name} as {type(value).__name__}, not as a tensor")
        inputs[name] = value.to(opened.skeleton.dtype) if value.is_floating_point() else value
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
