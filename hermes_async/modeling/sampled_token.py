"""A token that was chosen, as users get it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One chosen token.

    Log-probabilities are of the model's own distribution, before bias, penalties and temperature (as vLLM's
    default), and are there only where `SamplingParams.logprobs` is not None.

    Attributes:
        token_id: The token.
        logprob: The token's log-probability.
        top_logprobs: The `logprobs` likeliest tokens, likeliest first, and the chosen one, by token id.
    """

    token_id: int
    logprob: float | None
    top_logprobs: dict[int, float] | None
