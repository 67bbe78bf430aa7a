"""Texts that no context can hold are refused by their beginning, and others never are."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hermes_async import ContextLengthError
from hermes_async.engine.text_length import check_could_fit
from hermes_async.serving.tokenizer import SharedTokenizer
from tests.engines import open_engine

pytestmark = pytest.mark.anyio

PIECES = ["a", "b", "ab", "ba", "aab", "abab", "c", "   ", "▁", "▁ab", "▁▁▁▁"]


def words() -> Tokenizer:
    """Drops white space, and makes one token of an unknown word."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "ab": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_pieces() -> Tokenizer:
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "##a": 3, "##b": 4, "##ab": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def merges() -> Tokenizer:
    """A whole text is one word."""
    vocab = {piece: idx for idx, piece in enumerate(["<unk>", "a", "b", "c", "▁", "ab", "ba", "abab", "▁▁", "▁▁▁▁"])}
    pairs = [("a", "b"), ("b", "a"), ("ab", "ab"), ("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def unigram() -> Tokenizer:
    scored = [("<unk>", 0.0), *((piece.replace(" ", "▁"), -1.0 - idx / 7) for idx, piece in enumerate(PIECES))]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    "make", [words, word_pieces, merges, unigram, None], ids=lambda make: getattr(make, "__name__", "bytes")
)
def test_only_what_is_too_long_is_refused(make: Any) -> None:
    shared = SharedTokenizer(ByT5Tokenizer() if make is None else PreTrainedTokenizerFast(tokenizer_object=make()))
    chosen = random.Random(7)
    refused = 0
    for alphabet in ("ab", "ab ", " ", "a  ", "xyz", "abx", "abx   ", "c", "é ", "                           a"):
        for length in (9_000, 40_000):
            text = "".join(chosen.choices(alphabet, k=length))
            num_tokens = len(shared(text, add_special_tokens=False, verbose=False)["input_ids"])
            for most in (1, 8, num_tokens - 1, num_tokens, num_tokens + 1):
                try:
                    check_could_fit(shared, text, max(most, 1))
                except ContextLengthError as error:
                    refused += 1
                    assert num_tokens > most == error.context_length
                    assert "characters" in str(error)
    assert refused > 0
    check_could_fit(shared, "a b " * 100_000, None)


async def test_a_text_far_too_long_is_not_tokenized(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    works = SharedTokenizer.__call__

    def call(self: Any, text: str, *args: Any, **options: Any) -> Any:
        lengths.append(len(text))
        return works(self, text, *args, **options)

    monkeypatch.setattr(SharedTokenizer, "__call__", call)
    async with open_engine(tiny_model) as engine:
        for prompt in ("w5 " * 1_000_000, [{"role": "user", "content": "w5 " * 1_000_000}]):
            with pytest.raises(ContextLengthError) as caught:
                await engine.complete(prompt, tiny_model.params)
            assert caught.value.context_length == tiny_model.context
            assert caught.value.num_tokens > tiny_model.context
        async with engine.session([{"role": "user", "content": "w5"}]) as chat:
            with pytest.raises(ContextLengthError):
                await chat.complete("w5 " * 1_000_000)
        for call in (engine.embed, engine.classify):
            with pytest.raises(ContextLengthError):
                await call("w5 " * 1_000_000)
        assert max(lengths) < 10_000
        # White space is no token of this model.
        text = f"{' ' * 1_000_000}{tiny_model.text(tiny_model.prompts[1])}"
        assert (await engine.complete(text, tiny_model.params)).token_ids == tiny_model.references[1]
