"""Reading generation_config.json, and its rules beside transformers' processors."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor, SequenceBiasLogitsProcessor

from hermes_async.config import SamplingParams
from hermes_async.errors import CheckpointError, RequestError
from hermes_async.modeling.generation_config import GenerationConfig, read_generation_config
from hermes_async.modeling.sampling import Sampler
from hermes_async.modeling.token_rules import TokenRules
from hermes_async.storage.checkpoint import Checkpoint

VOCAB_SIZE = 12


def read(path: Path, text: str, config: dict[str, Any] | None = None) -> GenerationConfig:
    """What is read from a folder with that text in its generation_config.json; without one if it is empty."""
    if text:
        (path / "generation_config.json").write_text(text)
    checkpoint = Checkpoint(path, config or {}, {})
    return read_generation_config(checkpoint, eos_token_id=2, vocab_size=VOCAB_SIZE)


# Reading


def test_null_and_unknown_fields_say_nothing(tmp_path: Path) -> None:
    names = [*GenerationConfig.__dataclass_fields__, "temperature", "do_sample", "num_beams", "sequence_bias"]
    text = json.dumps(dict.fromkeys(names) | {"chat_format": "chatml", "lang_to_id": {"<|en|>": 5}, "use_cache": False})
    assert read(tmp_path, text) == GenerationConfig(eos_token_ids=frozenset([2]))


def test_ids_outside_of_the_vocabulary_are_no_hindrance_where_transformers_ignores_them(tmp_path: Path) -> None:
    says = {"eos_token_id": [3, -1, 99], "suppress_tokens": [-1, 4, 99, 2**70], "begin_suppress_tokens": [12, 11]}
    config = read(tmp_path, json.dumps(says))
    assert config.eos_token_ids == {3, -1, 99}
    assert (config.suppress_tokens, config.begin_suppress_tokens) == ((4,), (11,))


@pytest.mark.parametrize("place", ["", "decoder", "generator", "text_config"])
def test_config_json_is_read_where_there_is_no_other_file(tmp_path: Path, place: str) -> None:
    says: dict[str, Any] = {"min_length": 7, "do_sample": True, "top_p": 0.5}
    config = read(tmp_path, "", {place: says, "min_length": None} if place else says)
    assert config.held == ("min_length",)
    assert config.sampling["top_p"] == 0.5
    assert read(tmp_path, "{}", says).held == ()


WRONG: dict[str, list[Any]] = {
    "eos_token_id": ["</s>", 1.5, True, [None], {"a": 1}, [0] * (2**18 + 1)],
    "forced_bos_token_id": ["a", 1.5, True, [3], -1, 12, 2**70],
    "forced_eos_token_id": ["a", [1.5], [[3]], -1, [3, 12]],
    "suppress_tokens": [3, "a", ["a"], [1.5], [True], {"3": 1}, [0] * (2**18 + 1)],
    "begin_suppress_tokens": [3, [None], [[3]]],
    "bad_words_ids": [3, [3], [[]], [["a"]], [[12]], [[-1]], [[3], None], [[0] * 2**17] * 3],
    "sequence_bias": [{"3": 1.0}, [3], [[3, 1.0]], [[[3], "a"]], [[[3], True]], [[[12], 1.0]], [[[3], math.nan]],
                      [[[3], math.inf]], [[[3], 1.0, 2.0]], [[[], 1.0]]],
    "no_repeat_ngram_size": [-1, 1.5, "3", True, 1025, 2**70],
    "encoder_no_repeat_ngram_size": [-1, [3]],
    "encoder_repetition_penalty": [0, -1.0, math.nan, math.inf, "1", True, 10**400],
    "exponential_decay_length_penalty": [3, [3], [3, 1.0, 2], ["a", 1.0], [1.5, 1.1], [-1, 1.1], [3, math.nan], [3, 0]],
    "remove_invalid_values": [1, "true"],
    "min_length": [-1, 1.5, "3", math.nan],
    "min_new_tokens": [-1, True],
    "max_length": [0, -1, "a", 20.5],
    "max_new_tokens": [0, [3]],
    "do_sample": [1, "yes"],
    "temperature": [-0.1, math.nan, math.inf, "hot", 1e7],
    "top_p": [-0.1, 1.1, math.nan],
    "top_k": [-1, 1.5, "all"],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, -1, math.nan, "1", 10**300],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values],
                         ids=lambda value: f"{value!r:.20}")  # fmt: skip
def test_what_it_must_not_say_is_refused_by_file_and_field(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name}") as caught:
        read(tmp_path, json.dumps({name: value}))
    assert caught.value.path == tmp_path / "generation_config.json"
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(max_size=5), items, max_size=2),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*WRONG, "num_beams", "watermarking_config"]), _JSON, max_size=4))
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("any")
    try:
        config = read(path, json.dumps(entries))
    except CheckpointError as error:
        assert re.search(r"generation_config\.json", str(error))
        return
    rules = TokenRules(config, [1, 2], max_length=4, vocab_size=VOCAB_SIZE)
    params = config.resolve(SamplingParams.from_model(seed=0))
    sampler = Sampler(params, [1, 2], eos_token_ids=config.eos_token_ids, vocab_size=VOCAB_SIZE, rules=rules)
    try:
        assert 0 <= sampler.sample(torch.randn(VOCAB_SIZE)).token_id < VOCAB_SIZE
    except RequestError as error:
        assert "every token is suppressed" in str(error)


# Rules


def rules_of(sequence_ids: list[int], *, max_length: int = 100, **says: Any) -> TokenRules:
    return TokenRules(GenerationConfig(**says), sequence_ids, max_length=max_length, vocab_size=VOCAB_SIZE)


sequences = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30)
words = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3), min_size=1, max_size=8)


@given(sequences, sequences, st.integers(1, 5))
def test_n_grams_are_banned_as_by_transformers(prompt: list[int], answer: list[int], size: int) -> None:
    rules = rules_of(prompt, no_repeat_ngram_size=size)
    for token_id in answer:
        rules.advance(token_id)
    scores = torch.randn(VOCAB_SIZE)
    expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor([prompt + answer]), scores[None])[0]
    assert rules.restrict(scores.clone()).equal(expected)


@given(sequences, words)
def test_words_are_banned_and_favoured_as_by_transformers(sequence: list[int], chosen: list[list[int]]) -> None:
    scores, ids = torch.randn(VOCAB_SIZE), torch.tensor([sequence])
    banned = rules_of(sequence, bad_words_ids=tuple(map(tuple, chosen))).restrict(scores.clone())
    assert banned.equal(NoBadWordsLogitsProcessor(chosen)(ids, scores[None])[0])
    biases = {tuple(word): float(idx) - 2.5 for idx, word in enumerate(chosen)}
    favoured = rules_of(sequence, sequence_bias=biases).favour(scores.clone())
    assert torch.allclose(favoured, SequenceBiasLogitsProcessor(dict(biases))(ids, scores[None])[0])


def test_a_growing_end_does_not_leave_the_range_of_floats() -> None:
    rules = rules_of([1], eos_token_ids=frozenset([3]), exponential_decay_length_penalty=(0, 1e6))
    for _ in range(100):
        rules.advance(5)
    scores = rules.restrict(torch.full((VOCAB_SIZE,), 0.5))
    assert scores.isfinite().all()
    assert scores.argmax() == 3


def test_rules_for_encoders_look_at_the_input_of_the_encoder() -> None:
    config = GenerationConfig(encoder_no_repeat_ngram_size=2, encoder_repetition_penalty=2.0, forced_bos_token_id=9)
    rules = TokenRules(config, [0], max_length=20, vocab_size=VOCAB_SIZE, encoder_ids=[4, 5, 6])
    favoured = rules.favour(torch.ones(VOCAB_SIZE))
    assert favoured.nonzero()[:, 0].tolist() == list(range(VOCAB_SIZE))
    assert [idx for idx in range(VOCAB_SIZE) if favoured[idx] > 1] == [4, 5, 6]
    assert rules.restrict(torch.zeros(VOCAB_SIZE)).argmax() == 9  # after the decoder's start
    rules.advance(9)
    rules.advance(5)
    assert rules.restrict(torch.zeros(VOCAB_SIZE)).isinf().nonzero()[:, 0].tolist() == [6]


def test_a_copy_goes_on_by_itself() -> None:
    rules = rules_of([1, 2], no_repeat_ngram_size=1)
    copied = copy.deepcopy(rules)
    for token_id in range(3, 10):
        copied.advance(token_id)
    assert rules.restrict(torch.zeros(VOCAB_SIZE)).isinf().sum() == 2
    assert copied.restrict(torch.zeros(VOCAB_SIZE)).isinf().sum() == 9


class _Digits:
    """Stands for a grammar that allows the tokens 4 to 6 alone."""

    def constrain(self, scores: torch.Tensor, *, keep_going: bool) -> torch.Tensor:
        allowed = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        allowed[4:7] = True
        return scores.masked_fill(~allowed, -math.inf)

    def advance(self, token_id: int) -> None:
        assert 4 <= token_id <= 6


def test_a_grammar_has_precedence_where_the_rules_leave_nothing_that_it_allows() -> None:
    rules = rules_of([1], suppress_tokens=(6,), no_repeat_ngram_size=1, forced_eos_token_id=(3,), max_length=6)
    grammar: Any = _Digits()
    params = SamplingParams(temperature=0, max_tokens=5)
    sampler = Sampler(params, [1], eos_token_ids=frozenset([3]), vocab_size=VOCAB_SIZE, grammar=grammar, rules=rules)
    logits = torch.arange(VOCAB_SIZE, dtype=torch.float32)
    assert [sampler.sample(logits).token_id for _ in range(5)] == [5, 4, 6, 6, 6]
