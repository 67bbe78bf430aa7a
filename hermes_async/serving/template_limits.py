"""How much a chat template may do: steps, texts that it makes, and seconds of computation."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from string import Formatter
from types import FunctionType
from typing import Any

from hermes_async.errors import RequestError

MAX_TEMPLATE_CHARS = 2**19
"""The longest template that is compiled. Those of models have up to 0.1 million characters."""
MAX_STEPS = 1_000_000
"""Passes of loops, and calls of macros, functions and filters."""
MAX_CHARS = 2**25
"""Characters of all texts that a template makes, its output included. An item of a list counts as eight."""
CHARS_PER_INPUT_CHAR = 32
"""So many more characters may a template make for each character of the messages."""
MAX_SECONDS = 3.0
"""CPU time of the thread."""

_LARGEST_ARGUMENT = 10_000
"""Of functions that pad a text or make an indentation."""
_MOST_BITS = 2**14
"""Of a whole number."""
_SLOW_CHARS = 100_000
"""The longest text for filters whose time grows faster than the text."""
_CHARS_PER_ITEM = 8
_MOST_DEPTH = 200

_PADDING = (
    *("ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes"),
    *("indent", "batch", "slice", "wordwrap", "tojson"),
)
_SLOW = ("striptags", "urlize", "wordwrap", "pprint", "encode", "decode")
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*?(?:\d{4}|\*)")
_WIDE_NAMED_PERCENT = re.compile(r"\d{4}|\*")  # a name may have any characters
_WIDE_BRACES = re.compile(r"\d{4}|\{")
"""In a format: a width of more than three digits, or one that is an argument."""
_FIELD_CHARS = 1000
"""A number in a field takes at most so many."""


class Budget:
    """What one rendering may still do. For one thread.

    Args:
        data: What the template gets.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        # All mutable state. Containers are kept, because their identities are keys.
        self._steps = MAX_STEPS
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._chars = MAX_CHARS
        self._ends_at = time.thread_time() + MAX_SECONDS
        self._chars += CHARS_PER_INPUT_CHAR * self.size_of(data)

    def step(self) -> None:
        """Counts one step.

        Raises:
            RequestError: It was one too many, or the time is over.
        """
        self._steps -= 1
        if self._steps < 0:
            raise _too_much(f"takes more than {MAX_STEPS} steps")
        if time.thread_time() > self._ends_at:
            raise _too_much(f"takes more than {MAX_SECONDS:g} seconds")

    def text(self, num_chars: int) -> None:
        """Counts characters that are about to be made.

        Raises:
            RequestError: They are too many.
        """
        self._chars -= num_chars
        if self._chars < 0:
            raise _too_much(f"makes texts of more than {MAX_CHARS} characters for messages of this length")

    def made(self, value: Any) -> Any:
        """Counts a value that an expression has made, and returns it. A list in a list counts with all that it has."""
        if isinstance(value, (str, bytes)):
            self.text(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.text(self.size_of(value))
        return value

    def size_of(self, value: Any, depth: int = 0) -> int:
        """The characters that a value has as a text, roughly."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return _CHARS_PER_ITEM
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        if depth > _MOST_DEPTH:
            raise _too_much(f"nests lists more than {_MOST_DEPTH} deep")
        items = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        size = _CHARS_PER_ITEM + sum(_CHARS_PER_ITEM + self.size_of(item, depth + 1) for item in items)
        self._sizes[id(value)] = value, size
        return size

    # --- before an operation ---

    def before_operator(self, operator: str, left: Any, right: Any) -> None:
        """Counts what a binary operator makes.

        Raises:
            RequestError: It would be too much.
        """
        self.step()
        sequence = (str, bytes, list, tuple)
        if operator == "*" and isinstance(right, sequence):
            left, right = right, left
        if operator == "*" and isinstance(left, sequence) and isinstance(right, int):
            self.text(max(0, right) * self.size_of(left))
        elif operator == "+" and isinstance(left, sequence):
            self.text(self.size_of(left) + self.size_of(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._before_percents(str(left), right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise _too_much(f"makes whole numbers of more than {_MOST_BITS} bits")

    def before_call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Counts what a call makes, and returns its arguments; arguments as those of `before_operator`."""
        self.step()
        if isinstance(function, FunctionType):
            function = getattr(function, "__wrapped__", function)  # the sandbox wraps `str.format`
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, (str, bytes, int, float)):
            return self._before_text(name, owner, args, kwargs)
        if name == "strftime_now":
            for text in args:
                self._before_percents(str(text), ())
        return args

    def before_filter(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Counts what a filter makes, and returns the value for it; arguments as those of `before_operator`."""
        self.step()
        if name == "format":
            self._before_percents(str(value), (*args, *kwargs.values()))
        elif name == "join":
            value = list(value)
            self.text(self.size_of(value) + len(value) * self.size_of((*args, *kwargs.values())))
        elif name == "sum" and any(isinstance(one, (list, tuple)) for one in (*args, *kwargs.values())):
            raise _too_much("adds up lists")  # each addition copies what was added before
        elif name == "tojson":
            self._check_arguments(name, args, kwargs)
            self.text(self.size_of(value))
        else:
            self._before_text(name, value, args, kwargs)
        return value

    def _before_text(self, name: str, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        values = (*args, *kwargs.values())
        if name in _SLOW and self.size_of(owner) > _SLOW_CHARS:
            raise _too_much(f"calls {name!r} with a text of more than {_SLOW_CHARS} characters")
        if name in _PADDING:
            self._check_arguments(name, args, kwargs)
            widest = max((one for one in values if isinstance(one, int)), default=8)
            if name in ("expandtabs", "indent"):
                num_places = 1 + str(owner).count("\t" if name == "expandtabs" else "\n")
                self.text(num_places * max(widest, self.size_of(values)))
        elif name == "replace" and len(values) >= 2:
            self.text(self.size_of(owner) + (str(owner).count(str(values[0])) + 1) * self.size_of(values[1]))
        elif name == "join" and args and isinstance(owner, (str, bytes)):
            items = list(args[0])
            self.text(self.size_of(items) + len(items) * len(owner))
            return items, *args[1:]
        elif name in ("format", "format_map"):
            self._before_braces(owner, values)
        elif name == "translate":
            self.text(len(owner) * self.size_of(values))
        return args

    def _check_arguments(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if (isinstance(value, int) and value > _LARGEST_ARGUMENT) or self.size_of(value) > _LARGEST_ARGUMENT:
                raise _too_much(f"calls {name!r} with an argument above {_LARGEST_ARGUMENT}")

    def _before_percents(self, template: str, values: Any) -> None:
        wide = _WIDE_NAMED_PERCENT if "%(" in template else _WIDE_PERCENT
        if wide.search(template):
            raise _too_much("formats a text with a field of more than 999 characters")
        self.text(len(template) + template.count("%") * (_FIELD_CHARS + self.size_of(values)))

    def _before_braces(self, template: str, values: Any) -> None:
        for _, _, width, _ in Formatter().parse(template):
            if width and _WIDE_BRACES.search(width):
                raise _too_much("formats a text with a field of more than 999 characters")
        self.text(len(template) + template.count("{") * (_FIELD_CHARS + self.size_of(values)))


def _too_much(what: str) -> RequestError:
    return RequestError(f"the checkpoint's chat template {what}, which is not allowed")
