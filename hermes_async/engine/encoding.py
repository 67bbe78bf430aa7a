"""Texts to the inputs of an encoder, without a tokenizer's own truncation: it is a state that all its users share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from transformers import PreTrainedTokenizerBase

from hermes_async.config import check_text
from hermes_async.errors import RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.serving.tokenizer import SharedTokenizer

Encoded = dict[str, list[int]]
"""Of one text: `input_ids`, `attention_mask`, and what else its tokenizer gives for each token."""

_MASK = "special_tokens_mask"


def encode_texts(tokenizer: SharedTokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Whole texts, each with the tokenizer's special tokens around it.

    One after another: a batch would wait for the Rust library's threads, which all tokenizers of the process share.

    Raises:
        RequestError: The tokenizer refuses them.
    """
    for idx, text in enumerate(texts):
        check_text(f"text {idx}", text)
    return [_encode(tokenizer, text) for text in texts]


def encode_pair(tokenizer: SharedTokenizer, first: str, second: str) -> Encoded:
    """Two texts in one sequence, as the tokenizer joins them.

    Raises:
        RequestError: The tokenizer refuses them.
    """
    for idx, text in enumerate((first, second)):
        check_text(f"text {idx}", text)
    return _encode(tokenizer, first, second)


def _encode(tokenizer: SharedTokenizer, text: str, pair: str | None = None) -> Encoded:
    with one_request("the tokenization of a text"):
        encoded = tokenizer(text, pair, return_special_tokens_mask=True, return_attention_mask=True, verbose=False)
    return dict(encoded)


def cut(tokenizer: SharedTokenizer, encoded: Encoded, max_tokens: int, num_first: int | None = None) -> Encoded:
    """At most `max_tokens`, as the tokenizer's own truncation leaves them: the special tokens all stay.

    Args:
        num_first: Of a pair, the tokens of its first text; the longer one is then cut first.

    Raises:
        RequestError: There is no room beside the special tokens.
    """
    mask = encoded[_MASK]
    if len(mask) <= max_tokens:
        return encoded
    body = [idx for idx, special in enumerate(mask) if not special]
    room = max_tokens - (len(mask) - len(body))
    if room <= 0:
        raise RequestError(f"{max_tokens} tokens leave no room for a text beside the tokenizer's special tokens")
    parts = [body] if num_first is None else [body[:num_first], body[num_first:]]
    lengths = [room] if num_first is None else _longest_first(len(parts[0]), len(parts[1]), room)
    left = tokenizer.truncation_side == "left"
    kept = {idx for idx, special in enumerate(mask) if special}
    for part, length in zip(parts, lengths, strict=True):
        kept |= set(part[len(part) - length :] if left else part[:length])
    return {name: [values[idx] for idx in sorted(kept)] for name, values in encoded.items()}


def _longest_first(first: int, second: int, room: int) -> list[int]:
    """Source: the strategy "longest_first" of Hugging Face's tokenizers."""
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return [longer, shorter] if first > second else [shorter, longer]


def count_text_tokens(encoded: Encoded) -> int:
    """Without the special tokens around the text."""
    return encoded[_MASK].count(0)


def features(encoded: Sequence[Encoded]) -> list[Encoded]:
    """Without what is no input of a model."""
    return [{name: values for name, values in item.items() if name != _MASK} for item in encoded]


def count_prompt_tokens(tokenizer: SharedTokenizer, prompt: str, max_tokens: int | None) -> int:
    """How many tokens at a text's beginning are the prompt's, those that the tokenizer puts before it included."""
    (encoded,) = encode_texts(tokenizer, [prompt])
    token_ids = (encoded if max_tokens is None else cut(tokenizer, encoded, max_tokens))["input_ids"]
    return len(token_ids) - bool(token_ids and token_ids[-1] in tokenizer.all_special_ids)


def lower_casing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that puts texts into lower case first, where the tokenizer does not do so itself."""
    lowering = copy.deepcopy(tokenizer)
    backend: Any = getattr(lowering, "backend_tokenizer", None)
    if backend is None:
        lowering.do_lower_case = True
        return lowering
    normalizer: Any = backend.normalizer
    normalizers: list[Any] = list(iter(normalizer)) if isinstance(normalizer, NormalizerSequence) else [normalizer]
    if not any(isinstance(item, Lowercase) for item in normalizers):
        backend.normalizer = NormalizerSequence([Lowercase(), *(item for item in normalizers if item is not None)])
    return lowering
