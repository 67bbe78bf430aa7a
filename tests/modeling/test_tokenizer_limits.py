"""Tokenizers that would make much of little are refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hermes_async.errors import CheckpointError
from hermes_async.modeling.tokenizer_limits import (
    MAX_ADDED_TOKENS,
    MAX_GROWTH,
    MAX_PATTERN_CHARS,
    MAX_TOKEN_CHARS,
    check_tokenizer,
)


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


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_that_is_long(special: bool) -> None:
    usual = tokenizer()
    usual.add_tokens(["x" * MAX_TOKEN_CHARS], special_tokens=special)
    check_tokenizer(usual)
    usual.add_tokens(["y" * (MAX_TOKEN_CHARS + 1)], special_tokens=special)
    message = f"added token 'y+ has {MAX_TOKEN_CHARS + 1} characters, of at most {MAX_TOKEN_CHARS}"
    with pytest.raises(CheckpointError, match=message):
        check_tokenizer(usual)


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


@pytest.mark.parametrize(
    "pattern",
    [
        "", "▁", r"\n", r"\s+", " +", "^ ", r"(?<!\n)^ ", "█ |█", r"\p{L}", r"[\s\p{^L}]*", "(ab)+", r"\.|\x20",
        "(?=a)b?",
    ],
)  # fmt: skip
def test_a_decoder_with_an_expression_that_ends_soon(pattern: str) -> None:
    check_tokenizer(tokenizer(decoder=decoders.Replace(Regex(pattern), " ")))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$", "(a|a)*b", "(?:a?){60}a{60}", "a?" * 30 + "a" * 30, "(a|a)" * 30 + "b", ".*.*.*.*b", "a+b", "a{2}",
        r"(a)(\1\1)(\2\2)", r"a\g<0>?", r"(?~a)", r"[a[b]]", r"(?i)a", r"(?<x>a)\k<x>", "a++", "(?>a*)*",
    ],
)  # fmt: skip
def test_a_decoder_with_an_expression_that_may_take_for_ever(pattern: str) -> None:
    decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(pattern), " ")])
    with pytest.raises(CheckpointError, match=r"the tokenizer's decoder has the regular expression .* for ever"):
        check_tokenizer(tokenizer(decoder=decoder))
    check_tokenizer(tokenizer(normalizer=normalizers.Replace(Regex(pattern), " ")))
