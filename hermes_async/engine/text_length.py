"""Texts that no context can hold are refused before they are tokenized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hermes_async.errors import ContextLengthError

if TYPE_CHECKING:
    from hermes_async.serving.tokenizer import SharedTokenizer

_CHARS_PER_TOKEN = 8  # of the beginning that is looked at; texts have about four
_MORE_CHARS = 2  # times as many are looked at next
_SLACK_TOKENS = 256  # more than there are characters in the longest tokens, and in the longest words that are cut


def check_could_fit(tokenizer: SharedTokenizer, text: str, most_tokens: int | None) -> None:
    """Refuses a text that is far too long by its beginning, so that the rest is never tokenized.

    No number of characters tells by itself: a token may stand for any number of spaces, and for a whole unknown word.
    But a tokenizer cuts a text's beginning as it cuts the whole, except near the end of that beginning: within a word,
    a run of unknown characters, or a pair that is merged. A text is refused where its beginning has twice as many
    tokens as there may be, and `_SLACK_TOKENS` more. A beginning with fewer, as of spaces, is made longer.

    Raises:
        ContextLengthError: The text has more than `most_tokens`.
    """
    if most_tokens is None:
        return
    enough = 2 * most_tokens + _SLACK_TOKENS
    num_chars = _CHARS_PER_TOKEN * enough
    while _MORE_CHARS * num_chars < len(text):
        num_tokens = len(tokenizer(text[:num_chars], add_special_tokens=False, verbose=False)["input_ids"])
        if num_tokens >= enough:
            raise ContextLengthError(
                f"the text has {len(text)} characters, of which the first {num_chars} are {num_tokens} tokens already; "
                f"the most is {most_tokens}",
                context_length=most_tokens,
                num_tokens=num_tokens,
            )
        num_chars *= _MORE_CHARS
