"""Chooses the requests of each sweep, and how many tokens each of them has. Synchronous; does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from hermes_async.modeling.kv_cache import BLOCK_TOKENS
from hermes_async.modeling.turns import TurnTraits
from hermes_async.serving.jobs import DRAFT_MODEL, GenerationJob
from hermes_async.serving.kv_blocks import BlockReservation, SharedBlock
from hermes_async.serving.request import Request
from hermes_async.serving.speculation import Draft, allocate, expected_tokens
from hermes_async.serving.sweep_times import SweepTimes


class Drafter(Protocol):
    """What the scheduler needs of a draft model."""

    @property
    def times(self) -> SweepTimes: ...
    def can_draft(self, request: Request) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A job that could verify drafted tokens.

    Attributes:
        draft: The tokens; None if the draft model must still draft them.
        rate: The chance that a drafted token is right.
        most: The most tokens that can be drafted.
    """

    job: GenerationJob
    draft: Draft | None
    match_length: int
    rate: float
    most: int


class _JobKind(Enum):
    PACKED = auto()
    TURN = auto()
    IMAGES = auto()
    """A prompt with images, which is a turn too."""


class Scheduler:
    """Packs prompts and decodes together: first all decoding sequences, then prompts in the order of their admission.

    At most `max_sequences` requests take part, in the order of their admission. Paused requests do not. Prompts are
    computed in chunks. Beside decoding sequences, chunks may have as many tokens as are computed while the sweep reads
    its weights. If that is little, prompts get as much compute time as decodes, in total and for each sequence. Drafted
    tokens get the room that is left, if they are expected to pay.

    Args:
        tokens_by_outputs: The most tokens of a sweep, as `Plan.tokens_by_outputs`.
        max_sequences: The most requests in a sweep.
        times: What sweeps take.
        draft_model: Drafts tokens for requests where prompt lookup is right less often.
        traits: What the caches of sequences that run in turns allow; None where all are packed.
        fits: Whether the activations of jobs that are packed, of turns and of images fit into the workspace together;
            None where `tokens_by_outputs` says that of all jobs.
    """

    def __init__(
        self,
        tokens_by_outputs: Sequence[int],
        max_sequences: int,
        times: SweepTimes,
        draft_model: Drafter | None = None,
        *,
        traits: TurnTraits | None = None,
        fits: Callable[[Sequence[GenerationJob]], bool] | None = None,
    ) -> None:
        self.tokens_by_outputs = tokens_by_outputs
        self.max_sequences = max_sequences
        self._times = times
        self._draft_model = draft_model
        self._traits = traits
        self._fits = fits
        # All mutable state: the admitted requests, in order; and for sweeps that not all jobs fit into, the kinds of
        # jobs, of which the first is scheduled first, and the number of such sweeps.
        self._running: list[Request] = []
        self._kinds = list(_JobKind)
        self._num_divided = 0

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
        """Removes a request, if it was added."""
        if request in self._running:
            self._running.remove(request)

    def schedule(self) -> list[GenerationJob]:
        """The generation jobs of the next sweep, perhaps none."""
        active = [request for request in self._running if not request.paused][: self.max_sequences]
        for request in active:
            assert request.reservation is not None
            request.reservation.refresh(len(request.token_ids) - 1)
        decoding = [request for request in active if _num_pending(request) == 1][: self.tokens_by_outputs[-1]]
        prompts = [request for request in active if _num_pending(request) > 1]
        chunks = self._chunks(prompts, len(decoding))
        if prompts and not chunks and not self._divides_prompt_of(prompts[0]):  # the first prompt needs the whole sweep
            decoding, chunks = [], self._chunks(prompts, 0)
        jobs = [
            GenerationJob(request, request.num_computed, request.token_ids[-1:], samples=True) for request in decoding
        ]
        jobs += chunks
        if self._traits is None or self._traits.crops or any(not job.request.prepared.in_turns for job in jobs):
            self._add_drafts(jobs)
        return jobs if self._fits is None or self._fits(jobs) else self._fitting(jobs, self._fits)

    def _fitting(
        self, jobs: Sequence[GenerationJob], fits: Callable[[Sequence[GenerationJob]], bool]
    ) -> list[GenerationJob]:
        """As many of the jobs as fit into the workspace together. Each kind, and each job of it, is first at times."""
        by_kind: dict[_JobKind, list[list[GenerationJob]]] = {kind: [] for kind in self._kinds}
        packed = [job for job in jobs if not job.request.prepared.in_turns]
        if packed:  # they fit together, and one may need what another computes
            by_kind[_JobKind.PACKED].append(packed)
        for job in jobs:
            if job.request.prepared.in_turns:
                by_kind[_JobKind.IMAGES if job.has_images else _JobKind.TURN].append([job])
        for kind, several in by_kind.items():
            first = self._num_divided // len(self._kinds) % max(1, len(several))
            by_kind[kind] = several[first:] + several[:first]
        self._num_divided += 1
        kept: list[GenerationJob] = []
        for together in [together for kind in self._kinds for together in by_kind[kind]]:
            if not kept or fits([*kept, *together]):
                kept += together
        leading = next(kind for kind in self._kinds if by_kind[kind])
        self._kinds.remove(leading)
        self._kinds.append(leading)
        return kept

    # --- prompts ---

    def _divides_prompt_of(self, request: Request) -> bool:
        """Whether several sweeps may compute the prompt. One with images or for an encoder is one call."""
        if not request.prepared.in_turns or self._traits is None:
            return True
        return self._traits.chunks and not request.prepared.model_inputs

    def _chunks(self, prompts: list[Request], num_decoding: int) -> list[GenerationJob]:
        most = self._most_beside_decodes(len(prompts), num_decoding)
        num_tokens = num_decoding
        chunks: list[GenerationJob] = []
        computing: dict[SharedBlock, GenerationJob] = {}
        for request in prompts:
            room = min(most, self._most_tokens(num_decoding + len(chunks) + 1)) - num_tokens
            if room <= 0:
                break
            past = _first_pending(request, computing)
            num_to_encode = request.num_to_encode
            token_ids = request.token_ids[past : past + max(0, room - num_to_encode)]
            if not self._divides_prompt_of(request) and past + len(token_ids) < len(request.token_ids):
                break
            end = past + len(token_ids)
            chunk = GenerationJob(request, past, token_ids, samples=end == len(request.token_ids))
            chunk.num_to_encode = num_to_encode
            chunks.append(chunk)
            num_tokens += chunk.num_tokens
            for block in _shared_blocks(request)[past // BLOCK_TOKENS : end // BLOCK_TOKENS]:
                computing.setdefault(block, chunk)
        return chunks

    def _most_beside_decodes(self, num_prompts: int, num_decoding: int) -> int:
        """The most tokens of a sweep whose prompts do not delay the decoding sequences for too long."""
        most = self.tokens_by_outputs[0]
        if not num_prompts or not num_decoding:
            return most
        share = 1 + max(1.0, num_prompts / num_decoding)
        seconds = max(self._times.read_seconds or 0.0, share * (self._times.compute_seconds(num_decoding) or 0.0))
        num_prompt_tokens = self._times.tokens_within(seconds, most) - num_decoding
        return num_decoding + max(num_prompt_tokens, BLOCK_TOKENS)

    def _most_tokens(self, num_outputs: int) -> int:
        """The most tokens of a sweep with `num_outputs`; a request without logits counts as one output."""
        return self.tokens_by_outputs[num_outputs - 1] if num_outputs <= len(self.tokens_by_outputs) else 0

    # --- drafts ---

    def _add_drafts(self, jobs: list[GenerationJob]) -> None:
        """Appends drafted tokens to the jobs, as many as are expected to pay."""
        num_tokens = sum(job.num_tokens for job in jobs)
        room = max(
            (
                count
                for count in range(1, 1 + len(self.tokens_by_outputs) - len(jobs))
                if num_tokens + count <= self._most_tokens(len(jobs) + count)
            ),
            default=0,
        )
        candidates = [candidate for job in jobs if (candidate := self._candidate(job, room)) is not None]
        if not candidates:
            return
        counts = self._draft_counts(candidates, num_tokens, sum(job.samples for job in jobs), room)
        for candidate, count in zip(candidates, counts, strict=True):
            job = candidate.job
            job.num_drafted, job.match_length = count, candidate.match_length
            if candidate.draft is not None:
                job.token_ids += candidate.draft.token_ids[:count]
            if count == 0:
                job.request.prepared.acceptance.passed(candidate.match_length)

    def _candidate(self, job: GenerationJob, room: int) -> _Candidate | None:
        """A draft for the job from the better source: the sequence itself, or the draft model."""
        request, prompt = job.request, job.request.prepared
        most = min(room, request.num_left - 1)
        crops = not prompt.in_turns or self._traits is None or self._traits.crops
        if not crops or most <= 0 or not job.samples or job.past + 1 < len(request.token_ids):
            return None
        draft = None if prompt.lookup is None else prompt.lookup.propose(most)
        if self._draft_model is not None and self._draft_model.can_draft(request):
            rate = prompt.acceptance.rate(DRAFT_MODEL)
            if draft is None or prompt.acceptance.rate(draft.match_length) < rate:
                return _Candidate(job, None, DRAFT_MODEL, rate, most)
        if draft is None:
            return None
        return _Candidate(job, draft, draft.match_length, prompt.acceptance.rate(draft.match_length), most)

    def _draft_counts(
        self, candidates: Sequence[_Candidate], num_tokens: int, num_outputs: int, room: int
    ) -> list[int]:
        """How many drafted tokens each candidate gets.

        The draft model runs one pass for each token of its longest draft. This depth grows from zero while one more
        token is expected to give more tokens a second.
        """
        rates = [candidate.rate for candidate in candidates]
        num_for_model = sum(candidate.draft is None for candidate in candidates)
        pass_s = None if self._draft_model is None else self._draft_model.times.compute_seconds(num_for_model)
        max_depth = 0
        if num_for_model:  # the first pass is timed with one token of each
            max_depth = 1 if pass_s is None else room
        best, best_rate = [0] * len(candidates), 0.0
        for depth in range(max_depth + 1):
            drafting_s = depth * (pass_s or 0.0)

            def sweep_seconds(count: int, drafting_s: float = drafting_s) -> float | None:
                seconds = self._times.sweep_seconds(count)
                return None if seconds is None else seconds + drafting_s

            counts = allocate(
                rates,
                [candidate.most if candidate.draft else min(depth, candidate.most) for candidate in candidates],
                num_tokens=num_tokens,
                num_outputs=num_outputs,
                most=room,
                sweep_seconds=sweep_seconds,
            )
            tokens = num_outputs + sum(map(expected_tokens, rates, counts))
            tokens_per_s = tokens / (sweep_seconds(num_tokens + sum(counts)) or 1.0)
            if tokens_per_s <= best_rate:
                break
            best, best_rate = counts, tokens_per_s
        return best


def _num_pending(request: Request) -> int:
    """Tokens whose keys and values are not computed yet, and positions of an encoder's input."""
    return len(request.token_ids) - request.num_computed + request.num_to_encode


def _shared_blocks(request: Request) -> Sequence[SharedBlock]:
    """The blocks that the sequence shares with others, from its beginning."""
    return request.reservation.shared if isinstance(request.reservation, BlockReservation) else ()


def _first_pending(request: Request, computing: dict[SharedBlock, GenerationJob]) -> int:
    """Where a prompt's next chunk begins: after the blocks that other jobs of this sweep compute."""
    past = request.num_computed
    for block in _shared_blocks(request)[past // BLOCK_TOKENS :]:
        end = (past // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        if block not in computing or end >= len(request.token_ids):
            break
        computing[block].shares_blocks = True
        past = end
    return past
