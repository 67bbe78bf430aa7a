"""Checks chat messages, and renders them with the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hermes_async.config import check_text
from hermes_async.errors import RequestError
from hermes_async.foreign_errors import one_request

if TYPE_CHECKING:
    from hermes_async.serving.tokenizer import SharedTokenizer

# Results of tools may have any type: the template decides what they mean.
_TOOL_ROLES = ("tool", "function", "ipython")


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
        _check_content(f"{where}, of role {role!r},", message, role)
        _check_texts(where, message)
    return [dict(message) for message in messages]


def render(tokenizer: SharedTokenizer, messages: Sequence[Any]) -> str:
    """Renders messages as a text, including the beginning of an answer.

    Raises:
        RequestError: A message is invalid, or the template refuses the messages or gives no text.
    """
    conversation = checked_messages(messages)
    if any(_is_parts(message.get("content")) for message in conversation) and not _takes_parts(tokenizer):
        conversation = [_with_parts_joined(message) for message in conversation]
    with one_request("the checkpoint's chat template"):
        rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    if not isinstance(rendered, str) or not rendered:
        raise RequestError("the checkpoint's chat template gives no text for these messages")
    return rendered


def _check_content(where: str, message: Mapping[Any, Any], role: str) -> None:
    content = message.get("content")
    if content is None:
        if role != "assistant" or not (message.get("tool_calls") or message.get("function_call")):
            raise RequestError(f"{where} has no content; only one of role 'assistant' with 'tool_calls' may have none")
    elif isinstance(content, (list, tuple)) and role not in _TOOL_ROLES:
        if not content:
            raise RequestError(f"{where} has an empty list as content")
        for idx, part in enumerate(content):
            if not _is_text_part(part):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RequestError(
                    f"{where} has a part {idx} of type {kind!r}; every part must be like "
                    "{'type': 'text', 'text': '...'}"
                )
    elif not isinstance(content, str) and role not in _TOOL_ROLES:
        raise RequestError(f"{where} has content of type {type(content).__name__}; content is a text or text parts")


def _is_text_part(part: Any) -> bool:
    """Whether this is a text part as in OpenAI's API."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_parts(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and len(content) > 0 and all(_is_text_part(part) for part in content)


def _takes_parts(tokenizer: SharedTokenizer) -> bool:
    """Whether the template renders a text part as it renders the text."""
    contents: tuple[Any, Any] = ("a", [{"type": "text", "text": "a"}])
    try:
        of_text, of_part = (
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in contents
        )
    except Exception:  # a template may raise anything for content that it does not support
        return False
    return bool(of_text == of_part)


def _with_parts_joined(message: dict[str, Any]) -> dict[str, Any]:
    """Joins text parts with line breaks, as vLLM does."""
    content: Any = message.get("content")
    if not _is_parts(content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _check_texts(where: str, value: Any) -> None:
    if isinstance(value, str):
        check_text(where, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_texts(where, key)
            _check_texts(where, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_texts(where, item)
