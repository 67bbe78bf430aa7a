"""TextStream against the tokenizer's own decoding of everything at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hermes_async.serving.text_stream import TextDelta, TextStream

CORPUS = [
    "Once upon a time there was a tiny model. ",
    "The café served naïve 日本語 tea 😀😀. ",
    "stop STOP End. ",
] * 20
SPECIAL = ["<s>", "</s>", "<|user|>"]


def byte_level_tokenizer() -> PreTrainedTokenizerBase:
    """As GPT-2's and Llama 3's: every token is a piece of UTF-8 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama 2's and Mistral's: "▁" for a space, the first stripped; unknown characters as bytes."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilmnoprstuvwyOST."]
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("o", "n"),
        ("▁", "on"),
        ("S", "T"),
        ("▁", "a"),
        ("▁", "▁"),
    ]
    pieces += [left + right for left, right in merges]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|user|>"],
    )


BYTE_LEVEL = byte_level_tokenizer()
METASPACE = metaspace_tokenizer()
both_tokenizers = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["bytes", "metaspace"])


def token(tokenizer: PreTrainedTokenizerBase, piece: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(piece)
    assert isinstance(token_id, int)
    return token_id


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, skip: bool = True) -> str:
    text = tokenizer.decode(list(token_ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return str(text)


def in_context(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], output: Sequence[int], *, skip: bool = True
) -> str:
    before = decode(tokenizer, prompt, skip=skip)
    whole = decode(tokenizer, [*prompt, *output], skip=skip)
    assert whole.startswith(before)
    return whole[len(before) :]


def byte_token(tokenizer: PreTrainedTokenizerBase, byte: int) -> int:
    if tokenizer is METASPACE:
        return token(tokenizer, f"<0x{byte:02X}>")
    byte_chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [b for b in range(256) if chr(b) in byte_chars]
    others = [b for b in range(256) if b not in printable]  # in GPT-2's table from U+0100 on, in order
    char = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return token(tokenizer, char)


def byte_tokens(tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    return [byte_token(tokenizer, byte) for byte in data]


def stream_all(stream: TextStream, token_ids: Iterable[int]) -> list[str]:
    """Returns each push's text, and what `finish` gave."""
    deltas = [stream.push(token_id).text for token_id in token_ids]
    return [*deltas, stream.finish()]


class CountingTokenizer:
    """Records how many tokens each decode call was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.calls: list[int] = []

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        self.calls.append(len(token_ids))
        return str(self._tokenizer.decode(list(token_ids), **kwargs))


# The deltas together


@both_tokenizers
@pytest.mark.parametrize("skip", [True, False])
@given(prompt=st.text(max_size=20), output=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_deltas_of_any_text_are_the_whole_decoded_at_once(
    tokenizer: PreTrainedTokenizerBase, skip: bool, prompt: str, output: str
) -> None:
    prompt_ids, output_ids = encode(tokenizer, prompt), encode(tokenizer, output)
    stream = TextStream(tokenizer, prompt_ids=prompt_ids, skip_special_tokens=skip)

    deltas = stream_all(stream, output_ids)

    assert "".join(deltas) == in_context(tokenizer, prompt_ids, output_ids, skip=skip)
    assert stream.text == "".join(deltas)
    assert stream.finish() == ""


@given(
    prompt=st.text(max_size=20),
    output=st.lists(st.one_of(st.integers(0, len(BYTE_LEVEL) - 1), st.integers(0, 2)), max_size=60),
    skip=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_deltas_of_any_byte_level_tokens_are_the_whole_decoded_at_once(
    prompt: str, output: list[int], skip: bool
) -> None:
    prompt_ids = encode(BYTE_LEVEL, prompt)
    stream = TextStream(BYTE_LEVEL, prompt_ids=prompt_ids, skip_special_tokens=skip)
    assert "".join(stream_all(stream, output)) == in_context(BYTE_LEVEL, prompt_ids, output, skip=skip)


@given(
    prompt=st.lists(st.integers(0, len(METASPACE) - 1), max_size=12),
    output=st.lists(
        st.one_of(
            st.integers(0, len(METASPACE) - 1).filter(lambda i: not 4 <= i < 260).map(lambda i: [i]),
            st.characters(exclude_categories=["Cs"]).map(lambda c: byte_tokens(METASPACE, c.encode())),
        ),
        max_size=40,
    ).map(lambda parts: [token_id for part in parts for token_id in part]),
    skip=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_deltas_of_any_metaspace_tokens_are_the_whole_decoded_at_once(
    prompt: list[int], output: list[int], skip: bool
) -> None:
    prompt = [*prompt, token(METASPACE, "a")]  # a prompt that ends with a whole character
    stream = TextStream(METASPACE, prompt_ids=prompt, skip_special_tokens=skip)
    assert "".join(stream_all(stream, output)) == in_context(METASPACE, prompt, output, skip=skip)


@given(output=st.lists(st.integers(0, len(METASPACE) - 1), max_size=60))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_utf8_cost_no_other_text(output: list[int]) -> None:
    """The tokenizer shows a run of byte tokens with one invalid byte as invalid throughout."""
    text = "".join(stream_all(TextStream(METASPACE, prompt_ids=[]), output))
    whole = decode(METASPACE, output)
    if "\ufffd" not in whole:
        assert text == whole
    remaining = iter(text)
    assert all(char in remaining for char in whole if char != "\ufffd")


@pytest.mark.parametrize("special_tail", [1, 3, 10])
def test_leading_space_of_the_first_token_depends_on_the_prompt(special_tail: int) -> None:
    output = encode(METASPACE, "the on")
    specials = [token(METASPACE, "<|user|>")] * special_tail
    prompt = encode(METASPACE, "on") + specials
    assert "".join(stream_all(TextStream(METASPACE, prompt_ids=[]), output)) == "the on"
    assert "".join(stream_all(TextStream(METASPACE, prompt_ids=specials), output)) == "the on"
    assert "".join(stream_all(TextStream(METASPACE, prompt_ids=prompt), output)) == " the on"


def test_space_token_after_skipped_special_tokens_keeps_its_space() -> None:
    user, space, the = (token(METASPACE, piece) for piece in ("<|user|>", "▁", "▁the"))
    for prompt in ([], [user]):
        stream = TextStream(METASPACE, prompt_ids=prompt)
        assert "".join(stream_all(stream, [user, space, user, the])) == " the"


@both_tokenizers
def test_special_tokens_give_no_text_when_skipped_and_theirs_otherwise(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    end = token(tokenizer, "</s>")
    assert TextStream(tokenizer, prompt_ids=[]).push(end) == TextDelta("", stopped=False)
    assert TextStream(tokenizer, prompt_ids=[], skip_special_tokens=False).push(end).text == "</s>"


# Whole characters


@both_tokenizers
def test_character_over_four_tokens_comes_with_the_last(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = encode(tokenizer, "the")
    stream = TextStream(tokenizer, prompt_ids=prompt)
    assert stream_all(stream, byte_tokens(tokenizer, "😀é日".encode())) == [
        "",
        "",
        "",
        "😀",
        "",
        "é",
        "",
        "",
        "日",
        "",
    ]


@both_tokenizers
def test_character_over_special_tokens_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    first, *others = byte_tokens(tokenizer, "😀".encode())
    specials = [token(tokenizer, "<|user|>")] * 20
    assert "".join(stream_all(TextStream(tokenizer, prompt_ids=[]), [first, *specials, *others])) == "😀"


@both_tokenizers
def test_incomplete_character_at_the_end_becomes_replacement_characters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    token_ids = encode(tokenizer, "the") + byte_tokens(tokenizer, "😀".encode()[:3])
    stream = TextStream(tokenizer, prompt_ids=[])
    deltas = stream_all(stream, token_ids)
    assert deltas[-4:-1] == ["", "", ""]
    assert deltas[-1].strip("\ufffd") == "" != deltas[-1]
    assert stream.text == decode(tokenizer, token_ids)


@both_tokenizers
def test_character_that_the_prompt_began_is_completed(tokenizer: PreTrainedTokenizerBase) -> None:
    data = byte_tokens(tokenizer, "😀日本".encode())
    stream = TextStream(tokenizer, prompt_ids=encode(tokenizer, "the") + data[:2])
    assert "".join(stream_all(stream, data[2:])) == "😀日本"


@both_tokenizers
def test_prompt_is_cut_between_characters_for_context(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = byte_tokens(tokenizer, ("日" * 20).encode())
    for num_more in range(3):  # so that the context's first token is each of a character's three
        stream = TextStream(tokenizer, prompt_ids=prompt + byte_tokens(tokenizer, b"a" * num_more))
        assert "".join(stream_all(stream, byte_tokens(tokenizer, "本語".encode()))) == "本語"


@both_tokenizers
@pytest.mark.parametrize("data", [b"\xff", b"\x80", b"\xf0\x9f", b"\xe2\x82\xff", "\ufffd".encode()])
def test_invalid_bytes_are_not_held_back_for_ever(tokenizer: PreTrainedTokenizerBase, data: bytes) -> None:
    prompt, output = encode(tokenizer, "the"), byte_tokens(tokenizer, data * 50)
    stream = TextStream(tokenizer, prompt_ids=prompt)
    num_held = 0
    for token_id in output:
        num_held = 0 if stream.push(token_id).text else num_held + 1
        assert num_held < 8
    stream.finish()
    assert stream.text == in_context(tokenizer, prompt, output)


def test_text_before_and_after_invalid_bytes_is_kept() -> None:
    token_ids = byte_tokens(BYTE_LEVEL, b"a\xffb\xf0\x9fc" + b"\xff" * 20 + "😀".encode())
    stream = TextStream(BYTE_LEVEL, prompt_ids=[])
    assert "".join(stream_all(stream, token_ids)) == "a\ufffdb\ufffdc" + "\ufffd" * 20 + "😀"


@both_tokenizers
@pytest.mark.parametrize("data", ["the tea 日本 😀 ".encode(), b"\xff", b"\x80a", b"\xf0\x9f", b""])
def test_cost_of_a_token_does_not_grow(tokenizer: PreTrainedTokenizerBase, data: bytes) -> None:
    special = token(tokenizer, "</s>")
    token_ids = [*encode(tokenizer, "the")[:1], *([*byte_tokens(tokenizer, data), special] * 300)]
    counting = CountingTokenizer(tokenizer)
    stream = TextStream(counting, prompt_ids=token_ids)  # type: ignore[arg-type]
    for token_id in token_ids:
        num_calls = len(counting.calls)
        stream.push(token_id)
        assert len(counting.calls) - num_calls <= 40
    assert max(counting.calls) <= 64


@both_tokenizers
def test_tokens_that_the_tokenizer_does_not_know_give_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    padded = len(tokenizer) + 7  # the head of many models has more rows than the tokenizer has tokens
    token_ids = [padded, *encode(tokenizer, "the"), padded]
    assert "".join(stream_all(TextStream(tokenizer, prompt_ids=[]), token_ids)) == "the"


# Stop texts


def first_complete(text: str, stop: Sequence[str]) -> str | None:
    """Returns `text` up to the stop text that is complete first, read letter by letter, or None."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


@given(
    text=st.text(alphabet="abc😀", max_size=30),
    stop=st.lists(st.text(alphabet="abc😀", min_size=1, max_size=5), max_size=4),
    as_bytes=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_output_ends_before_the_first_complete_stop_text(text: str, stop: list[str], as_bytes: bool) -> None:
    token_ids = byte_tokens(BYTE_LEVEL, text.encode()) if as_bytes else encode(BYTE_LEVEL, text)
    stream = TextStream(BYTE_LEVEL, prompt_ids=[], stop=stop)
    expected = first_complete(text, stop)
    for token_id in token_ids:
        delta = stream.push(token_id)
        assert delta.stopped == stream.stopped
        if delta.stopped:
            break
    if expected is None:
        assert not stream.stopped
        stream.finish()
        assert stream.text == text
    else:
        assert stream.stopped
        assert stream.text == expected


@both_tokenizers
def test_stop_text_over_token_borders_is_held_back_and_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, prompt_ids=[], stop=["STOP"])
    deltas = [stream.push(token_id) for token_id in byte_tokens(tokenizer, b"aSTOP")]
    assert [delta.text for delta in deltas] == ["a", "", "", "", ""]
    assert [delta.stopped for delta in deltas] == [False, False, False, False, True]
    assert stream.text == "a"


def test_nothing_comes_after_a_stop_text() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=[], stop=["b"])
    for token_id in byte_tokens(BYTE_LEVEL, b"ab"):
        stream.push(token_id)
    assert stream.push(byte_token(BYTE_LEVEL, ord("c"))) == TextDelta("", stopped=True)
    assert stream.finish() == ""
    assert stream.text == "a"


def test_partial_stop_text_is_given_out_once_it_cannot_go_on() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=[], stop=["aab"])
    assert [stream.push(token_id).text for token_id in byte_tokens(BYTE_LEVEL, b"aaac")] == [
        "",
        "",
        "a",
        "aac",
    ]


