"""Keeps an answer within a grammar: a JSON schema, a regular expression, or a choice of texts (llguidance)."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hermes_async.config import StructuredOutputs
from hermes_async.errors import RequestError
from hermes_async.foreign_errors import first_line
from hermes_async.modeling.schema_limits import check_schema

if TYPE_CHECKING:  # an extra
    from llguidance import LLMatcher, LLTokenizer

_JSON_OPTIONS: Any = {
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r"\x20|\x0A[\x20\x09]{0,16}",  # bounded: a model may write spaces for ever
}
_LIMITS: Any = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,  # at most 2 KiB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_FREE_SECONDS = 2.0
_SECONDS_PER_TOKEN = 0.02
"""CPU time that masks may take: about a thousand times what usual grammars need, with a vocabulary of 128k."""

_MAX_REASON = 300
_SAMPLES = ('{"a": [1, -2.5e3, true, null], "b c": "x\\n\\u00e9"}\n', "yes, NO; it's 100%.", "é ü 漢字 🙂")
"""Texts whose tokens must decode to themselves."""


class Grammar:
    """What may still come in one request's answer. Plain state: `copy.deepcopy` gives an independent one.

    Args:
        ordinary: Bool [vocab_size], the tokens that the text may be made of.
        end_ids: The tokens that end the answer.
    """

    def __init__(self, matcher: LLMatcher, num_bits: int, ordinary: torch.Tensor, end_ids: torch.Tensor) -> None:
        self._ordinary = ordinary
        self._end_ids = end_ids
        # All mutable state: how far the answer is, the bits of the last mask, and the CPU time against its bound.
        self._matcher = matcher
        self._bits = np.zeros(-(-num_bits // 32), dtype=np.int32)
        self._seconds = 0.0
        self._seconds_allowed = _FREE_SECONDS

    def __deepcopy__(self, memo: dict[int, Any]) -> Grammar:
        copied = copy.copy(self)
        copied._matcher = self._matcher.deep_copy()
        copied._bits = self._bits.copy()
        return copied

    def constrain(self, scores: torch.Tensor, *, keep_going: bool) -> torch.Tensor:
        """Returns `scores` [vocab_size] with minus infinity for all tokens that may not come next.

        A token that ends the answer may come only where the text is complete.

        Args:
            keep_going: No end, as long as anything else can follow.

        Raises:
            RequestError: The grammar exceeded a limit.
        """
        allowed = self._mask()
        if self._matcher.is_accepting() and not (keep_going and bool(allowed.any())):
            allowed[self._end_ids] = True
        return scores.masked_fill(~allowed, -torch.inf)

    def advance(self, token_id: int) -> None:
        """Appends a token that `constrain` has allowed.

        Raises:
            RequestError: The grammar exceeded a limit.
        """
        if token_id in self._end_ids:
            return
        started = time.thread_time()
        self._matcher.consume_token(token_id)
        self._check(time.thread_time() - started)
        self._seconds_allowed += _SECONDS_PER_TOKEN

    def check(self) -> None:
        """Computes the first masks: at the start, and after the text that is certain to come.

        Raises:
            RequestError: Nothing matches the grammar, or it exceeds a limit.
        """
        self._matcher.compute_bitmask()
        if self._matcher.get_error().startswith("NoExtension"):
            raise RequestError("structured_outputs: nothing can match")
        begun = copy.deepcopy(self)
        may_begin = bool(begun._mask().any())
        if not may_begin and not begun._matcher.is_accepting():
            raise RequestError("structured_outputs: no text of this model's tokens can match")
        begun._matcher.consume_tokens(begun._matcher.compute_ff_tokens())
        begun._mask()

    def _mask(self) -> torch.Tensor:
        """The tokens that continue the text, bool [vocab_size]."""
        started = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check(time.thread_time() - started)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits)[: len(self._ordinary)].view(torch.bool)
        return allowed.logical_and_(self._ordinary)

    def _check(self, seconds: float) -> None:
        self._seconds += seconds
        _check_error(self._matcher)
        if self._seconds > self._seconds_allowed:
            raise RequestError("structured_outputs: the grammar takes too much time")


class WholeText:
    """Tells whether a text matches as a whole. Each text of a series usually begins with the one before."""

    def __init__(self, matcher: LLMatcher) -> None:
        # All mutable state. The matcher's tokens are bytes; `_data` are those that it has taken.
        self._matcher = matcher
        self._data = b""

    def __call__(self, text: str) -> bool:
        """Whether `text` is complete.

        Raises:
            RequestError: The grammar exceeded a limit.
        """
        data = text.encode()
        if not data.startswith(self._data):
            self._matcher.reset()
            self._data = b""
        self._matcher.consume_tokens(list(data[len(self._data) :]))
        self._data = data
        _check_error(self._matcher)
        return self._matcher.is_accepting()


class GrammarCompiler:
    """Makes the grammars of one model's requests. Any thread may call it.

    Args:
        tokenizer: The model's; not changed. None if it has none.
        vocab_size: The number of logits of a position, which may be more or less than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # All mutable state: the library's form of the tokenizer, which the first request makes. It takes some seconds,
        # and about 100 MiB with a vocabulary of 128k.
        self._adapted: LLTokenizer | None = None
        self._ordinary = torch.empty(0)
        self._lock = threading.Lock()

    def compile(self, asked: StructuredOutputs, end_ids: Iterable[int]) -> Grammar:
        """The grammar of one answer.

        Args:
            end_ids: The tokens that end the answer.

        Raises:
            RequestError: The library is missing, the tokenizer cannot be used, or what is asked for cannot be compiled,
                or is too large.
        """
        ends = torch.tensor(sorted(end_ids), dtype=torch.long)
        if not len(ends):
            raise RequestError("structured_outputs: the model has no end-of-sequence token; give stop_token_ids")
        adapted = self._adapt()
        matcher = _matcher(adapted, asked)
        ordinary = self._ordinary.clone()
        ordinary[ends] = False
        grammar = Grammar(matcher, adapted.vocab_size, ordinary, ends)
        grammar.check()
        return grammar

    def whole_text(self, asked: StructuredOutputs) -> WholeText:
        """For stop texts, which end an answer only after a text that matches.

        Raises:
            RequestError: As `compile`.
        """
        self._adapt()  # raises if the library is missing
        from llguidance import LLTokenizer

        return WholeText(_matcher(LLTokenizer("byte"), asked))

    def _adapt(self) -> LLTokenizer:
        with self._lock:
            if self._adapted is None:
                self._adapted = _adapted(self._tokenizer, self._vocab_size)
                self._ordinary = torch.ones(self._vocab_size, dtype=torch.bool)
                special = [idx for idx in self._tokenizer.all_special_ids if idx < self._vocab_size]  # type: ignore[union-attr]
                self._ordinary[special] = False
            return self._adapted


