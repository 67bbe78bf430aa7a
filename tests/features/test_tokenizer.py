"""One tokenizer on many threads gives what it gives on one."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, NllbTokenizer, PreTrainedTokenizerFast

from hermes_async import ContextLengthError, Engine, RequestError
from hermes_async.engine.encoding import encode_texts
from hermes_async.engine.text_length import check_could_fit
from hermes_async.modeling.transformers_api import changes_in_calls
from hermes_async.serving.tokenizer import SharedTokenizer
from tests.engines import open_engine, until

pytestmark = pytest.mark.anyio


def fast_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose file cuts and pads, as those of embedding models do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>"])
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog      " * 3], trainer)
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=4, pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def texts(count: int) -> list[str]:
    chosen = random.Random(3)
    return [
        " ".join(chosen.choices(["the", "fox", "über", "dog", "jumps"], k=chosen.randrange(80))) for _ in range(count)
    ]


@pytest.mark.parametrize("make", [fast_tokenizer, ByT5Tokenizer], ids=["rust", "python"])
def test_threads_get_what_one_thread_gets(make: Any) -> None:
    several = texts(300)
    alone = SharedTokenizer(make())
    expected = [(encode_texts(alone, [text]), alone.decode(alone(text)["input_ids"])) for text in several]
    assert max(len(encoded[0]["input_ids"]) for encoded, _ in expected) > 80  # nothing was cut
    assert [decoded for _, decoded in expected] == several or make is ByT5Tokenizer
    shared = SharedTokenizer(make())
    with ThreadPoolExecutor(8) as threads:
        encoded = threads.map(lambda text: encode_texts(shared, [text]), several)
        decoded = threads.map(lambda text: shared.decode(shared(text)["input_ids"]), several)
        assert list(zip(encoded, decoded, strict=True)) == expected


def test_only_calls_of_the_plain_class_around_the_rust_library_are_shared() -> None:
    assert not changes_in_calls(fast_tokenizer())
    assert changes_in_calls(ByT5Tokenizer())
    assert changes_in_calls(NllbTokenizer())  # sets the language in each call

    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            return super()._encode_plus(*args, **options)

    assert changes_in_calls(Own(tokenizer_object=Tokenizer(models.BPE())))


def test_a_panic_ends_one_text_and_leaves_the_tokenizer_as_it_was() -> None:
    """White space of this length is more than the regular expression of Llama 3's tokenizer can go through."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: idx for idx, character in enumerate(alphabet)}, []))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    shared = SharedTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    expected = encode_texts(shared, ["a b"])
    with pytest.raises(RequestError, match="PanicException") as caught:
        encode_texts(shared, [" " * 11_000_000])
    assert not isinstance(caught.value.__cause__, Exception)
    assert encode_texts(shared, ["a b"]) == expected
    with pytest.raises(ContextLengthError):  # where it is no panic, it is not tokenized at all
        check_could_fit(shared, " " * 11_000_000, 8192)


class Meeting:
    """Keeps two threads inside a tokenizer at the same time, and notes who is in which."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.both = threading.Event()
        self.let_go = threading.Event()

    def enter(self, tokenizer: Any) -> None:
        self.inside.append(id(tokenizer))
        if len(self.inside) == 2:
            self.both.set()
        assert self.let_go.wait(60)


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    """Of whoever tokenizes a text that begins with an A, in a tokenizer that is written in Python."""
    met, works = Meeting(), ByT5Tokenizer.tokenize

    def tokenize(tokenizer: Any, text: str, **options: Any) -> Any:
        if text.startswith("A"):
            met.enter(tokenizer)
        return works(tokenizer, text, **options)

    monkeypatch.setattr(ByT5Tokenizer, "tokenize", tokenize)
    yield met
    met.let_go.set()


@pytest.fixture
def with_python_tokenizer(tiny_model: Any, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(tiny_model.path, tmp_path / "python"))
    (path / "tokenizer.json").unlink()
    # The characters from "!" to "Z" are tokens of the small model.
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}))
    return path


async def test_two_prompts_are_never_in_one_python_tokenizer(
    tiny_model: Any, with_python_tokenizer: Path, meeting: Meeting
) -> None:
    async with Engine(with_python_tokenizer, memory_budget="8MiB", config=tiny_model.config) as engine:
        alone = await engine.complete("BCD", tiny_model.params)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.complete, "ABC", tiny_model.params)
            group.start_soon(engine.complete, "ACD", tiny_model.params)
            await until(meeting.both.is_set)
            meeting.let_go.set()
        assert len(set(meeting.inside)) == 2
        assert (await engine.complete("BCD", tiny_model.params)).token_ids == alone.token_ids


async def test_calls_that_cut_texts_and_calls_that_do_not_do_not_meet(tiny_model: Any) -> None:
    """Each cut text has as many tokens as the context, and each prompt all of its own."""
    prompt, long_text = tiny_model.text(tiny_model.prompts[4]), tiny_model.text([5, 6, 7] * 40)
    async with open_engine(tiny_model, max_tokens_per_sweep=64) as engine:
        expected = await engine.embed(long_text, truncate=True)
        ends: list[tuple[int, ...]] = []

        async def complete() -> None:
            ends.append((await engine.complete(prompt, tiny_model.params)).token_ids)

        async def embed() -> None:
            np.testing.assert_array_equal(await engine.embed(long_text, truncate=True), expected)

        async with anyio.create_task_group() as group:
            for _ in range(12):
                group.start_soon(complete)
                group.start_soon(embed)
        assert ends == [tiny_model.references[4]] * 12


def test_long_texts_of_a_python_tokenizer_do_not_hold_up_decoding(meeting: Meeting) -> None:
    shared = SharedTokenizer(ByT5Tokenizer())
    ids = shared("BCD", add_special_tokens=False)["input_ids"]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            threads.submit(shared, "ABC")
        assert meeting.both.wait(60)
        assert shared.decode(ids) == "BCD"
        meeting.let_go.set()
    assert len(set(meeting.inside)) == 2
