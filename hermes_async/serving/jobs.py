"""Jobs: the share of one request or forward pass in a sweep, and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from hermes_async.errors import HermesError
from hermes_async.results import FinishReason, SampledToken

if TYPE_CHECKING:  # these import torch, which only an open engine needs
    from torch import Tensor

    from hermes_async.modeling.calls import ModelCall
    from hermes_async.serving.request import Request

DRAFT_MODEL = 0
"""The `match_length` of drafts by the draft model. Matches of prompt lookup have at least one token."""


@dataclass(eq=False, slots=True)
class GenerationJob:
    """One request's share of a sweep.

    Attributes:
        past: Tokens of the sequence before `token_ids`. They are in its KV, or another job of this sweep computes them.
        token_ids: A chunk of the prompt, or the last token and the drafted tokens that follow it.
        samples: Whether the next token is chosen after these.
        num_drafted: How many of `token_ids` are drafted.
        match_length: Length of the match that gave the draft, in tokens, or `DRAFT_MODEL`.
        num_to_encode: Positions of an encoder's input that are computed before these tokens.
        shares_blocks: Another job of this sweep uses the KV blocks that this one computes.
    """

    request: Request
    past: int
    token_ids: list[int]
    samples: bool
    num_drafted: int = 0
    match_length: int = 0
    shares_blocks: bool = False
    num_to_encode: int = 0

    @property
    def num_tokens(self) -> int:
        """What the job counts for in a sweep."""
        return len(self.token_ids) + self.num_to_encode

    @property
    def needs_draft(self) -> bool:
        """Whether the draft model must still draft its tokens."""
        return self.num_drafted > 0 and self.match_length == DRAFT_MODEL

    @property
    def model_inputs(self) -> Mapping[str, Tensor]:
        """What the model takes beside the tokens in the first call of a prompt: images, or the input of an encoder."""
        return {} if self.past else self.request.prepared.model_inputs

    @property
    def has_images(self) -> bool:
        """Whether these inputs are images, which the model computes beside the tokens."""
        return bool(self.model_inputs) and not self.num_to_encode

    @property
    def num_outputs(self) -> int:
        """Positions whose logits are needed."""
        return 1 + self.num_drafted if self.samples else 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep computed for one request.

    Attributes:
        length: Tokens of the sequence whose keys and values are valid now.
        sampled: The next tokens: none while the prompt is incomplete, several if drafts were right.
        text: The text that is certain with these tokens, or all the rest of it if the request ends.
        finish_reason: Set if the request ends with the last of these tokens.
        error: Why no token could be chosen or decoded.
    """

    job: GenerationJob
    length: int
    sampled: tuple[SampledToken, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: HermesError | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the user's prompt that were computed."""
        prepared = self.job.request.prepared
        if prepared.encoder_ids:
            return len(prepared.encoder_ids) if self.job.num_to_encode else 0
        return max(0, min(self.length, len(prepared.token_ids)) - self.job.past)


@dataclass(eq=False)
class ForwardJob:
    """One forward pass that a user waits for.

    Attributes:
        call: What the inference agent runs; it has the result.
        input_names: Names of the model's inputs, for messages.
        token_ids: The distinct ids that the input embedding looks up, sorted.
        num_tokens: Tokens of all sequences or images, padding included.
        nbytes: The most memory that its activations take.
        done: Set when it has a result or an error.
    """

    call: ModelCall
    input_names: tuple[str, ...]
    token_ids: list[int]
    num_tokens: int
    nbytes: int
    done: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | None = None

    def end(self, error: HermesError | None = None) -> None:
        self.error = error
        self.done.set()