def test_partial_stop_text_is_given_out_at_the_end() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=[], stop=["STOP"])
    assert stream_all(stream, byte_tokens(BYTE_LEVEL, b"aSTO")) == ["a", "", "", "", "STO"]
    assert not stream.stopped


def test_final_token_gives_out_all_that_is_left() -> None:
    *first, last = byte_tokens(BYTE_LEVEL, b"ST\xf0\x9f")
    stream = TextStream(BYTE_LEVEL, prompt_ids=[], stop=["STOP"])
    for token_id in first:
        stream.push(token_id)
    assert stream.push(last, final=True) == TextDelta("ST\ufffd", stopped=False)
    assert stream.finish() == ""


def test_final_token_can_meet_a_stop_text() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=[], stop=["ab"])
    first, last = byte_tokens(BYTE_LEVEL, b"ab")
    stream.push(first)
    assert stream.push(last, final=True) == TextDelta("", stopped=True)


def test_stop_text_that_was_held_back_with_an_incomplete_character_is_cut_at_the_end() -> None:
    tokenizer = copy.deepcopy(BYTE_LEVEL)
    tokenizer.add_tokens(["END\ufffd"])  # one token whose text ends as an incomplete character's does
    stream = TextStream(tokenizer, prompt_ids=[], stop=["END"])
    stream.push(token(tokenizer, "END\ufffd"))
    assert stream.finish() == ""
    assert stream.stopped


