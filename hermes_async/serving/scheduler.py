"""Decides, before each sweep, which sequences take part and with how many tokens. Synchronous; does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from hermes_async.modeling.kv_cache import BLOCK_TOKENS
from hermes_async.serving.kv_blocks import Reservation, SharedBlock
from hermes_async.serving.request import Request
from hermes_async.serving.speculation import Draft, allocate
from hermes_async.serving.sweep_times import SweepTimes

BY_DRAFT_MODEL = 0
"""Stands for the draft model where lengths of matches are told apart, which are at least one."""


class Drafter(Protocol):
    """What the scheduler asks of a draft model."""

    @property
    def times(self) -> SweepTimes: ...
    def can_draft(self, request: Request) -> bool: ...


@dataclass(eq=False, slots=True)
class Scheduled:
    """One request's share of a sweep.

    Attributes:
        past: Tokens of the sequence that lie in its KV before these, or are put there by this sweep for another.
        token_ids: A chunk of the prompt, or the last token, with drafted tokens behind it.
        num_drafted: How many of them are drafted.
        match_length: What the draft was found by, or `BY_DRAFT_MODEL`.
        samples: Whether the next token can be chosen after these.
        needed: Another request of this sweep uses the blocks that this one computes.
    """

    request: Request
    past: int
    token_ids: list[int]
    samples: bool
    num_drafted: int = 0
    match_length: int = 0
    needed: bool = False

    @property
    def from_draft_model(self) -> bool:
        """Whether its drafted tokens are still to come."""
        return self.num_drafted > 0 and self.match_length == BY_DRAFT_MODEL

    @property
    def num_outputs(self) -> int:
        """Positions whose logits are wanted."""
        return 1 + self.num_drafted if self.samples else 0


class Scheduler:
    """Packs prompts and decodes together: every decoding sequence first, then prompts in the order they came.

    Of more than `max_sequences` requests the first to be admitted take part; those whose user does not take their
    chunks are left out. A prompt goes in chunks: beside decoding sequences it gets as many tokens as keep the sweep's
    compute within its read time. Where less is read, prompts get at least as much compute as the decodes, and as much
    for each prompt as for each decode. What is left goes to drafted tokens, as far as these are expected to pay.

    Args:
        tokens_by_outputs: Most tokens of a sweep, as `Plan.tokens_by_outputs`; no more with more outputs.
        max_sequences: Most requests in a sweep.
        times: What sweeps take.
        skip_computed: Moves a sequence's length over shared blocks that were computed meanwhile.
        draft_model: Drafts too, where what a sequence's own text has to offer is right less often.
    """

    def __init__(
        self,
        tokens_by_outputs: Sequence[int],
        max_sequences: int,
        times: SweepTimes,
        skip_computed: Callable[[Reservation, int], None],
        draft_model: Drafter | None = None,
    ) -> None:
        self.tokens_by_outputs = tokens_by_outputs
        self.max_sequences = max_sequences
        self._times = times
        self._skip_computed = skip_computed
        self._draft_model = draft_model
        self._running: list[Request] = []

    @property
    def running(self) -> tuple[Request, ...]:
        return tuple(self._running)

    @property
    def num_active(self) -> int:
        """Requests that are not paused."""
        return sum(not request.paused for request in self._running)

    def add(self, request: Request) -> None:
        self._running.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out; nothing happens if it is not in."""
        if request in self._running:
            self._running.remove(request)

    def schedule(self) -> list[Scheduled]:
        """The next sweep; empty when there is nothing to do."""
        runnable = [request for request in self._running if not request.paused][: self.max_sequences]
        for request in runnable:
            assert request.reservation is not None
            self._skip_computed(request.reservation, len(request.token_ids) - 1)
        decoding = [request for request in runnable if len(request.token_ids) - request.kv.length == 1]
        decoding = decoding[: self.tokens_by_outputs[-1]]
        sweep = [Scheduled(request, request.kv.length, request.token_ids[-1:], samples=True) for request in decoding]
        prompts = [request for request in runnable if len(request.token_ids) - request.kv.length > 1]
        sweep += self._chunks(prompts, len(decoding))
        self._draft(sweep)
        return sweep

    def _chunks(self, prompts: list[Request], num_decoding: int) -> list[Scheduled]:
        most = self.tokens_by_outputs[0]
        if prompts and num_decoding:
            share = 1 + max(1.0, len(prompts) / num_decoding)
            seconds = max(self._times.read_seconds or 0.0, share * (self._times.compute_seconds(num_decoding) or 0.0))
            within = self._times.tokens_within(seconds, most) - num_decoding
            most = num_decoding + max(within, BLOCK_TOKENS)
        taken = num_decoding
        chunks: list[Scheduled] = []
        computing: dict[SharedBlock, Scheduled] = {}
        for request in prompts:
            room = min(most, self._most_tokens(num_decoding + len(chunks) + 1)) - taken
            if room <= 0:
                break
            past = _past(request, computing)
            token_ids = request.token_ids[past : past + room]
            chunk = Scheduled(request, past, token_ids, samples=past + len(token_ids) == len(request.token_ids))
            chunks.append(chunk)
            taken += len(token_ids)
            assert request.reservation is not None
            for block in request.reservation.shared[past // BLOCK_TOKENS : (past + len(token_ids)) // BLOCK_TOKENS]:
                computing.setdefault(block, chunk)
        return chunks

    def _draft(self, sweep: list[Scheduled]) -> None:
        """Adds drafted tokens behind the last token of sequences that have none but this to compute."""
        num_tokens = sum(len(item.token_ids) for item in sweep)
        num_outputs = sum(item.samples for item in sweep)
        counts = range(1, 1 + len(self.tokens_by_outputs) - len(sweep))
        most = max(
            (count for count in counts if num_tokens + count <= self._most_tokens(len(sweep) + count)), default=0
        )
        if most == 0:
            return
        drafts: list[tuple[Scheduled, Draft]] = []
        modelled: list[Scheduled] = []
        for item in sweep:
            left = min(most, item.request.num_left - 1)
            if left <= 0 or not item.samples or item.past + 1 < len(item.request.token_ids):
                continue
            prompt = item.request.prepared
            draft = None if prompt.lookup is None else prompt.lookup.propose(left)
            if self._can_draft(item.request) and (
                draft is None or prompt.acceptance.rate(draft.match_length) < prompt.acceptance.rate(BY_DRAFT_MODEL)
            ):
                modelled.append(item)
            elif draft is not None:
                drafts.append((item, draft))
        self._choose(drafts, modelled, num_tokens, num_outputs, most)

    def _choose(
        self,
        drafts: list[tuple[Scheduled, Draft]],
        modelled: list[Scheduled],
        num_tokens: int,
        num_outputs: int,
        most: int,
    ) -> None:
        """Gives each sequence as many drafted tokens as are expected to pay.

        A draft model takes a pass for each further token of the longest of its drafts; its depth is tried from none
        upwards, for as long as one more is not worse.
        """
        items = [*(item for item, _ in drafts), *modelled]
        lengths = [*(draft.match_length for _, draft in drafts), *(BY_DRAFT_MODEL for _ in modelled)]
        rates = [item.request.prepared.acceptance.rate(length) for item, length in zip(items, lengths, strict=True)]
        best, best_worth = [0] * len(items), 0.0
        pass_s = self._drafting_seconds(len(modelled))
        # While a pass of the draft model was never timed, one token each is enough to learn that.
        for depth in range(1 + (0 if not modelled else 1 if pass_s is None else most)):
            sweep_seconds = partial(self._sweep_seconds, drafting_s=depth * (pass_s or 0.0))
            available = [len(draft.token_ids) for _, draft in drafts]
            available += [min(depth, item.request.num_left - 1) for item in modelled]
            counts = allocate(
                rates,
                available,
                num_tokens=num_tokens,
                num_outputs=num_outputs,
                most=most,
                sweep_seconds=sweep_seconds,
            )
            outputs = num_outputs + sum(_expected(rate, count) for rate, count in zip(rates, counts, strict=True))
            worth = outputs / (sweep_seconds(num_tokens + sum(counts)) or 1.0)
            if worth <= best_worth:
                break
            best, best_worth = counts, worth
        for item, length, count in zip(items, lengths, best, strict=True):
            item.num_drafted, item.match_length = count, length
            if count == 0:
                item.request.prepared.acceptance.passed(length)
        for item, draft in drafts:
            item.token_ids += draft.token_ids[: item.num_drafted]

    def _most_tokens(self, num_outputs: int) -> int:
        """Of a sweep with so many outputs; a request that has no part in its logits counts as one too."""
        return self.tokens_by_outputs[num_outputs - 1] if num_outputs <= len(self.tokens_by_outputs) else 0

    def _can_draft(self, request: Request) -> bool:
        return self._draft_model is not None and self._draft_model.can_draft(request)

    def _drafting_seconds(self, num_sequences: int) -> float | None:
        """One pass of the draft model."""
        return None if self._draft_model is None else self._draft_model.times.compute_seconds(num_sequences)

    def _sweep_seconds(self, num_tokens: int, drafting_s: float) -> float | None:
        seconds = self._times.sweep_seconds(num_tokens)
        return None if seconds is None else seconds + drafting_s


def _expected(rate: float, count: int) -> float:
    """Tokens expected to be right of a draft of `count`."""
    return sum(rate**k for k in range(1, count + 1))


def _past(request: Request, computing: dict[SharedBlock, Scheduled]) -> int:
    """Where a prompt's next chunk begins: behind the blocks that other chunks of this sweep compute."""
    assert request.reservation is not None
    past = request.kv.length
    for block in request.reservation.shared[past // BLOCK_TOKENS :]:
        end = (past // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        if block not in computing or end >= len(request.token_ids):
            break
        computing[block].needed = True
        past = end
    return past
