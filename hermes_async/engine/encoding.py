"""Turns texts into an encoder's inputs.

Truncation is done here: a tokenizer's own truncation is a state that all threads share.
"""

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
"""One text: `input_ids`, `attention_mask`, and what else the tokenizer gives for each token."""

_MASK = "special_tokens_mask"


def encode_texts(tokenizer: SharedTokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Encodes whole texts, each with the tokenizer's special tokens.

    They are encoded one after another: a batch would wait for the Rust library's threads, which the process shares.

    Raises:
        RequestError: The tokenizer refuses a text.
    """
    for idx, text in enumerate(texts):
        check_text(f"text {idx}", text)
    return [_encode(tokenizer, text) for text in texts]


def encode_pair(tokenizer: SharedTokenizer, first: str, second: str) -> Encoded:
    """Encodes two texts as one sequence.

    Raises:
        RequestError: The tokenizer refuses a text.
    """
    for idx, text in enumerate((first, second)):
        check_text(f"text {idx}", text)
    return _encode(tokenizer, first, second)


def _encode(tokenizer: SharedTokenizer, text: str, pair: str | None = None) -> Encoded:
    with one_request("the tokenization of a text"):
        encoded = tokenizer(text, pair, return_special_tokens_mask=True, return_attention_mask=True, verbose=False)
    return dict(encoded)


def truncated(tokenizer: SharedTokenizer, encoded: Encoded, max_tokens: int, num_first: int | None = None) -> Encoded:
    """A text shortened to `max_tokens` as by the tokenizer's own truncation: all special tokens stay.

    Args:
        num_first: The number of tokens of a pair's first text. The longer text of the pair is shortened first.

    Raises:
        RequestError: The special tokens leave no room for the text.
    """
    mask = encoded[_MASK]
    if len(mask) <= max_tokens:
        return encoded
    body = [idx for idx, special in enumerate(mask) if not special]
    max_body = max_tokens - (len(mask) - len(body))
    if max_body <= 0:
        raise RequestError(f"{max_tokens} tokens leave no room for a text beside the tokenizer's special tokens")
    parts = [body] if num_first is None else [body[:num_first], body[num_first:]]
    lengths = [max_body] if num_first is None else _longest_first(len(parts[0]), len(parts[1]), max_body)
    left = tokenizer.truncation_side == "left"
    kept = {idx for idx, special in enumerate(mask) if special}
    for part, length in zip(parts, lengths, strict=True):
        kept |= set(part[len(part) - length :] if left else part[:length])
    return {name: [values[idx] for idx in sorted(kept)] for name, values in encoded.items()}


def _longest_first(first: int, second: int, max_body: int) -> list[int]:
    """The new lengths of two texts. Source: the strategy "longest_first" of Hugging Face's tokenizers."""
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > max_body else max(shorter, max_body - shorter)
    if shorter + longer > max_body:
        shorter, longer = max_body // 2, max_body // 2 + max_body % 2
    return [longer, shorter] if first > second else [shorter, longer]


def count_text_tokens(encoded: Encoded) -> int:
    """The number of tokens without special tokens."""
    return encoded[_MASK].count(0)


def model_inputs(encoded: Encoded) -> Encoded:
    """The inputs of a model, without the mask of special tokens."""
    return {name: values for name, values in encoded.items() if name != _MASK}


def count_prompt_tokens(tokenizer: SharedTokenizer, prompt: str, max_tokens: int | None) -> int:
    """The number of tokens that a prompt takes before a text, including those that the tokenizer puts before it."""
    (encoded,) = encode_texts(tokenizer, [prompt])
    token_ids = (encoded if max_tokens is None else truncated(tokenizer, encoded, max_tokens))["input_ids"]
    return len(token_ids) - bool(token_ids and token_ids[-1] in tokenizer.all_special_ids)


def lower_casing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that turns texts into lower case, unless the tokenizer does so itself."""
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
