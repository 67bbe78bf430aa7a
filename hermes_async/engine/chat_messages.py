"""Checks chat messages, and renders them with the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hermes_async.engine.chat_tools import (
    check_nested,
    check_tool_calls,
    checked_tools,
    checked_variables,
    with_named_reasoning,
    with_parsed_arguments,
)
from hermes_async.engine.images import image_parts, image_source, is_image_part
from hermes_async.errors import RequestError
from hermes_async.foreign_errors import one_request

if TYPE_CHECKING:
    from hermes_async.serving.tokenizer import SharedTokenizer

# Results of tools may have any type: the template decides what they mean.
_TOOL_ROLES = ("tool", "function", "ipython")

_PROBE = "a text to try"


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Checks chat messages and returns copies.

    Raises:
        RequestError: A message is no mapping, or lacks a role or a usable content; the error names its index.
    """
    if not isinstance(messages, Sequence):
        raise RequestError(f"chat messages come in a list, not in a {type(messages).__name__}")
    for idx, message in enumerate(messages):
        where = f"message {idx}"
        if not isinstance(message, Mapping):
            raise RequestError(
                f"{where} is of type {type(message).__name__}; a chat message has a 'role' and a 'content'"
            )
        role = message.get("role")
        if not isinstance(role, str):
            raise RequestError(
                f"{where} has {f'the role {role!r}' if 'role' in message else 'no role'}; a role is a text"
            )
        check_nested(where, message)
        check_tool_calls(f"{where}, of role {role!r},", message)
        _check_content(f"{where}, of role {role!r},", message, role)
    for where, part in image_parts(messages):
        image_source(where, part)  # raises if it is no image
    return [dict(message) for message in messages]


def render(
    tokenizer: SharedTokenizer,
    messages: Sequence[Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
) -> str:
    """Renders messages as a text, with a placeholder for each image.

    Args:
        tools: Functions that the model may call, as in OpenAI's API.
        chat_template_kwargs: Other variables of the template, such as `enable_thinking`.
        add_generation_prompt: Include the beginning of an answer.
        chat_template: In place of the tokenizer's.

    Raises:
        RequestError: A message, a tool or a variable is not valid, or the template refuses them or gives no text.
    """
    conversation = [
        with_parsed_arguments(f"message {idx}", message) for idx, message in enumerate(checked_messages(messages))
    ]
    response_template = getattr(tokenizer, "response_template", None)
    conversation = [with_named_reasoning(message, response_template) for message in conversation]
    variables = {**checked_variables(chat_template_kwargs), "tools": checked_tools(tools)}
    if chat_template is not None:
        variables["chat_template"] = chat_template
    if next(image_parts(conversation), None) is not None or _takes_only_parts(tokenizer, variables):
        conversation = [_for_images(message) for message in conversation]
    elif any(_is_parts(message.get("content")) for message in conversation) and not _takes_parts(tokenizer, variables):
        conversation = [_with_parts_joined(message) for message in conversation]
    with one_request("the checkpoint's chat template"):
        rendered = tokenizer.chat_text(conversation, add_generation_prompt=add_generation_prompt, **variables)
    if not isinstance(rendered, str) or not rendered:
        raise RequestError("the checkpoint's chat template gives no text for these messages")
    return rendered


def _check_content(where: str, message: Mapping[Any, Any], role: str) -> None:
    content = message.get("content")
    if content is None:
        instead = ("tool_calls", "function_call", "reasoning_content")
        if role != "assistant" or not any(message.get(name) for name in instead):
            raise RequestError(
                f"{where} has no content; only one of role 'assistant' with 'tool_calls' or 'reasoning_content' may "
                "have none"
            )
    elif isinstance(content, (list, tuple)) and role not in _TOOL_ROLES:
        if not content:
            raise RequestError(f"{where} has an empty list as content")
        for idx, part in enumerate(content):
            if not _is_text_part(part) and not is_image_part(part):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RequestError(
                    f"{where} has a part {idx} of type {kind!r}; every part must be like "
                    "{'type': 'text', 'text': '...'} or {'type': 'image', 'image': ...}"
                )
    elif not isinstance(content, str) and role not in _TOOL_ROLES:
        raise RequestError(f"{where} has content of type {type(content).__name__}; content is a text or text parts")


def _is_text_part(part: Any) -> bool:
    """Whether this is a text part as in OpenAI's API."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_parts(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and len(content) > 0 and all(_is_text_part(part) for part in content)


def _takes_parts(tokenizer: SharedTokenizer, variables: Mapping[str, Any]) -> bool:
    """Whether the template renders a text part as it renders the text."""
    contents: tuple[Any, Any] = ("a", [{"type": "text", "text": "a"}])
    try:
        of_text, of_part = (
            tokenizer.chat_text([{"role": "user", "content": content}], **variables) for content in contents
        )
    except RequestError:
        raise
    except Exception:  # a template may raise anything for content that it does not support
        return False
    return bool(of_text == of_part)


def _takes_only_parts(tokenizer: SharedTokenizer, variables: Mapping[str, Any]) -> bool:
    """Whether the template renders text parts, but leaves out a text that is no part, as that of LLaVA does."""
    if "image" not in str(variables.get("chat_template") or tokenizer.chat_template):
        return False
    rendered: list[str] = []
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        try:
            messages = [{"role": "user", "content": content}]
            rendered.append(tokenizer.chat_text(messages, **variables))
        except RequestError:
            raise
        except Exception:  # a template may raise anything for content that it does not support
            rendered.append("")
    of_text, of_part = rendered
    return _PROBE in of_part and _PROBE not in of_text


def _with_parts_joined(message: dict[str, Any]) -> dict[str, Any]:
    """Joins text parts with line breaks, as vLLM does."""
    content: Any = message.get("content")
    if not _is_parts(content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _for_images(message: dict[str, Any]) -> dict[str, Any]:
    """The message as templates for images take it: parts only, and each image as a part without the image itself."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if not isinstance(content, (list, tuple)):
        return message
    return {**message, "content": [{"type": "image"} if is_image_part(part) else part for part in content]}