def test_stop_text_in_the_prompt_does_not_count() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=byte_tokens(BYTE_LEVEL, b"STOP ST"), stop=["STOP"])
    assert "".join(stream_all(stream, byte_tokens(BYTE_LEVEL, b"OP"))) == "OP"
    assert not stream.stopped


def test_a_stop_text_does_not_count_before_min_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    token_ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "axbyaxbz"]
    for min_tokens, expected in ((0, "a"), (1, "a"), (2, "ax"), (3, "axbya"), (6, "axbya"), (7, "axbyaxbz")):
        stream = TextStream(
            tokenizer, prompt_ids=(), stop=("xb",) if min_tokens != 2 else ("b",), min_tokens=min_tokens
        )
        text = ""
        for token_id in token_ids:
            delta = stream.push(token_id)
            text += delta.text
            if delta.stopped:
                break
        assert (text if stream.stopped else text + stream.finish()) == expected


def test_what_was_held_back_is_given_out_where_a_stop_token_ends_the_text() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=(), stop=["STOP"])
    deltas = [stream.push(token_id).text for token_id in byte_tokens(BYTE_LEVEL, b"aST")]
    assert (deltas, stream.finish()) == (["a", "", ""], "ST")


def test_a_stop_text_that_is_asked_for_is_the_end_of_the_text() -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=(), stop=["STOP"], include_stop=True)
    deltas = [stream.push(token_id) for token_id in byte_tokens(BYTE_LEVEL, b"aSTOPb")]
    assert [delta.text for delta in deltas] == ["a", "", "", "", "STOP", ""]
    assert [delta.stopped for delta in deltas] == [False] * 4 + [True] * 2


