"""What a model loses by being quantized: both run over the same text, in the engine, and their logits are compared."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import anyio
import torch

from hermes_async.config import EngineConfig, parse_bytes
from hermes_async.engine.engine import Engine
from hermes_async.errors import MemoryBudgetError, RequestError

MOST_TOKENS = 2048
_MOST_WINDOW_TOKENS = 512
_LEAST_WINDOW_TOKENS = 32
_MOST_LOGITS_BYTES = 64 * 2**20
_FIRST_BUDGET = 256 * 2**20
_MOST_TRIES = 8
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Loss:
    """The difference between a model and its quantized copy.

    Attributes:
        num_tokens: Tokens that were predicted.
        window: The most tokens that were computed together; no window sees another one.
        perplexity_before, perplexity_after: Of the text, to the model and its copy.
        largest_error, mean_error: Of the logits, as absolute differences.
        same_token: The share of places where both find the same token the likeliest.
    """

    num_tokens: int
    window: int
    perplexity_before: float
    perplexity_after: float
    largest_error: float
    mean_error: float
    same_token: float


def sample_text() -> str:
    """The text that ships with the package."""
    return files(__package__).joinpath("sample.txt").read_text(encoding="utf-8")


async def measure_loss(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    text: str,
    *,
    memory_budget: int | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Loss:
    """Runs a causal language model and its quantized copy over the first `MOST_TOKENS` tokens of a text.

    Each window costs one pass over the weights of both.

    Args:
        memory_budget: Of each of the two engines; None takes 256 MiB, or more where that is too little. In a small
            one, windows are shorter.
        on_progress: Called after each window with the tokens that are done, and all.

    Raises:
        RequestError: The text has less than two tokens, or the checkpoint has no tokenizer.
        MemoryBudgetError: The budget is too small, or there is not enough memory.
        HermesError: As `Engine` on entering, and `Engine.forward`.
    """
    budget = _FIRST_BUDGET if memory_budget is None else parse_bytes(memory_budget)
    window = _MOST_WINDOW_TOKENS
    for is_last in (*(False,) * (_MOST_TRIES - 1), True):
        # A sweep of that many tokens has room for the logits of all tokens of a window.
        config = EngineConfig(max_tokens_per_sweep=2 * window)
        try:
            async with (
                Engine(before, memory_budget=budget, config=config) as first,
                Engine(after, memory_budget=budget, config=config) as second,
            ):
                return await _compare(first, second, text, window, on_progress)
        except MemoryBudgetError as error:
            if is_last or (memory_budget is not None and window == _LEAST_WINDOW_TOKENS):
                raise
            window = max(_LEAST_WINDOW_TOKENS, window // 2)
            if memory_budget is None:
                budget = max(error.minimum_bytes or 0, budget * 5 // 4)
    raise AssertionError("the last try returns or raises")


async def _compare(
    first: Engine, second: Engine, text: str, most_window_tokens: int, report: Callable[[int, int], None]
) -> Loss:
    context_length = first.plan.context_length or _MOST_WINDOW_TOKENS
    # More characters than this might be refused as too many for the model's context.
    text = text[: 16 * (2 * min(context_length, MOST_TOKENS) + 256)]
    plain = (await first.tokenize(text, add_special_tokens=False))[:MOST_TOKENS]
    if len(plain) < 2:
        raise RequestError("the loss cannot be measured: the text has less than two tokens")
    special = await _special_tokens(first, text[:1])
    num_logits = (await _logits(second, [*special, plain[0]])).shape[1]
    window = min(most_window_tokens, context_length, max(_LEAST_WINDOW_TOKENS, _MOST_LOGITS_BYTES // (4 * num_logits)))
    sums = _Sums()
    for piece in _windows(plain, window - len(special)):
        token_ids = [*special, *piece]
        both = await _logits(first, token_ids), await _logits(second, token_ids)
        await anyio.to_thread.run_sync(sums.add, *both, token_ids[1:])
        report(min(len(plain), sums.num_places), len(plain))
    return sums.loss(window)


async def _special_tokens(engine: Engine, text: str) -> list[int]:
    """The special tokens with which each text begins."""
    plain = await engine.tokenize(text, add_special_tokens=False)
    full = await engine.tokenize(text)
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def _windows(token_ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(token_ids), size):
        piece = token_ids[start : start + size]
        if len(piece) > 1:
            yield piece


async def _logits(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]."""
    output = await engine.forward(input_ids=[token_ids])
    logits: torch.Tensor = output.logits[0]
    return logits


class _Sums:
    """Sums over all places of the text so far, in Python's floats."""

    def __init__(self) -> None:
        self.num_places = 0
        self._num_tokens = self._num_same = self._num_logits = 0
        self._nats = [0.0, 0.0]
        self._error = self._largest = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, next_ids: Sequence[int]) -> None:
        """Adds a window: the logits of both models [tokens, vocabulary], and each token's next one."""
        for start in range(0, len(before), _ROWS_AT_ONCE):
            one, other = (logits[start : start + _ROWS_AT_ONCE].float() for logits in (before, after))
            difference = (one - other).abs_()
            self._largest = max(self._largest, float(difference.max()))
            self._error += float(difference.sum(dtype=torch.float64))
            self._num_logits += difference.numel()
            self._num_same += int((one.argmax(-1) == other.argmax(-1)).sum())
            self.num_places += len(one)
            following = torch.tensor(next_ids[start : start + _ROWS_AT_ONCE])
            for idx, logits in enumerate((one, other)):
                chosen = logits[: len(following)].log_softmax(-1).gather(-1, following[:, None])
                self._nats[idx] -= float(chosen.sum(dtype=torch.float64))
            self._num_tokens += len(following)

    def loss(self, window: int) -> Loss:
        before, after = (math.exp(nats / self._num_tokens) for nats in self._nats)
        return Loss(
            num_tokens=self._num_tokens,
            window=window,
            perplexity_before=before,
            perplexity_after=after,
            largest_error=self._largest,
            mean_error=self._error / self._num_logits,
            same_token=self._num_same / self.num_places,
        )
