"""Every use of transformers' code for chats that is private or differs between versions: templates and answers.

All functions were tested on the versions in `TESTED_VERSIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from transformers import PreTrainedTokenizerBase

from hermes_async.errors import RequestError
from hermes_async.modeling.bounded_patterns import BoundedPattern, MatchingTime
from hermes_async.modeling.transformers_api import needs

# --- chat templates ---


def has_own_chat_format(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer writes chats without a template, as that of Mistral's own package does."""
    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def template_environment() -> Any:
    """The environment of jinja2 in which transformers renders chat templates, with its filters and functions."""
    with needs("environment of chat templates"):
        compiled = import_module("transformers.utils.chat_template_utils")._compile_jinja_template
    return compiled("").environment


def template_variables(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """What a chat template gets from `apply_chat_template`: plain lists, dicts and texts."""
    with needs("preparation of chat messages"):
        library = import_module("transformers.utils.chat_template_utils")

        def prepared(name: str, value: Any) -> Any:
            function = getattr(library, name, None)  # some versions do less
            return value if function is None else function(value)

        chat = prepared("_plain_template_data", prepared("_normalize_chat_messages", list(messages)))
        return {
            **prepared("_plain_template_data", {**tokenizer.special_tokens_map, **others}),
            "messages": prepared("_alias_reasoning_fields", chat),
            "tools": prepared("_plain_template_data", tools),
            "documents": prepared("_plain_template_data", others.get("documents")),
            "add_generation_prompt": add_generation_prompt,
        }


# --- the parser of answers ---


@cache
def region_parser_class() -> Callable[..., Any] | None:
    """A subclass of transformers' `ResponseParser`; None where the installed version has none that can be extended."""
    try:
        base: Any = import_module("transformers.utils.chat_parsing").ResponseParser
        load = import_module("transformers.utils.chat_parsing.response_templates").load_response_template
        replaced = base._process, base._open_explicit, base._close_current, base._reset_to_implicit
    except (ImportError, AttributeError):
        return None
    process, open_explicit, close_current, reset_to_implicit = replaced

    class RegionParser(base):  # type: ignore[misc]
        """Gives the text of a region with its event, and goes on after a region that does not parse.

        The template's expressions have a limit of time, beyond which all calls raise `RequestError`.

        `feed` and `finish` return transformers' events. "region_close" also has the region's whole text, delimiters
        included, as "text". In its place comes "region_failed" if the region's text does not parse.
        """

        def __init__(self, template: Any, prefix: str, tools: Sequence[Mapping[str, Any]] | None) -> None:
            self._region_start = self._prefix_end = 0
            self._time = MatchingTime()
            base.__init__(self, _bounded(load(template), self._time), prefix=prefix, tools=tools)
            self._prefix_end = len(self._buffer)

        def finish(self) -> list[dict[str, Any]]:
            """The last events. Unlike `finalize`, this does not ask for fields that the template calls necessary."""
            events: list[dict[str, Any]] = []
            process(self, events, eos=True)
            return events

        def _open_explicit(self, events: list[dict[str, Any]], field: Any, match: Any) -> None:
            self._region_start = match.start()
            open_explicit(self, events, field, match)

        def _close_current(self, events: list[dict[str, Any]]) -> None:
            name, num_events = self._current, len(events)
            if name == self._implicit_name:
                text = self._body
            else:
                text = self._buffer[max(self._region_start, self._prefix_end) : self._pos]
            try:
                if name is not None:
                    field = self._spec.fields[name]
                    self._time.try_tags(self._body, field.content, field.content_args)
                close_current(self, events)
            except RequestError:
                raise
            except Exception:  # a parser or a transform of the template refuses what the model wrote
                reset_to_implicit(self)
                events.append({"type": "region_failed", "field": name})
            if len(events) > num_events:
                events[-1]["text"] = text

    return RegionParser


def _bounded(template: Any, matching_time: MatchingTime) -> Any:
    """A loaded template, whose expressions now have a limit of time."""
    template.start_anchor_re = BoundedPattern(template.start_anchor_re, matching_time)
    for field in template.fields.values():
        for name in ("open_re", "close_re"):
            if getattr(field, name) is not None:
                setattr(field, name, BoundedPattern(getattr(field, name), matching_time))
    return template


def response_parser(template: Any, prefix: str, tools: Sequence[Mapping[str, Any]] | None) -> Any:
    """A parser of one answer; None where the installed version of transformers has none.

    Args:
        template: The tokenizer's `response_template`.
        prefix: The text of the prompt, special tokens included. Its end may be the beginning of the answer.
        tools: Their schemas say of which types the arguments of calls are.

    Returns:
        An object with `initial_events`, `feed(text)` and `finish()`, which return events (dicts).

    Raises:
        ValueError: The template is not valid.
        RequestError: Its expressions took too long with the prompt.
    """
    make = region_parser_class()
    return None if make is None else make(template, prefix, tools)
