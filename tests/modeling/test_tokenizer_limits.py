"""Tokenizers that would make much of little are refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hermes_async.errors import CheckpointError
from hermes_async.modeling.tokenizer_limits import MAX_ADDED_TOKENS, MAX_GROWTH, MAX_PATTERN_CHARS, check_tokenizer


def tokenizer(**parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_usual_tokenizers() -> None:
    check_tokenizer(tokenizer())
    check_tokenizer(
        tokenizer(
            normalizer=normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]
            ),
            pre_tokenizer=pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            post_processor=processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)]),
            decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        )
    )


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Replace("a", "b" * (MAX_GROWTH + 1))},
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 20)},
        {"normalizer": normalizers.Prepend("a" * (MAX_GROWTH + 1))},
        {"decoder": decoders.Replace("a", "b" * (MAX_GROWTH + 1))},
        {"post_processor": processors.TemplateProcessing("<s> " * (MAX_ADDED_TOKENS + 1) + "$A", None, [("<s>", 1)])},
        {"pre_tokenizer": pre_tokenizers.Split(Regex("a" * (MAX_PATTERN_CHARS + 1)), "removed")},
    ],
)
def test_a_tokenizer_that_makes_much_of_little(parts: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"the tokenizer's {next(iter(parts))} "):
        check_tokenizer(tokenizer(**parts))
