"""Decodes the tokens of one request to whole characters as they come, and ends at stop texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hermes_async.serving.tokenizer import SharedTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes of UTF-8, so an incomplete one has at most three tokens. More tokens are held back
# if each ends one character and begins the next.
_MAX_INCOMPLETE_TOKENS = 3
_MAX_HELD_TOKENS = 8
_NUM_CONTEXT_TOKENS = 6
_MAX_MORE_CONTEXT = 26
_FIRST_MARK = 0xD800
"""The first surrogate. No text has surrogates as characters."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text, and whether a stop text was found. If so, the new text ends before it or with it."""

    text: str
    stopped: bool


class TextStream:
    """Returns a request's text as its tokens come.

    All deltas together are the text that `tokenizer.decode` gives for prompt and output, without the prompt's text.
    Text is held back while it may end within a character or a stop text. The stop text that is complete first ends the
    output; if several are complete at once, the longest does. So the result does not depend on how the text is split
    into tokens. A special token in a stop text is found even if `skip_special_tokens` hides it.

    Each token costs the decoding of a few tokens, whatever the length of the output.

    Args:
        tokenizer: Decodes; not changed.
        prompt_ids: The prompt's tokens. The last few decide whether the output begins with a space.
        stop: Texts that end the output.
        include_stop: Whether the output includes the stop text that ends it.
        skip_special_tokens: Leave special tokens out.
        min_tokens: Stop texts that are complete within this number of tokens are ignored.
        may_stop_after: Whether the output may end with a text; a stop text after any other one is ignored. None allows
            all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | SharedTokenizer,
        *,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        may_stop_after: Callable[[str], bool] | None = None,
    ) -> None:
        self._decoder = _Decoder(tokenizer, prompt_ids, skip_special_tokens)
        # The character that stands in `_held` for each special token that is left out and is part of a stop text.
        self._marks: dict[int, str] = {}
        self._stop = tuple(stop)
        if skip_special_tokens and stop:
            self._mark_special_tokens(tokenizer)
        self._include_stop = include_stop
        self._num_before_stop = min_tokens
        self._may_stop_after = may_stop_after
        self._held = ""
        self._deltas: list[str] = []
        self._stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._deltas)

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found; no text is returned after it."""
        return self._stopped

    def push(self, token_id: int, *, final: bool = False) -> TextDelta:
        """Takes the next token; returns the text that is certain now, or with `final` all the rest."""
        may_stop = self._num_before_stop == 0
        self._num_before_stop = max(0, self._num_before_stop - 1)
        decoded = self._decoder.push(token_id)
        mark = self._marks.get(token_id)
        if mark is not None:
            before = self._held + decoded + self._decoder.pending
            if may_stop and self._find_stop(before + mark):
                decoded += self._decoder.flush()  # the output ends here, so no token completes a character any more
            decoded += mark
        return self._advance(decoded, final, may_stop)

    def finish(self) -> str:
        """Returns the text that was held back; bytes of an incomplete character become U+FFFD."""
        return self._advance("", True, self._num_before_stop == 0).text

    def _mark_special_tokens(self, tokenizer: PreTrainedTokenizerBase | SharedTokenizer) -> None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added: Any = tokenizer.added_tokens_decoder
        if isinstance(added, Mapping):  # Mistral's own tokenizers have a method here, which is not implemented
            special |= {str(token): token_id for token_id, token in added.items() if token.special}
        named = [token for token in special if any(token in text for text in self._stop)]
        marked = list(self._stop)
        for number, token in enumerate(sorted(named, key=len, reverse=True)):
            mark = self._marks[special[token]] = chr(_FIRST_MARK + number)
            marked = [text.replace(token, mark) for text in marked]
        self._stop = tuple(dict.fromkeys([*self._stop, *marked]))

    def _advance(self, decoded: str, final: bool, may_stop: bool) -> TextDelta:
        if self._stopped:
            return TextDelta("", stopped=True)
        text = self._held + decoded + (self._decoder.flush() if final else "")
        stop = self._find_stop(text) if may_stop else None
        if stop is not None:
            self._stopped = True
            end = stop.stop if self._include_stop else stop.start
        elif final:
            end = len(text)
        else:
            end = len(text) - _num_held(text, self._stop)
        self._held = "" if self._stopped else text[end:]
        shown = self._shown(text[:end])
        self._deltas.append(shown)
        return TextDelta(shown, self._stopped)

    def _find_stop(self, text: str) -> range | None:
        """The position of the stop text in `text` that ends the output, or None. `text` begins with `_held`."""
        stop = _first_stop(text, self._stop, len(self._held))
        while stop is not None and self._may_stop_after is not None:
            if self._may_stop_after(self._shown(self.text + text[: stop.start])):
                break
            stop = _first_stop(text, self._stop, stop.stop)
        return stop

    def _shown(self, text: str) -> str:
        """Without the marks of special tokens."""
        for mark in self._marks.values():
            text = text.replace(mark, "")
        return text


