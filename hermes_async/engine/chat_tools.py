"""Checks what a request gives to the chat template beside messages: tools, calls of tools, and other variables.

The template is always the checkpoint's. transformers runs it in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hermes_async.config import check_text
from hermes_async.errors import RequestError

MAX_DEPTH = 64
"""The most lists and mappings within each other. Templates and parsers visit them by recursion."""

RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of transformers' `apply_chat_template` that the engine sets, or that would change what it returns."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that templates have for the same part of an assistant's message; the first is the one that users give."""


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Checks tools, and returns copies; None if there are none.

    Args:
        tools: As in OpenAI's API: `{"type": "function", "function": {"name": "...", "parameters": {...}}}`.

    Raises:
        RequestError: A tool is not valid; the error names its index.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes, bytearray)):
        raise RequestError(f"tools come in a list, not in a {type(tools).__name__}")
    checked: list[dict[str, Any]] = []
    for idx, tool in enumerate(tools):
        where = f"tool {idx}"
        if not isinstance(tool, Mapping):
            raise RequestError(f"{where} is of type {type(tool).__name__}; a tool has a 'type' and a 'function'")
        if tool.get("type") != "function":
            raise RequestError(f"{where} has {_found(tool, 'type')}; the only type is 'function'")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise RequestError(f"{where} has {_found(tool, 'function')}; a function has a 'name'")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where} has a function with {_found(function, 'name')}; a name is a text")
        description = function.get("description")
        if description is not None and not isinstance(description, str):
            raise RequestError(f"{where} has {_found(function, 'description')}; a description is a text")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"{where} has {_found(function, 'parameters')}; parameters are a JSON schema")
        checked.append(_checked_json(where, tool))
    return checked or None


def checked_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Checks `chat_template_kwargs`, and returns a copy.

    Raises:
        RequestError: A name belongs to the engine, or a value is not JSON.
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise RequestError(f"chat_template_kwargs must be a mapping, not {type(variables).__name__}")
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier():
            raise RequestError(f"chat_template_kwargs has {name!r}, which cannot be the name of a variable")
        if name == "chat_template":
            raise RequestError("chat_template_kwargs must not have 'chat_template': the template is the checkpoint's")
        if name in RESERVED_VARIABLES:
            raise RequestError(f"chat_template_kwargs must not have {name!r}, which the engine sets")
    checked: dict[str, Any] = _checked_json("chat_template_kwargs", variables)
    return checked


def check_tool_calls(where: str, message: Mapping[Any, Any]) -> None:
    """Checks the shape of a message's `tool_calls`, and that `reasoning_content` is a text.

    Raises:
        RequestError: They are not valid.
    """
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RequestError(f"{where} has {_found(message, 'reasoning_content')}; reasoning_content is a text")
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, (list, tuple)):
        raise RequestError(f"{where} has {_found(message, 'tool_calls')}; tool_calls are a list")
    for idx, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise RequestError(f"{where} has a tool call {idx} of type {type(call).__name__}; a call has a 'function'")
        if "function" in call and not isinstance(call["function"], Mapping):
            raise RequestError(f"{where} has a tool call {idx} with {_found(call, 'function')}")


def with_parsed_arguments(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """Parses the arguments of a message's tool calls, because chat templates take them as mappings.

    Arguments that are missing or empty are no arguments, as in vLLM.

    Raises:
        RequestError: Arguments are a text that is not a JSON object.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for idx, call in enumerate(message["tool_calls"]):
        function = call.get("function")
        if isinstance(function, Mapping):
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = _parsed_arguments(f"{where} has a tool call {idx} whose arguments", arguments)
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def with_named_reasoning(message: dict[str, Any], response_template: Any) -> dict[str, Any]:
    """Gives a message's reasoning also the name that the checkpoint's response template has for it."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    fields = response_template.get("fields") if isinstance(response_template, Mapping) else None
    if not reasoning or not isinstance(fields, Mapping):
        return message
    return {**{name: reasoning for name in REASONING_FIELDS if name in fields}, **message}


def check_nested(where: str, value: Any, depth: int = 0) -> None:
    """Checks the texts and the depth of a value of any type.

    Raises:
        RequestError: A text has a lone surrogate, or lists and mappings are nested too deeply.
    """
    if isinstance(value, str):
        check_text(where, value)
    elif isinstance(value, (Mapping, list, tuple)):
        if depth >= MAX_DEPTH:
            raise RequestError(f"{where} has lists and mappings that are nested more than {MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            for key in value:
                check_nested(where, key, depth + 1)
            value = value.values()
        for item in value:
            check_nested(where, item, depth + 1)


def _checked_json(where: str, value: Any, depth: int = 0) -> Any:
    """A copy of a value that is JSON: mappings become dicts, and sequences become lists."""
    if isinstance(value, str):
        check_text(where, value)
        return str(value)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if not isinstance(value, (Mapping, list, tuple)):
        raise RequestError(f"{where} has a value of type {type(value).__name__}, which is not JSON: {value!r:.100}")
    if depth >= MAX_DEPTH:
        raise RequestError(f"{where} has lists and mappings that are nested more than {MAX_DEPTH} deep")
    if not isinstance(value, Mapping):
        return [_checked_json(where, item, depth + 1) for item in value]
    for key in value:
        if not isinstance(key, str):
            raise RequestError(f"{where} has a key of type {type(key).__name__}; keys are texts")
        check_text(where, key)
    return {str(key): _checked_json(where, item, depth + 1) for key, item in value.items()}


def _parsed_arguments(what: str, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} are not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RequestError(f"{what} are JSON, but no object")
    check_nested(what, parsed)
    return parsed


def _found(mapping: Mapping[Any, Any], key: str) -> str:
    """What a mapping has under a key, for an error."""
    if key not in mapping:
        return f"no {key}"
    value = mapping[key]
    return f"the {key} {value!r}" if isinstance(value, str) else f"a {key} of type {type(value).__name__}"
