"""Chooses one token from logits, by a request's sampling parameters, its tokens so far and its random generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from hermes_async.config import SamplingParams
from hermes_async.errors import RequestError
from hermes_async.modeling.structured_outputs import Grammar
from hermes_async.modeling.token_rules import TokenRules
from hermes_async.results import SampledToken

# As in vLLM: dividing logits by less than this would only lose precision against argmax.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Chooses one request's tokens.

    The order is vLLM's, with the checkpoint's rules where transformers' `generate` has them:

    1. The request's `logit_bias` and `min_tokens`.
    2. The checkpoint's biases of sequences and its penalty of tokens that the input lacks (`TokenRules.favour`).
    3. Repetition, frequency and presence penalties.
    4. The checkpoint's n-grams, bad words, least length, forced and suppressed tokens (`TokenRules.restrict`).
    5. The grammar. Where it allows nothing that step 4 leaves, step 4 does not hold for this token.
    6. Argmax, or temperature, min_p, top_k, top_p and a draw.

    Drafted tokens go through the same steps, one by one. Math is float32 on the CPU. A sampler is plain state:
    `copy.deepcopy` gives one that continues from the same state and draws the same tokens.

    Args:
        params: What the request asks for, with the checkpoint's values where it left them open.
        prompt_ids: The prompt; the repetition penalty counts its tokens too.
        eos_token_ids: The model's end-of-sequence tokens, which are suppressed for `min_tokens` tokens.
        vocab_size: The number of logits of a position.
        grammar: What the answer must match; None allows all tokens. It belongs to this object from here on.
        rules: What the checkpoint says of tokens; None for nothing. They belong to this object from here on.

    Raises:
        RequestError: A token id, or `params.logprobs`, is out of the vocabulary's range.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        grammar: Grammar | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        assert not params.model_defaults
        _check_vocabulary(params, prompt_ids, vocab_size)
        self._params = params
        self._num_output_tokens = 0
        self._min_tokens = params.min_tokens or 0
        self._grammar = grammar
        self._rules = rules
        bias = params.logit_bias or {}
        self._bias_ids = torch.tensor(list(bias), dtype=torch.long)
        self._biases = torch.tensor([float(value) for value in bias.values()], dtype=torch.float32)
        self._end_ids = torch.tensor(sorted(end_token_ids(params, eos_token_ids, vocab_size)), dtype=torch.long)

        self._repetition: LogitsProcessor | None = None
        if params.repetition_penalty not in (None, 1):
            self._repetition = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        self._counts: _TokenCounts | None = None
        if self._repetition is not None or params.frequency_penalty or params.presence_penalty:
            self._counts = _TokenCounts(prompt_ids)

        self._warpers: list[LogitsProcessor] = []
        self._generator: torch.Generator | None = None
        self._temperature = float(params.temperature or 0.0)
        if self._temperature >= _GREEDY_BELOW:
            self._warpers = _warpers(params)
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor) -> SampledToken:
        """Chooses the next token and remembers it.

        Args:
            logits: `[vocab_size]`, any float dtype, on the CPU; not changed.

        Raises:
            RequestError: No token can be chosen: logits are not numbers, all tokens are suppressed, or the grammar
                exceeded a limit.
        """
        keep_going = self._num_output_tokens < self._min_tokens
        scores = self._penalize(logits, suppress=keep_going and self._grammar is None)
        penalized = scores
        if self._rules is not None:
            scores = self._rules.restrict(scores if self._grammar is None else scores.clone())
        if self._grammar is not None:
            scores = self._grammar.constrain(scores, keep_going=keep_going)
            if self._rules is not None and scores.max() == -math.inf:
                scores = self._grammar.constrain(penalized, keep_going=keep_going)
        if not scores.max() > -math.inf:  # also true of NaN
            raise RequestError("no token can be chosen: logits are not numbers, or every token is suppressed")
        token_id = int(scores.argmax()) if self._generator is None else self._draw(scores, self._generator)
        self._num_output_tokens += 1
        if self._grammar is not None:
            self._grammar.advance(token_id)
        if self._counts is not None:
            self._counts.add(token_id)
        if self._rules is not None:
            self._rules.advance(token_id)
        return self._report(logits, token_id)

    def _penalize(self, logits: torch.Tensor, *, suppress: bool) -> torch.Tensor:
        """Returns `logits` itself where there is no penalty, so that plain greedy sampling is `logits.argmax()`."""
        if not (len(self._biases) or suppress or self._counts is not None or self._rules is not None):
            return logits
        scores = logits.to(torch.float32, copy=True)
        scores[self._bias_ids] += self._biases
        if suppress:
            scores[self._end_ids] = -math.inf
        if self._rules is not None:
            scores = self._rules.favour(scores)
        if self._counts is not None:
            token_ids, output_counts = self._counts.view()
            if self._repetition is not None:
                scores = self._repetition(token_ids[None], scores[None])[0]
            scores[token_ids] -= self._params.frequency_penalty * output_counts
            scores[token_ids] -= self._params.presence_penalty * (output_counts > 0)
        return scores

    def _draw(self, scores: torch.Tensor, generator: torch.Generator) -> int:
        # A large bias divided by a small temperature may exceed float32's range; softmax would give NaN.
        scores = (scores.float() / self._temperature).clamp(max=torch.finfo(torch.float32).max)
        warped = scores[None]  # [1, vocab_size], as transformers' processors take them
        for warper in self._warpers:
            warped = warper(None, warped)
        probs = warped[0].softmax(-1)
        # Over the whole vocabulary, not only over the tokens that top_k and top_p keep. So each token has its own
        # random number, and a rounding difference at the edge of that set does not change the draw.
        return int(torch.multinomial(probs, num_samples=1, generator=generator))

    def _report(self, logits: torch.Tensor, token_id: int) -> SampledToken:
        if self._params.logprobs is None:
            return SampledToken(token_id, None, None)
        logprobs = logits.float().log_softmax(-1)
        logprob = float(logprobs[token_id])
        asked = self._params.logprobs
        top = logprobs.topk(len(logprobs) if asked == -1 else asked)
        top_logprobs = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        top_logprobs.setdefault(token_id, logprob)
        return SampledToken(token_id, logprob, top_logprobs)


class TopPWarper(LogitsProcessor):
    """Does what transformers' `TopPLogitsWarper` does, without sorting the whole vocabulary.

    The tokens with a probability of at most `(1 - top_p) / vocab_size` have at most `1 - top_p` together, so none of
    them is kept. Only the others are sorted: few, in most cases, of 256k.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Returns `scores` `[1, vocab_size]`, with minus infinity for all tokens outside of the nucleus."""
        probs = scores[0].softmax(-1)
        # Half of that bound, so that rounding cannot remove a token of a flat distribution.
        candidates = (probs > (1 - self.top_p) / (2 * len(probs))).nonzero()[:, 0]
        ordered, order = probs[candidates].sort(descending=True)
        mass_before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        kept = candidates[order[mass_before < self.top_p]]
        warped = torch.full_like(scores, -math.inf)
        warped[0, kept] = scores[0, kept]
        return warped


class _TokenCounts:
    """The distinct tokens of prompt and output, and how often each is in the output; grows in place."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self._token_ids = torch.zeros(2 * len(self._slots) + 16, dtype=torch.long)
        self._token_ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.long)
        self._output_counts = torch.zeros(len(self._token_ids), dtype=torch.float32)

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._token_ids):
            self._token_ids = torch.cat([self._token_ids, torch.zeros_like(self._token_ids)])
            self._output_counts = torch.cat([self._output_counts, torch.zeros_like(self._output_counts)])
        self._token_ids[slot] = token_id
        self._output_counts[slot] += 1

    def view(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token ids and output counts, both `[num_distinct]`."""
        return self._token_ids[: len(self._slots)], self._output_counts[: len(self._slots)]


def end_token_ids(params: SamplingParams, eos_token_ids: frozenset[int], vocab_size: int) -> frozenset[int]:
    """The tokens that end a request, or would without `ignore_eos`."""
    # A configuration may name an end-of-sequence token that is not in the vocabulary.
    return frozenset(params.stop_token_ids) | {eos_id for eos_id in eos_token_ids if 0 <= eos_id < vocab_size}


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if params.min_p:
        warpers.append(MinPLogitsWarper(float(params.min_p)))
    if params.top_k is not None and params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        warpers.append(TopPWarper(float(params.top_p)))
    return warpers


def _check_vocabulary(params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
    named_ids = [("logit_bias", params.logit_bias or {}), ("stop_token_ids", params.stop_token_ids)]
    for name, token_ids in [*named_ids, ("prompt", prompt_ids)]:
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name}: token id {token_id} is not one of the {vocab_size} tokens")
    if params.logprobs is not None and params.logprobs > vocab_size:
        raise RequestError(f"logprobs: {params.logprobs} is more than the vocabulary's {vocab_size} tokens")
