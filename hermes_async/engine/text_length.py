"""Refuses texts that are far too long, before they are tokenized as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hermes_async.errors import ContextLengthError

if TYPE_CHECKING:
    from hermes_async.serving.tokenizer import SharedTokenizer

_CHARS_PER_TOKEN = 8  # decides the length of the first beginning; texts have about four
_GROWTH = 2  # factor by which the beginning becomes longer
_SLACK_TOKENS = 256  # more than the number of characters in the longest token, or in the longest word that is split


def check_could_fit(tokenizer: SharedTokenizer, text: str, most_tokens: int | None) -> None:
    """Refuses a text if its beginning alone has too many tokens; the rest is not tokenized.

    The number of characters does not decide it: one token may stand for any number of spaces, or for an unknown word.
    But a tokenizer splits the beginning of a text as it splits the whole text, except near the end of that beginning
    (within a word, a run of unknown characters, or a merged pair). So a text is refused if its beginning has at least
    2 * `most_tokens` + `_SLACK_TOKENS` tokens. If it has fewer, as with spaces, a longer beginning is tried.

    Raises:
        ContextLengthError: The text has more than `most_tokens`.
    """
    if most_tokens is None:
        return
    enough = 2 * most_tokens + _SLACK_TOKENS
    num_chars = _CHARS_PER_TOKEN * enough
    while _GROWTH * num_chars < len(text):
        num_tokens = len(tokenizer(text[:num_chars], add_special_tokens=False, verbose=False)["input_ids"])
        if num_tokens >= enough:
            raise ContextLengthError(
                f"the text has {len(text)} characters; the first {num_chars} alone are {num_tokens} tokens, of at most "
                f"{most_tokens}",
                context_length=most_tokens,
                num_tokens=num_tokens,
            )
        num_chars *= _GROWTH