class _Decoder:
    """Decodes a window of the last few tokens.

    State: `_window`, token ids, of which the first `_read` are only context; `_text`, their text; `_given`, the start
    of it that was returned.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | SharedTokenizer, prompt_ids: Sequence[int], skip: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip
        self._window: list[int] = []
        self._text = self._given = ""
        self._read = 0
        self._slide(list(prompt_ids[-_NUM_CONTEXT_TOKENS - _MAX_MORE_CONTEXT :]), _NUM_CONTEXT_TOKENS)

    def push(self, token_id: int) -> str:
        """Returns the text that is certain now, which is empty while the last character may be incomplete."""
        text = self._decode([*self._window, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # A skipped special token. It is decoded twice, because a single leading "▁" has no text either.
        # The text is shorter if the bytes that byte fallback showed one by one became one character, even U+FFFD.
        completed = len(text) < len(self._text) or not text.endswith(_REPLACEMENT)
        self._window.append(token_id)
        self._text = text
        if not text.startswith(self._given):
            self._fix_given()
        num_pending = len(self._window) - self._read
        if completed:
            new = self.flush()
            self._slide(self._window, num_pending)
        elif num_pending < _MAX_HELD_TOKENS:
            new = ""
        else:
            # The model writes invalid bytes, or U+FFFD itself. Only the last character can still change.
            new = self.flush()
            self._slide(self._window, _MAX_INCOMPLETE_TOKENS + 1)
            if self._text.endswith(_REPLACEMENT):
                new, self._given = new[:-1], self._text[:-1]
                self._read = len(self._window) - _MAX_INCOMPLETE_TOKENS
        return new

    @property
    def pending(self) -> str:
        """The text that is held back."""
        return self._text[len(self._given) :]

    def flush(self) -> str:
        """Returns the text that was held back."""
        new = self.pending
        self._given = self._text
        self._read = len(self._window)
        return new

    def _fix_given(self) -> None:
        """Makes `_given` the start of `_text` again, after the last token changed the text before it."""
        # The prompt may have ended within a character that the output completes.
        self._given = self._given.rstrip(_REPLACEMENT)
        if not self._text.startswith(self._given):
            # Byte fallback shows all byte tokens in a row as invalid while the last character is incomplete. Byte
            # tokens need no context.
            self._window = self._window[self._read :]
            self._text, self._given, self._read = self._decode(self._window), "", 0

    def _slide(self, token_ids: list[int], num_tokens: int) -> None:
        """Makes the last `num_tokens` the context, or some more if those begin within a character."""
        shortest = max(len(token_ids) - num_tokens, 0)
        for start in range(shortest, max(shortest - _MAX_MORE_CONTEXT, 0) - 1, -1):
            text = self._decode(token_ids[start:])
            if text and not text.startswith(_REPLACEMENT):
                break
        else:
            start, text = shortest, self._decode(token_ids[shortest:])
        self._window, self._text, self._given = token_ids[start:], text, text
        self._read = len(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        return cast(str, text)


def _first_stop(text: str, stop: Sequence[str], num_passed: int) -> range | None:
    """Returns the position of the stop text that ends first after `num_passed` characters of `text`, or None."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s, max(0, num_passed - len(s) + 1))) >= 0]
    end, start = min(found, default=(0, 0))
    return range(start, end) if end else None


def _num_held(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` that is the start of a stop text."""
    lengths = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(lengths, default=0)