def _adapted(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> LLTokenizer:
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise RequestError(
            f"structured_outputs needs llguidance ({error}); install it with: pip install 'hermes-async[structured]'"
        ) from error
    if tokenizer is None:
        raise RequestError("structured_outputs needs a tokenizer, and the checkpoint has none")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RequestError(
            f"structured_outputs needs a tokenizer of the tokenizers library, not {type(tokenizer).__name__}"
        )
    num_tokens = max(vocab_size, 1 + max(tokenizer.get_vocab().values(), default=0))
    eos_token_id = tokenizer.eos_token_id
    try:
        adapted = from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=0 if eos_token_id is None else eos_token_id)
    except ValueError as error:
        raise RequestError(
            f"structured_outputs cannot be used with this model's tokenizer: {first_line(error):.{_MAX_REASON}}"
        ) from error
    for sample in _SAMPLES:
        token_ids = adapted.tokenize_str(sample)
        decoded = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        if decoded != sample or adapted.decode_bytes(token_ids) != sample.encode():
            raise RequestError(
                "structured_outputs cannot be used with this model's tokenizer: its tokens are not the bytes of texts"
            )
    return adapted


def _matcher(tokenizer: LLTokenizer, asked: StructuredOutputs) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, _grammar(asked), log_level=0, limits=LLParserLimits(**_LIMITS))
    if matcher.is_error():
        raise RequestError(f"structured_outputs cannot be compiled: {_reason(matcher.get_error())}")
    return matcher


def _grammar(asked: StructuredOutputs) -> str:
    """The library's form of what is asked for."""
    from llguidance import LLMatcher

    if asked.regex is not None:
        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    schema: Any = {"type": "object"}
    if asked.json is not None:
        try:
            schema = json.loads(asked.json)  # type: ignore[arg-type]
        except (ValueError, RecursionError) as error:
            raise RequestError(f"structured_outputs.json is not JSON: {first_line(error):.{_MAX_REASON}}") from error
        if not isinstance(schema, dict):
            raise RequestError("structured_outputs.json must be a JSON object")
        try:
            check_schema(schema)
        except RecursionError as error:
            raise RequestError("structured_outputs.json is nested too deeply") from error
    try:
        text = json.dumps(schema, allow_nan=False)  # what was checked, whatever the text was
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise RequestError(f"structured_outputs.json is not JSON: {first_line(error):.{_MAX_REASON}}") from error


def _check_error(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise RequestError(f"structured_outputs: the grammar cannot go on: {_reason(matcher.get_error())}")


def _reason(error: str) -> str:
    return " ".join(error.split("<", 1)[0].split())[:_MAX_REASON] or "unknown"
