"""Divides an answer's text into content, reasoning and calls of tools, as the checkpoint's response template says."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from hermes_async.config import check_text
from hermes_async.engine.chat_tools import REASONING_FIELDS, checked_tools
from hermes_async.engine.prompt import Prompt, prompt_text
from hermes_async.errors import CheckpointError, RequestError
from hermes_async.results import MessageDelta, ToolCall

if TYPE_CHECKING:  # imports torch
    from hermes_async.engine.opening import OpenedModel

Target = Literal["content", "reasoning"]

_CONTENT, _TOOL_CALLS, _ROLE = "content", "tool_calls", "role"
_TEXT_PARSERS = ("text", "int", "float", "bool")


def prepare_response_stream(
    opened: OpenedModel,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> ResponseStream | None:
    """`Engine.response_stream` documents the arguments. Synchronous: prompts can be long.

    Raises:
        RequestError: The prompt or a tool cannot be used, or the template's expressions take too long with the prompt.
        CheckpointError: The response template is not valid.
    """
    from hermes_async.modeling.chat_api import response_parser

    template = None if opened.tokenizer is None else opened.tokenizer.response_template
    if opened.tokenizer is None or template is None:
        return None
    prefix = prompt_text(opened, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
    checked = checked_tools(tools)
    try:
        parser = response_parser(template, prefix, checked)
    except RequestError:  # which is a `ValueError`
        raise
    except ValueError as error:
        raise CheckpointError(f"the tokenizer's response_template is not valid: {error}") from error
    return None if parser is None else ResponseStream(parser, template, opened.tokenizer.special_texts)


class ResponseStream:
    """Takes the text of one answer as it comes, and returns the parts of the answer's message. Event-loop side only.

        responses = await engine.response_stream(messages, tools)
        params = SamplingParams(skip_special_tokens=False)
        async for chunk in engine.generate(messages, params, tools=tools):
            for delta in responses.push(chunk.text):
                ...
        last = responses.finish()

    Content and reasoning come as soon as they are certain. White space at both ends of a part is left out where the
    template says so, so it is held back. A call of a tool comes when its text is complete. A call that cannot be parsed
    comes back as content, as the model wrote it. Special tokens are not part of content and reasoning. They are found
    by their text, so a text that looks like one is left out, too.

    All parts together are what transformers' `parse_response` gives for the whole text, with two exceptions: where that
    keeps only the last of several parts of a field, these are lines of the field; and an answer that it drops as a
    whole comes back as content.

    `Engine.response_stream` makes it. `copy.deepcopy` gives an independent one, for another answer to the same prompt.
    """

    def __init__(self, parser: Any, template: Any, special_texts: tuple[str, ...]) -> None:
        self._parser = parser
        self._special = _special(special_texts)
        # All mutable state, beside the parser's: the text fields, how many calls came, the answer's text as long as it
        # is in no region, and whether the answer has ended.
        self._fields = _text_fields(template)
        self._num_calls = 0
        self._in_no_region: str | None = ""
        self._has_ended = False
        for event in parser.initial_events:
            self._take(event, [])  # the prompt's end; its text is no part of the answer
        self._num_calls = 0
        for text_field in self._fields.values():
            text_field.has_text = False

    def push(self, text: str) -> list[MessageDelta]:
        """Takes more text of the answer; returns what is certain now.

        Raises:
            RequestError: The answer has ended, or the template's expressions have taken too long with it.
        """
        if self._has_ended:
            raise RequestError("the answer has ended; each answer has a response stream of its own")
        if self._in_no_region is not None:
            self._in_no_region += text
        return self._deltas(self._parser.feed(text))

    def finish(self) -> list[MessageDelta]:
        """Ends the answer; returns what was held back.

        Raises:
            RequestError: As `push`.
        """
        deltas = self.push("")
        deltas += self._deltas(self._parser.finish())
        self._has_ended = True
        if self._in_no_region:
            self._give_back(self._in_no_region, deltas)
        return deltas

    def _deltas(self, events: Sequence[Mapping[str, Any]]) -> list[MessageDelta]:
        deltas: list[MessageDelta] = []
        for event in events:
            self._in_no_region = None
            self._take(event, deltas)
        return deltas

    def _take(self, event: Mapping[str, Any], deltas: list[MessageDelta]) -> None:
        """Adds what an event of the parser means to `deltas`."""
        kind, name = event["type"], event["field"]
        text_field = self._fields.get(name)
        if kind == "region_failed":
            self._give_back(event["text"], deltas)
        elif name == _ROLE:
            return
        elif text_field is None:
            if kind == "region_close":
                calls = _calls(event["value"], self._num_calls) if name == _TOOL_CALLS else None
                if calls is None:
                    self._give_back(event["text"], deltas)
                else:
                    self._num_calls += len(calls)
                    deltas += [MessageDelta(tool_call=call) for call in calls]
        elif kind == "region_open":
            _append(deltas, text_field.target, text_field.begin())
        elif kind == "region_chunk":
            _append(deltas, text_field.target, text_field.push(event["text"], self._special))
        else:
            _append(deltas, text_field.target, text_field.end())

    def _give_back(self, text: str, deltas: list[MessageDelta]) -> None:
        """Text that does not parse is a part of the content."""
        content = self._fields[_CONTENT]
        for piece in (content.begin(), content.push(text, self._special), content.end()):
            _append(deltas, "content", piece)


def _append(deltas: list[MessageDelta], target: Target, text: str) -> None:
    if not text:
        return
    last = deltas[-1] if deltas else MessageDelta()
    if target == "content":
        joins = bool(last.content)
        new = MessageDelta(content=last.content * joins + text)
    else:
        joins = bool(last.reasoning)
        new = MessageDelta(reasoning=last.reasoning * joins + text)
    deltas[-1 * joins or len(deltas) :] = [new]


# --- texts ---


@dataclass(frozen=True, slots=True)
class _Special:
    """The texts of special tokens.

    Attributes:
        pattern: Finds each of them.
        ordered: All texts, in the order of their characters: those that begin alike are next to each other.
        first_chars: Of those that have more.
        most_chars: Of the longest, without its last one.
    """

    pattern: re.Pattern[str]
    ordered: tuple[str, ...]
    first_chars: frozenset[str]
    most_chars: int

    def num_begun(self, text: str) -> int:
        """The length of the longest end of `text` that begins a special token."""
        tail = text[-self.most_chars :] if self.most_chars else ""
        if not any(char in tail for char in self.first_chars):
            return 0
        return next((length for length in range(len(tail), 0, -1) if self._begins(tail[-length:])), 0)

    def _begins(self, text: str) -> bool:
        """Whether a special token begins with `text`, and goes on."""
        after = bisect_right(self.ordered, text)
        return after < len(self.ordered) and self.ordered[after].startswith(text)


@lru_cache(maxsize=8)
def _special(texts: tuple[str, ...]) -> _Special:
    pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")  # the longest first; (?!) never matches
    first_chars = frozenset(text[0] for text in texts if len(text) > 1)
    return _Special(pattern, tuple(sorted(texts)), first_chars, max(map(len, texts), default=1) - 1)


@dataclass(slots=True)
class _TextField:
    """A field of the message that is a text, which may come in several parts (regions of the parser).

    Attributes:
        strips: White space at both ends of a part is left out.
        join: What the template puts between two parts; None if it keeps the last one.
        num_parts: Parts that have begun.
        has_text: The field has text so far.
        part_has_text: The part that is open has text other than white space.
        held: The end of the open part, which may begin a special token.
        white: White space that is left out if nothing follows.
    """

    target: Target
    strips: bool = True
    join: str | None = None
    num_parts: int = 0
    has_text: bool = False
    part_has_text: bool = field(default=False, init=False)
    held: str = field(default="", init=False)
    white: str = field(default="", init=False)

    def begin(self) -> str:
        """Begins a part; returns what comes before it."""
        self.num_parts += 1
        self.part_has_text = False
        self.held = self.white = ""
        return self.join if self.join is not None and self.num_parts > 1 else ""

    def push(self, text: str, special: _Special) -> str:
        """Takes more of the part; returns the text that is certain."""
        text = special.pattern.sub("", self.held + text)
        end = len(text) - special.num_begun(text)
        self.held = text[end:]
        return self._advance(text[:end])

    def end(self) -> str:
        """Ends the part; returns what was held back."""
        return self._advance(self.held)

    def _advance(self, text: str) -> str:
        if self.strips:
            text = self.white + text
            if not self.part_has_text:
                text = text.lstrip()
            stripped = text.rstrip()
            self.white = text[len(stripped) :]
            text = stripped
        if not text:
            return ""
        if not self.part_has_text and self.has_text and self.join is None:
            text = "\n" + text
        self.has_text = self.part_has_text = True
        return text


def _text_fields(template: Any) -> dict[str, _TextField]:
    """The text fields of a template by name, and the content if it has none."""
    fields = {_CONTENT: _TextField("content")}
    for name, spec in template["fields"].items():
        if spec.get("content", "text") in _TEXT_PARSERS and name not in (_TOOL_CALLS, _ROLE):
            target: Target = "reasoning" if name in REASONING_FIELDS else "content"
            strips = bool(spec.get("content_args", {}).get("strip", True))
            fields[name] = _TextField(target, strips, spec.get("join"))
    return fields


# --- calls of tools ---


def _calls(value: Any, num_before: int) -> list[ToolCall] | None:
    """The calls that a region's value stands for; None if it is something else."""
    items = value if isinstance(value, list) else [value]
    calls = [_call(item, num_before + idx) for idx, item in enumerate(items)]
    known = [call for call in calls if call is not None]
    return known if known and len(known) == len(calls) else None


def _call(item: Any, index: int) -> ToolCall | None:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping):
        return None
    name = function.get("name")
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name:
        return None
    try:
        check_text("the name", name)
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        arguments = {} if arguments is None else arguments
        return ToolCall(index, name, _as_json(arguments)) if isinstance(arguments, dict) else None
    except (ValueError, TypeError, RecursionError):  # RequestError is a ValueError
        return None


def _as_json(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(arguments, allow_nan=False)
    return text
