"""Applies to one request's logits what the checkpoint's generation_config.json says of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import EncoderRepetitionPenaltyLogitsProcessor, InfNanRemoveLogitsProcessor

from hermes_async.modeling.generation_config import GenerationConfig

_LARGEST_GROWTH = 1e30
"""The most that an exponential penalty multiplies a logit by, in the range of float32."""


class TokenRules:
    """The rules of a checkpoint for the tokens of one sequence. Plain state: `copy.deepcopy` gives independent rules.

    The order is that of transformers' `generate`. `favour` comes before a request's own penalties: biases of sequences,
    and the penalty of tokens that the input lacks. `restrict` comes after them: repeated n-grams, bad words, no end
    before the least length, the forced first token, the forced last token, invalid values, the growing
    logit of the end, suppressed tokens, and tokens that are suppressed at the beginning.

    Args:
        config: What the checkpoint says.
        sequence_ids: The tokens before the first one that is chosen: the prompt; of an encoder-decoder, what its
            decoder begins with. Positions count from the first of these.
        max_length: The most tokens of the sequence.
        vocab_size: The number of logits of a position.
        own_minimum: The request has a least length of its own, so that the checkpoint's does not hold.
        encoder_ids: The input that rules for `encoder_...` look at; None for `sequence_ids`.
    """

    def __init__(
        self,
        config: GenerationConfig,
        sequence_ids: Sequence[int],
        *,
        max_length: int,
        vocab_size: int,
        own_minimum: bool = False,
        encoder_ids: Sequence[int] | None = None,
    ) -> None:
        self._config = config
        self._max_length = max_length
        end_ids = sorted(eos_id for eos_id in config.eos_token_ids if 0 <= eos_id < vocab_size)
        self._end_ids = torch.tensor(end_ids, dtype=torch.long)
        self._first_end = 0 if own_minimum else config.first_end(len(sequence_ids))
        self._forced_eos_ids = torch.tensor(config.forced_eos_token_id, dtype=torch.long)
        self._suppressed = torch.tensor(config.suppress_tokens, dtype=torch.long)
        self._suppressed_at_begin = torch.tensor(config.begin_suppress_tokens, dtype=torch.long)
        # As in transformers: a forced first token moves the beginning by one.
        forced_first = len(sequence_ids) <= 1 and config.forced_bos_token_id is not None
        self._begin = len(sequence_ids) + forced_first
        self._biases = _SequenceBiases(config.sequence_bias)
        # As in transformers: a token that is an end by itself is no bad word.
        words = [word for word in config.bad_words_ids if word not in {(eos_id,) for eos_id in end_ids}]
        self._bad_words = _SequenceBiases(dict.fromkeys(words, -math.inf))
        self._encoder_ids = torch.tensor(sequence_ids if encoder_ids is None else encoder_ids, dtype=torch.long)
        self._encoder_penalty: EncoderRepetitionPenaltyLogitsProcessor | None = None
        if config.encoder_repetition_penalty != 1:
            self._encoder_penalty = EncoderRepetitionPenaltyLogitsProcessor(
                config.encoder_repetition_penalty,
                self._encoder_ids[None],  # type: ignore[arg-type]
            )
        self._decay_from = math.inf
        if config.exponential_decay_length_penalty is not None and end_ids:
            self._decay_from = len(sequence_ids) + config.exponential_decay_length_penalty[0]
        # All mutable state: the sequence so far, in a tensor that grows.
        self._ids = torch.tensor([*sequence_ids, *[0] * 64], dtype=torch.long)
        self._length = len(sequence_ids)

    def favour(self, scores: torch.Tensor) -> torch.Tensor:
        """The rules before a request's own penalties.

        Args:
            scores: float32 [vocab_size]; changed.
        """
        self._biases.add(scores, self._sequence)
        if self._encoder_penalty is not None:
            scores = self._encoder_penalty(self._sequence[None], scores[None])[0]
        return scores

    def restrict(self, scores: torch.Tensor) -> torch.Tensor:
        """The rules after a request's own penalties.

        Args:
            scores: float32 [vocab_size]; changed.
        """
        config, sequence = self._config, self._sequence
        for size, text in (
            (config.no_repeat_ngram_size, sequence),
            (config.encoder_no_repeat_ngram_size, self._encoder_ids),
        ):
            if 0 < size <= self._length + 1:
                scores[_continuations(text, sequence[self._length + 1 - size :])] = -math.inf
        self._bad_words.add(scores, sequence)
        if self._length < self._first_end:
            scores[self._end_ids] = -math.inf
        if self._length == 1 and config.forced_bos_token_id is not None:
            scores = _only(scores, torch.tensor([config.forced_bos_token_id]))
        if self._length == self._max_length - 1 and len(self._forced_eos_ids):
            scores = _only(scores, self._forced_eos_ids)
        if config.remove_invalid_values:
            scores = InfNanRemoveLogitsProcessor()(sequence[None], scores[None])[0]
        if self._length > self._decay_from:
            self._favour_the_end(scores)
        scores[self._suppressed] = -math.inf
        if self._length == self._begin:
            scores[self._suppressed_at_begin] = -math.inf
        return scores

    def advance(self, token_id: int) -> None:
        """Appends a token that was chosen."""
        if self._length == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
        self._ids[self._length] = token_id
        self._length += 1

    @property
    def _sequence(self) -> torch.Tensor:
        return self._ids[: self._length]

    def _favour_the_end(self, scores: torch.Tensor) -> None:
        assert self._config.exponential_decay_length_penalty is not None
        try:
            growth = self._config.exponential_decay_length_penalty[1] ** (self._length - int(self._decay_from)) - 1
        except OverflowError:
            growth = _LARGEST_GROWTH
        ends = scores[self._end_ids]
        penalty = (ends.abs() * min(growth, _LARGEST_GROWTH)).masked_fill(~ends.isfinite(), 0.0)
        scores[self._end_ids] = ends + penalty


class _SequenceBiases:
    """What is added to the logit of a sequence's last token after its other tokens."""

    def __init__(self, biases: Mapping[tuple[int, ...], float]) -> None:
        by_prefix: dict[tuple[int, ...], dict[int, float]] = {}
        for sequence, bias in biases.items():
            by_prefix.setdefault(sequence[:-1], {})[sequence[-1]] = bias
        self._by_prefix = {
            prefix: (torch.tensor(list(last)), torch.tensor(list(last.values()), dtype=torch.float32))
            for prefix, last in by_prefix.items()
        }
        self._prefix_lengths = list(dict.fromkeys(map(len, by_prefix)))

    def add(self, scores: torch.Tensor, sequence: torch.Tensor) -> None:
        if not self._by_prefix:
            return
        bias = torch.zeros_like(scores)
        context = sequence[len(sequence) - min(len(sequence), max(self._prefix_lengths)) :].tolist()
        for length in self._prefix_lengths:
            if length <= len(context):
                last = self._by_prefix.get(tuple(context[len(context) - length :]))
                if last is not None:
                    bias[last[0]] += last[1]
        scores += bias


def _continuations(text: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """The tokens that follow `prefix` wherever it is in `text`; both [num_tokens]."""
    following = torch.arange(len(prefix), max(len(prefix), len(text)))
    for distance, token_id in enumerate(reversed(prefix.tolist()), start=1):
        if not len(following):
            break
        following = following[text[following - distance] == token_id]
    return text[following]


def _only(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    forced = torch.full_like(scores, -math.inf)
    forced[token_ids] = 0.0
    return forced
