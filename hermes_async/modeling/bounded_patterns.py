"""Regular expressions of a response template, with a limit to the time of all their matches in one answer.

The template comes with a checkpoint, and some expressions take for ever with some texts. An answer is divided on the
event loop, as its text comes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import regex  # type: ignore[import-untyped]  # as `re`, and a match may have a limit of time

from hermes_async.errors import RequestError

MAX_SECONDS = 2.0
_SHORTEST_S = 1e-3


class MatchingTime:
    """The time that the expressions of one answer's template may still take."""

    def __init__(self) -> None:
        self._left_s = MAX_SECONDS

    @contextmanager
    def limit(self) -> Iterator[float]:
        """A block that matches, and the seconds that it may take: of computation, as `regex` counts them.

        Raises:
            RequestError: It took longer.
        """
        started = time.thread_time()
        try:
            yield max(self._left_s, _SHORTEST_S)
        except TimeoutError:
            self._left_s = -_SHORTEST_S
        finally:
            self._left_s -= time.thread_time() - started
        if self._left_s < 0:
            raise RequestError(
                f"the expressions of the checkpoint's response_template took more than {MAX_SECONDS:g} s with this "
                "answer; generate it without response_stream, which gives the text undivided"
            )

    def try_tags(self, text: str, parser: str, options: Mapping[str, Any]) -> None:
        """Matches what transformers' parser of a region's content is about to match, which sets no limit itself.

        Args:
            parser: The name of the parser of content; `options` are its arguments.

        Raises:
            RequestError: As `limit`.
            Exception: An expression is not valid.
        """
        pattern, inner = options.get("tag_pattern"), options.get("value_parser") or {}
        values: list[str] = []
        if parser == "xml-inline" and isinstance(pattern, str):
            found = BoundedPattern(regex.compile(pattern, regex.DOTALL), self).finditer(text)
            values = [match.groupdict().get("value") or "" for match in found]
        elif parser == "kv-lines" and inner:
            lines = text.split(options.get("line_sep", "\n"))
            values = [line.partition(options.get("kv_sep", ":"))[2].strip() for line in lines]
        if inner:
            for value in values:
                self.try_tags(value, inner.get("name", "text"), inner.get("args", {}))


class BoundedPattern:
    """A compiled expression, with those of its methods that transformers' parser calls."""

    def __init__(self, pattern: Any, matching_time: MatchingTime) -> None:
        self._pattern = pattern
        self._time = matching_time

    def search(self, *args: Any, **options: Any) -> Any:
        with self._time.limit() as seconds:
            return self._pattern.search(*args, timeout=seconds, **options)

    def match(self, *args: Any, **options: Any) -> Any:
        with self._time.limit() as seconds:
            return self._pattern.match(*args, timeout=seconds, **options)

    def finditer(self, text: str) -> Iterator[Any]:
        with self._time.limit() as seconds:
            matches = self._pattern.finditer(text, timeout=seconds)
        while True:
            with self._time.limit():
                match = next(matches, None)
            if match is None:
                return
            yield match
