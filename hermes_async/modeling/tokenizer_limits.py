"""Refuses tokenizers that make a short text into one that takes all memory, put thousands of tokens around it, or may
decode for ever.

Texts are encoded on threads that a request can leave behind. Tokens are decoded on the compute thread, which all
requests share, and nothing can stop the Rust library. So each expression of a decoder has to end by its form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hermes_async.errors import CheckpointError

MAX_GROWTH = 256
"""Characters that the steps of a normalizer or a decoder may make of one."""
MAX_ADDED_TOKENS = 1024
"""Tokens that are put around every text."""
MAX_TOKEN_CHARS = 1024
"""Of a token that is added to a vocabulary, such as a special one. Answers are searched for beginnings of these."""
MAX_PATTERN_CHARS = 2**14
"""Of one regular expression. Those of models have some hundred characters."""

# An expression that leaves nothing to try again: alternatives of one character after another. What is repeated is the
# last of its alternative, so nothing can fail after it. Then a place of the text costs at most the expression's length.
_ESCAPE = r"\\(?:[wWdDsShHnrtfvAzZbB]|[pP]\{\^?\w+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\w\s])"
_CHARACTER = rf"(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\\\[\]&])++\]|[^\\\[\](){{}}|*+?])"
_ALTERNATIVE = rf"(?:{_CHARACTER}|\((?:\?(?:<?[=!]|[:>]))?{_CHARACTER}*+\))*+[*+?]?"
_ENDS_SOON = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*+")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks the added tokens of a tokenizer, and what one of the Rust library does to a text, without trying it.

    Raises:
        CheckpointError: The message names the part of `tokenizer.json`.
    """
    longest = max((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, default="")
    if len(longest) > MAX_TOKEN_CHARS:
        raise CheckpointError(
            f"the tokenizer's added token {longest!r:.50} has {len(longest)} characters, of at most {MAX_TOKEN_CHARS}"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part: Any = getattr(tokenizer.backend_tokenizer, name)
        if part is not None:
            _check_part(name, list(_objects(json.loads(part.__getstate__()))))


def _check_part(name: str, steps: list[Mapping[str, Any]]) -> None:
    texts = [step[key] for step in steps for key in ("content", "prepend") if isinstance(step.get(key), str)]
    growth = math.prod(max(1, len(text)) for text in texts)
    if growth > MAX_GROWTH:
        raise CheckpointError(
            f"the tokenizer's {name} may make {growth!s:.20} characters of one, of at most {MAX_GROWTH}"
        )
    lists = [value for step in steps for key in ("single", "pair", "ids") if isinstance(value := step.get(key), list)]
    if sum(map(len, lists)) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"the tokenizer's {name} puts {sum(map(len, lists))} tokens around a text, of at most {MAX_ADDED_TOKENS}"
        )
    for pattern in (step["Regex"] for step in steps if isinstance(step.get("Regex"), str)):
        if len(pattern) > MAX_PATTERN_CHARS:
            raise CheckpointError(
                f"the tokenizer's {name} has a regular expression of {len(pattern)} characters, of at most "
                f"{MAX_PATTERN_CHARS}"
            )
        if name == "decoder" and not _ENDS_SOON.fullmatch(pattern):
            raise CheckpointError(
                f"the tokenizer's decoder has the regular expression {pattern!r:.100}, which may take for ever with "
                "some texts; a decoder's expression may repeat one character or group at the end of an alternative, "
                "and nothing else"
            )


def _objects(tree: Any) -> Iterator[Mapping[str, Any]]:
    """All objects in a JSON value."""
    if isinstance(tree, dict):
        yield tree
    if isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _objects(value)
