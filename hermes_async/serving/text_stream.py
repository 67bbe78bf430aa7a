"""Token ids to text, token by token, for one request: whole characters only, and an end at a stop text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hermes_async.serving.tokenizer import SharedTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character's UTF-8 is at most four bytes, so at most three tokens lie in an incomplete one. More can be
# held back: tokens that each end one character and begin the next.
_MAX_INCOMPLETE_TOKENS = 3
_MAX_HELD_TOKENS = 8
_NUM_CONTEXT_TOKENS = 6
_MAX_MORE_CONTEXT = 26
_FIRST_MARK = 0xD800
"""The first of the surrogates, of which none is ever a character of a text."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text, and whether a stop text was met (the new text ends right before it, or with it)."""

    text: str
    stopped: bool


class TextStream:
    """Gives out a request's text as its tokens come.

    The deltas together are what `tokenizer.decode` adds for the output to what it gives for the prompt. Text
    is held back while it may end within a character, or within a stop text. Of several stop texts, the one
    that is complete first ends the text (the longest, if several are complete at once): so how the text was
    cut into tokens does not matter. A special token in a stop text is met whether it is shown or left out.

    A token costs the decoding of a few tokens, however long the output is.

    Args:
        tokenizer: Decodes; not changed.
        prompt_ids: What comes before the output; the last few tell whether it begins with a space.
        stop: Texts that end the output.
        include_stop: Whether the stop text that ends it is part of it.
        skip_special_tokens: Leave special tokens out.
        min_tokens: Stop texts that the first so many tokens complete do not count.
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
    ) -> None:
        self._decoder = _Decoder(tokenizer, prompt_ids, skip_special_tokens)
        # Of special tokens that are left out and that a stop text names: what stands for each in `_held`.
        self._marks: dict[int, str] = {}
        self._stop = tuple(stop)
        if skip_special_tokens and stop:
            self._mark_special_tokens(tokenizer)
        self._include_stop = include_stop
        self._num_to_pass = min_tokens
        self._held = ""
        self._deltas: list[str] = []
        self._stopped = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._deltas)

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met; nothing is given out after it."""
        return self._stopped

    def push(self, token_id: int, *, final: bool = False) -> TextDelta:
        """Takes the next token; returns the text that is certain now, or with `final` all that is left."""
        looked_for = self._num_to_pass == 0
        self._num_to_pass = max(0, self._num_to_pass - 1)
        decoded = self._decoder.push(token_id)
        mark = self._marks.get(token_id)
        if mark is not None:
            before = self._held + decoded + self._decoder.pending
            if looked_for and _first_stop(before + mark, self._stop, len(self._held)):
                decoded += self._decoder.flush()  # nothing completes a character any more
            decoded += mark
        return self._advance(decoded, final, looked_for)

    def finish(self) -> str:
        """Returns what was held back; bytes of an incomplete character become U+FFFD."""
        return self._advance("", True, self._num_to_pass == 0).text

    def _mark_special_tokens(self, tokenizer: PreTrainedTokenizerBase | SharedTokenizer) -> None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added: Any = tokenizer.added_tokens_decoder
        if isinstance(added, Mapping):  # of Mistral's own tokenizers it is no property, and not implemented
            special |= {str(token): token_id for token_id, token in added.items() if token.special}
        named = [token for token in special if any(token in text for text in self._stop)]
        marked = list(self._stop)
        for number, token in enumerate(sorted(named, key=len, reverse=True)):
            mark = self._marks[special[token]] = chr(_FIRST_MARK + number)
            marked = [text.replace(token, mark) for text in marked]
        self._stop = tuple(dict.fromkeys([*self._stop, *marked]))

    def _advance(self, decoded: str, final: bool, looked_for: bool) -> TextDelta:
        if self._stopped:
            return TextDelta("", stopped=True)
        text = self._held + decoded + (self._decoder.flush() if final else "")
        stop = _first_stop(text, self._stop, len(self._held)) if looked_for else None
        if stop is not None:
            self._stopped = True
            cut = stop.stop if self._include_stop else stop.start
        elif final:
            cut = len(text)
        else:
            cut = len(text) - _num_held(text, self._stop)
        self._held = "" if self._stopped else text[cut:]
        shown = text[:cut]
        for mark in self._marks.values():
            shown = shown.replace(mark, "")
        self._deltas.append(shown)
        return TextDelta(shown, self._stopped)


class _Decoder:
    """Decodes a window over the last few tokens; those before `_read` are only context.

    State: `_window`, token ids; `_text`, what they decode to; `_given`, the start of it that is given out.
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
        """Returns the text that is certain now: none while the last character may be incomplete."""
        text = self._decode([*self._window, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # A skipped special token. Twice, as one "▁" that comes first shows nothing either.
        # Bytes that byte fallback showed one by one became one character, which may be U+FFFD itself.
        completed = len(text) < len(self._text) or not text.endswith(_REPLACEMENT)
        self._window.append(token_id)
        self._text = text
        if not text.startswith(self._given):
            self._mend()
        num_pending = len(self._window) - self._read
        if completed:
            new = self.flush()
            self._slide(self._window, num_pending)
        elif num_pending < _MAX_HELD_TOKENS:
            new = ""
        else:
            # The model writes invalid bytes, or U+FFFD itself: only the last can become another character.
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

    def _mend(self) -> None:
        """Makes `_given` the beginning of `_text` again, where the last token changed text before it."""
        # The prompt ended within a character, and the output completes it.
        self._given = self._given.rstrip(_REPLACEMENT)
        if not self._text.startswith(self._given):
            # Byte fallback shows all of a run of byte tokens as invalid while its last character is
            # incomplete. Byte tokens need no context.
            self._window = self._window[self._read :]
            self._text, self._given, self._read = self._decode(self._window), "", 0

    def _slide(self, token_ids: list[int], num_tokens: int) -> None:
        """Makes the last `num_tokens` the context; some more where those alone begin within a character."""
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
    """Returns where the stop text is that is complete first in `text` behind `num_passed` characters, or None."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s, max(0, num_passed - len(s) + 1))) >= 0]
    end, start = min(found, default=(0, 0))
    return range(start, end) if end else None


def _num_held(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` that a stop text begins with."""
    lengths = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(lengths, default=0)
