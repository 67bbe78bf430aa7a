"""Grammars alone: that what they let through matches, whatever the tokenizer, and that hostile ones cost little."""

from __future__ import annotations

import copy
import json
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import hermes_async
from hermes_async.config import SamplingParams, StructuredOutputs
from hermes_async.errors import RequestError
from hermes_async.modeling.sampling import Sampler
from hermes_async.modeling.structured_outputs import Grammar, GrammarCompiler

DEMO = Path(hermes_async.__file__).parent / "demo" / "model"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "é", None, 3.5]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False},
    },
    "$ref": "#/$defs/node",
}
PATTERN = r"[a-c]{1,3}(, \d){0,2}[.!é]"
CHOICE = ["yes", "no", "yesterday", 'a "b"\n\\', "漢 🙂"]


@cache
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


def byte_fallback_tokenizer() -> PreTrainedTokenizerBase:
    """As of Llama 2: letters, and a token for each byte of what is no letter."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(code) for code in range(33, 127)]
    backend = Tokenizer(
        models.BPE({word: idx for idx, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def grammar(end_ids: tuple[int, ...] = (0,), vocab_size: int = 2048, **asked: Any) -> Grammar:
    return GrammarCompiler(demo_tokenizer(), vocab_size).compile(StructuredOutputs(**asked), end_ids)


def answer(sampler: Sampler, vocab_size: int, end_ids: set[int], most: int = 400) -> list[int]:
    """The tokens that a model without preferences writes, except that it likes an end and few tokens else."""
    token_ids: list[int] = []
    logits = torch.zeros(vocab_size)
    logits[list(end_ids)] = 3.0
    while len(token_ids) < most:
        token_ids.append(sampler.sample(logits).token_id)
        if token_ids[-1] in end_ids:
            return token_ids[:-1]
    raise AssertionError("no end")


def check(asked: dict[str, Any], text: str) -> None:
    """Whether a text is what was asked for, by other means than the grammar."""
    if "choice" in asked:
        assert text in asked["choice"]
    elif "regex" in asked:
        assert re.fullmatch(asked["regex"], text)
    else:
        value = json.loads(text)
        jsonschema.validate(value, asked.get("json", {"type": "object"}))


ASKED: list[dict[str, Any]] = [{"json": PERSON}, {"json": TREE}, {"regex": PATTERN}, {"choice": CHOICE}]


@pytest.mark.parametrize("asked", ASKED, ids=["person", "tree", "regex", "choice"])
@pytest.mark.parametrize("make", [demo_tokenizer, byte_fallback_tokenizer], ids=["byte-level", "byte-fallback"])
def test_what_ends_matches(make: Any, asked: dict[str, Any]) -> None:
    tokenizer = make()
    vocab_size = len(tokenizer) + 50  # padded
    compiler = GrammarCompiler(tokenizer, vocab_size)
    end_ids = {tokenizer.eos_token_id}
    texts = set()
    for seed in range(12):
        params = SamplingParams(
            seed=seed, top_p=0.98 if seed % 2 else 1, presence_penalty=seed % 3 / 2, logit_bias={40: 2}
        )
        sampler = Sampler(
            params, [5], eos_token_ids=frozenset(end_ids), vocab_size=vocab_size,
            grammar=compiler.compile(StructuredOutputs(**asked), end_ids),
        )  # fmt: skip
        text = tokenizer.decode(answer(sampler, vocab_size, end_ids), clean_up_tokenization_spaces=False)
        check(asked, text)
        texts.add(text)
    assert len(texts) > 2


def test_white_space_between_tokens_of_json_is_bounded_and_indented_json_passes() -> None:
    tokenizer, value = demo_tokenizer(), {"name": "ab", "age": 3, "kind": None, "tags": [True, False]}

    def may_come(text: str) -> bool:
        state = grammar(json=PERSON)
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            if token_id not in allowed(state):
                return False
            state.advance(token_id)
        return True

    for indent in (None, 1, 2, 4, "\t"):
        assert may_come(json.dumps(value, indent=indent, ensure_ascii=False))
    assert may_come(json.dumps(value, separators=(",", ":")))
    for white_space in ("  ", "\n\n", "\n" + " " * 17, "\n \n", "\t"):
        for before in ("{", '{"name"', '{"name":', '{"name":"ab"', '{"name":"ab",'):
            assert may_come(before) and not may_come(before + white_space)
    assert not may_come(" ") and not may_come(json.dumps(value) + " ")


def allowed(state: Grammar, *, keep_going: bool = False, vocab_size: int = 2048) -> set[int]:
    scores = state.constrain(torch.zeros(vocab_size), keep_going=keep_going)
    return {*(scores[:vocab_size] == 0).nonzero().flatten().tolist()}


def test_an_end_comes_only_after_a_whole_text_and_is_forced_when_nothing_else_can() -> None:
    ab = demo_tokenizer().encode("ab", add_special_tokens=False)
    state = grammar(end_ids=(0, 7), regex="(ab)+")
    assert allowed(state) & {0, 7} == set()
    for token_id in ab:
        state.advance(token_id)
    assert {0, 7} < allowed(state)
    assert allowed(state, keep_going=True) & {0, 7} == set()
    state = grammar(end_ids=(0, 7), choice=["ab"])
    for token_id in ab:
        state.advance(token_id)
    assert allowed(state) == allowed(state, keep_going=True) == {0, 7}
    state.advance(7)
    assert allowed(state) == {0, 7}


def test_a_grammar_does_not_touch_the_reported_logprobs_or_the_logits() -> None:
    params = SamplingParams(temperature=0, logprobs=2)
    plain = Sampler(params, [5], eos_token_ids=frozenset({0}), vocab_size=2048)
    constrained = Sampler(params, [5], eos_token_ids=frozenset({0}), vocab_size=2048, grammar=grammar(regex="[0-9]+"))
    logits = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    token, chosen = plain.sample(logits), constrained.sample(logits)
    assert torch.equal(logits, before)
    assert demo_tokenizer().decode([chosen.token_id]).isdecimal() and chosen.token_id != token.token_id
    assert token.top_logprobs is not None and chosen.top_logprobs is not None
    assert token.top_logprobs.items() <= chosen.top_logprobs.items()
    assert chosen.logprob == float(logits.log_softmax(-1)[chosen.token_id])


def test_a_copy_goes_its_own_way() -> None:
    state = grammar(choice=["ab", "cd"])
    copied = copy.deepcopy(state)
    for token_id in demo_tokenizer().encode("ab", add_special_tokens=False):
        state.advance(token_id)
    assert allowed(state) == {0}
    assert allowed(copied) == allowed(grammar(choice=["ab", "cd"]))


def test_special_tokens_and_tokens_without_text_are_never_part_of_an_answer() -> None:
    state = grammar(vocab_size=2100, end_ids=(5,), regex=r"[\s\S]*")
    assert allowed(state, vocab_size=2100).isdisjoint({0, *range(2048, 2100)})
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("the", special=True)]})
    token_id = tokenizer.convert_tokens_to_ids("the")
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    state = compiler.compile(StructuredOutputs(regex=r"[a-z]*"), {0})
    assert token_id not in allowed(state, vocab_size=len(tokenizer))


def test_fewer_logits_than_tokens() -> None:
    state = grammar(vocab_size=1000, regex="[a-z]+")
    assert allowed(state, vocab_size=1000)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ByT5Tokenizer, "needs a tokenizer of the tokenizers library, not ByT5Tokenizer"),
        (word_tokenizer, "cannot be used with this model's tokenizer"),
        (lambda: None, "the checkpoint has none"),
    ],
    ids=["python", "words", "none"],
)
def test_tokenizers_that_cannot_be_used(make: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        GrammarCompiler(make(), 300).compile(StructuredOutputs(regex="a"), {1})


def test_a_model_without_an_end() -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        grammar(end_ids=(), regex="a")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(RequestError, match=r"hermes-async\[structured\]"):
        grammar(regex="a")


@pytest.mark.parametrize(
    "asked",
    [
        {"json": "{"},
        {"json": "[]"},
        {"json": "NaN"},
        {"json": '{"minimum": NaN}'},
        {"json": '{"const": "\\ud800"}'},
        {"json": {"type": "strange"}},
        {"json": {"type": "array", "uniqueItems": True}},
        {"json": {"type": "string", "format": "strange"}},
        {"json": {"x-guidance": {"lenient": True}}},
        {"json": {"enum": []}},
        {"json": {"allOf": [{"type": "string"}, {"type": "object"}]}},
        {"regex": "("},
        {"regex": r"(a)\1"},
        {"regex": "a(?=b)"},
        {"regex": r"[^\s\S]"},
        {"regex": "(" * 3000},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_compiled(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        grammar(**asked)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "reference", ["http://127.0.0.1:{port}/a.json", "//127.0.0.1:{port}/a", "file:///etc/passwd", "a.json", "#anchor"]
)
def test_references_never_leave_the_schema(reference: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        reference = reference.format(port=server.getsockname()[1])
        for schema in ({"$ref": reference}, {"$id": reference, "properties": {"a": {"$ref": "#/$defs/b"}}}):
            with pytest.raises(RequestError, match=r"\$ref"):
                grammar(json=schema)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_hostile_grammars_end_with_an_error_or_are_cheap() -> None:
    """In 256 MiB and two minutes of CPU time, all of them together."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.modeling.hostile_grammars"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert all(len(outcome) < 500 for outcome in outcomes.values())
    refused = {name for name, outcome in outcomes.items() if outcome != "ok"}
    assert {"deep", "chain", "doubling", "itself", "ambiguous", "patterns at once", "multiples", "repeats"} <= refused
    assert {"huge enum", "longest chain", "few patternProperties", "counts", "catastrophic", "choices"}.isdisjoint(
        refused
    )
