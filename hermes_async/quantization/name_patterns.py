"""Matches names of modules with the regular expressions of a configuration, which may come from anywhere.

A short expression can take for ever to match, and others take any amount of memory to compile. So their number and
length are limited, what they may be made of is, and so is the time that all of them together take.
"""

from __future__ import annotations

import re
import time
from math import prod
from pathlib import Path

import regex  # type: ignore[import-untyped]  # as `re`, and a match may have a limit of time

from hermes_async.errors import CheckpointError

_MAX_PATTERNS = 1024
_MAX_PATTERN_CHARACTERS = 500
_MAX_NAME_CHARACTERS = 1000
_MAX_REPEATS = 100  # the product of all numbers in braces: compiling repeats what is before them as often
MAX_SECONDS = 20.0
_BRACES = re.compile(r"\{(\d{0,4})(?:,(\d{0,4}))?\}")
_OTHER_SYNTAX = re.compile(r"\(\?(?!:|=|!|i\))|[{}]")  # such as recursion, and errors that are allowed in a match


class NamePatterns:
    """The expressions of one checkpoint. All mutable state: `_compiled`, by expression, and `_left_s`, of the time.

    They match as `re.match` does: from the beginning of a name, and to any place in it.

    Args:
        path: The checkpoint, for messages.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._left_s = MAX_SECONDS

    def match(self, expression: str, name: str) -> bool:
        """Whether a name begins as the expression says.

        Raises:
            CheckpointError: It is no regular expression, or one that is not read, or there are too many; or all of
                them together took too long. The message names it.
        """
        pattern = self._compiled.get(expression) or self._compile(expression)
        if len(name) > _MAX_NAME_CHARACTERS:
            raise self._error(expression, f"is to match a name of {len(name)} characters, of {_MAX_NAME_CHARACTERS}")
        started = time.perf_counter()
        found, in_time = False, True
        try:
            found = pattern.match(name, timeout=max(self._left_s, 1e-3)) is not None
        except TimeoutError:  # by another clock
            in_time = False
        self._left_s -= time.perf_counter() - started
        if self._left_s < 0 or not in_time:
            raise self._error(expression, f"takes too long to match: all together took more than {MAX_SECONDS:g} s")
        return found

    def _compile(self, expression: str) -> regex.Pattern[str]:
        if len(self._compiled) == _MAX_PATTERNS:
            raise self._error(expression, f"is one of more than {_MAX_PATTERNS}")
        if len(expression) > _MAX_PATTERN_CHARACTERS:
            raise self._error(expression, f"has {len(expression)} characters, of at most {_MAX_PATTERN_CHARACTERS}")
        counts = [int(number) for found in _BRACES.findall(expression) for number in found if number]
        if prod(max(1, count) for count in counts) > _MAX_REPEATS:
            raise self._error(expression, f"repeats more than {_MAX_REPEATS} times")
        other = _OTHER_SYNTAX.search(_BRACES.sub("", expression))
        if other is not None:
            raise self._error(expression, f"has {other[0]!r}, which hermes_async does not read in names of modules")
        try:
            self._compiled[expression] = pattern = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError) as error:
            raise self._error(expression, f"is no regular expression ({error})") from None
        return pattern

    def _error(self, expression: str, what: str) -> CheckpointError:
        shown = expression if len(expression) <= 100 else expression[:100] + "..."
        return CheckpointError(
            f"{self._path}: the pattern {shown!r} of the configuration's quantization {what}", path=self._path
        )