# Special tokens in stop texts

PIECES = ("on", "<|user|>", " on", "</s>", "<s>", "en")


@both_tokenizers
@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("<|user|>", "on"),
        ("</s>", "on<|user|> on"),
        ("</s><s>e", "on<|user|> on"),
        (" on</s>", "on<|user|>"),
        ("on<|user|> on</s>", ""),
        ("<|user|></s>", None),
        ("<s>n", None),
    ],
)
def test_special_tokens_in_a_stop_text_are_met_whether_they_are_shown_or_not(
    tokenizer: PreTrainedTokenizerBase, shown: bool, stop: str, expected: str | None
) -> None:
    output: list[int] = []
    for piece in PIECES:
        output += [token(tokenizer, piece)] if piece in SPECIAL else byte_tokens(tokenizer, piece.encode())
    prompt = byte_tokens(tokenizer, b"n")
    stream = TextStream(tokenizer, prompt_ids=prompt, stop=["never", stop], skip_special_tokens=not shown)
    text = "".join(stream_all(stream, output))
    assert stream.stopped == (expected is not None)
    expected = "".join(PIECES) if expected is None else expected
    for piece in () if shown else SPECIAL:
        expected = expected.replace(piece, "")
    assert text == stream.text == expected


@both_tokenizers
@pytest.mark.parametrize("final", [False, True])
def test_an_incomplete_character_before_a_special_token_that_is_a_stop_text_is_kept(
    tokenizer: PreTrainedTokenizerBase, final: bool
) -> None:
    prompt, output = encode(tokenizer, "n"), [*encode(tokenizer, "on"), *byte_tokens(tokenizer, b"\xe2\x82")]
    stream = TextStream(tokenizer, prompt_ids=prompt, stop=["</s>", "n</s>"])
    text = "".join(stream.push(token_id).text for token_id in output)
    text += stream.push(token(tokenizer, "</s>"), final=final).text
    assert text == in_context(tokenizer, prompt, output)
    assert stream.stopped


@both_tokenizers
@pytest.mark.parametrize("shown", [False, True])
def test_a_special_token_s_text_spelled_by_other_tokens_is_a_stop_text_too(
    tokenizer: PreTrainedTokenizerBase, shown: bool
) -> None:
    stream = TextStream(tokenizer, prompt_ids=(), stop=["</s>"], skip_special_tokens=not shown)
    assert "".join(stream_all(stream, byte_tokens(tokenizer, b"on</s>en"))) == "on"
    assert stream.stopped


@pytest.mark.parametrize(("min_tokens", "stopped"), [(1, True), (2, False)])
def test_a_special_token_in_a_stop_text_does_not_count_before_min_tokens(min_tokens: int, stopped: bool) -> None:
    stream = TextStream(BYTE_LEVEL, prompt_ids=(), stop=["</s>"], min_tokens=min_tokens)
    output = [*byte_tokens(BYTE_LEVEL, b"o"), token(BYTE_LEVEL, "</s>"), *byte_tokens(BYTE_LEVEL, b"n")]
    assert "".join(stream_all(stream, output)) == ("o" if stopped else "on")
    assert stream.stopped == stopped
