"""Runs one sweep: packs what the scheduler chose, computes it on the inference thread, and chooses the next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

import anyio
import torch

from hermes_async.errors import RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.modeling.kv_cache import Segment
from hermes_async.modeling.packed import PackedBatch
from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.pipeline import Pipeline, PipelineStatistics, SweepAbandoned
from hermes_async.results import FinishReason, SampledToken
from hermes_async.serving.draft_model import DraftModel
from hermes_async.serving.request import Request
from hermes_async.serving.scheduler import Scheduled
from hermes_async.serving.sweep_times import SweepTimes
from hermes_async.storage.rows import RowReader


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep did for one request.

    Attributes:
        length: Tokens of the sequence whose keys and values are there to stay now.
        sampled: The next tokens: none after a chunk of a prompt that goes on, more than one where drafts were right.
        text: The text that these tokens make certain, with the rest of it where the request ends.
        finish_reason: Where the request ends with the last of them.
        error: Why no token could be chosen or decoded for this request.
    """

    item: Scheduled
    length: int
    sampled: tuple[SampledToken, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: RequestError | None = None


class SweepRunner:
    """Owns the model while the engine runs; one sweep at a time.

    Args:
        rows: Reads the input embedding's rows; None where it is resident.
        times: Told of each sweep.
        draft_model: Drafts where the scheduler says so.
        eos_token_ids: The model's end-of-sequence tokens.
        release: Gives an aborted request's memory back; called on the event loop.
    """

    def __init__(
        self,
        model: StreamedModel,
        pipeline: Pipeline,
        rows: RowReader | None,
        *,
        times: SweepTimes,
        draft_model: DraftModel | None,
        eos_token_ids: frozenset[int],
        release: Callable[[Request], None],
    ) -> None:
        self._model = model
        self._pipeline = pipeline
        self._rows = rows
        self._times = times
        self._draft_model = draft_model
        self._eos_token_ids = eos_token_ids
        self._release = release
        # All mutable state: the running sweep, and its read of embedding rows.
        self.sweep: Sequence[Scheduled] = ()
        self._reading_rows: anyio.CancelScope | None = None

    async def run(self, sweep: Sequence[Scheduled]) -> list[Outcome]:
        """Computes one sweep. Requests that are aborted meanwhile are dropped at the next stage, and have no outcome.

        One that is aborted before anything is computed ends the sweep, and the others go in the next one.

        Raises:
            SweepAbandoned: Every request was aborted, or any before something was computed.
            ReadError: Weights could not be read; nothing was cached.

        Cancellation: ends within one stage; nothing was cached.
        """
        self.sweep = sweep
        try:
            drafting = [item for item in sweep if item.from_draft_model]
            if self._draft_model is not None and drafting:
                await self._draft_model.draft(drafting)
            token_ids = [token_id for item in sweep for token_id in item.token_ids]
            needed = sorted(set(token_ids))
            if any(item.request.aborted for item in sweep):  # while drafts were made: nothing is computed yet
                raise SweepAbandoned
            rows = None if self._rows is None else await self._read_rows(self._rows, needed)
            before, opening = replace(self._pipeline.statistics), self._pipeline.loads_resident
            outcomes = await self._pipeline.sweep(lambda: self._compute(sweep, token_ids, needed, rows))
            self._record_times(len(token_ids), before, opening)
            return outcomes
        finally:
            self.sweep, self._reading_rows = (), None

    async def _read_rows(self, reader: RowReader, needed: list[int]) -> list[torch.Tensor]:
        """Raises `SweepAbandoned` as soon as a request is aborted: nobody is held by a read that hangs."""
        rows: list[torch.Tensor] = []
        with anyio.CancelScope() as self._reading_rows:
            rows = await reader.read(needed)
        abandoned, self._reading_rows = self._reading_rows.cancel_called, None
        if abandoned:
            raise SweepAbandoned
        return rows

    def _record_times(self, num_tokens: int, before: PipelineStatistics, opening: bool) -> None:
        """`opening`: Stages that stay were read too, which says nothing of the sweeps to come."""
        now = self._pipeline.statistics
        compute_seconds = now.compute_seconds - before.compute_seconds
        stall_seconds = now.stall_seconds - before.stall_seconds
        self._times.record(num_tokens, compute_seconds)
        if opening:
            return
        if self._pipeline.streams:
            self._times.record_stalls(compute_seconds + stall_seconds, stall_seconds)
        else:
            self._times.record_read(0.0)

    def abort(self, request: Request) -> bool:
        """Tells the running sweep of an aborted request; False if it uses nothing of the request's."""
        if not any(item.request is request for item in self.sweep):
            return False
        if self._reading_rows is not None:
            self._reading_rows.cancel()  # the others begin again, without it
            return False
        if all(item.request.aborted for item in self.sweep):
            self._pipeline.abandon()
        else:
            self._pipeline.look()
        return True

    def drop_aborted(self, batch: PackedBatch) -> None:
        """Called by the compute thread before each stage, and while it waits for one."""
        for item, segment in zip(self.sweep, batch.segments, strict=True):
            if item.request.aborted and not segment.dropped and not item.needed:
                segment.dropped = True
                self._pipeline.call_on_loop(self._release, item.request)

    def _compute(
        self,
        sweep: Sequence[Scheduled],
        token_ids: list[int],
        needed: list[int],
        embedding_rows: list[torch.Tensor] | None,
    ) -> list[Outcome]:
        with torch.inference_mode():
            batch = _pack(sweep, token_ids, needed, embedding_rows)
            logits = self._model.forward(batch)
            outcomes = []
            next_logits = iter(logits)
            for item, segment in zip(sweep, batch.segments, strict=True):
                rows = list(islice(next_logits, item.num_outputs))
                if not segment.dropped:
                    outcomes.append(self._outcome(item, rows))
            return outcomes

    def _outcome(self, item: Scheduled, logits: list[torch.Tensor]) -> Outcome:
        """Chooses tokens for as long as they are what was drafted.

        A token is chosen as it would be without drafts, by the request's own sampler; a draft only foresees it. So
        greedy tokens are the same, and sampled ones too: the sampler draws once for each token, in the same order.
        This is rejection sampling (Leviathan et al., arXiv 2211.17192) for a draft that is certain of its tokens.
        """
        request = item.request
        length = item.past + len(item.token_ids)
        if not logits or request.aborted:
            return Outcome(item, length - item.num_drafted)
        length -= item.num_drafted
        drafted = item.token_ids[len(item.token_ids) - item.num_drafted :]
        sampled: list[SampledToken] = []
        text = ""
        reason: FinishReason | None = None
        for row, draft in zip_longest(logits, drafted):
            try:
                with one_request("the choice of a token"):
                    token = request.prepared.sampler.sample(row)
                with one_request("the decoding of a token"):
                    delta, reason = self._after(request, [*sampled, token])
            except RequestError as error:
                return Outcome(item, length + len(sampled), tuple(sampled), text, error=error)
            sampled.append(token)
            text += delta
            if reason is not None or sampled[-1].token_id != draft:
                break
        return Outcome(item, length + len(sampled) - 1, tuple(sampled), text, reason)

    def _after(self, request: Request, sampled: Sequence[SampledToken]) -> tuple[str, FinishReason | None]:
        """The text that the last token makes certain, and whether the request ends with it."""
        token_id, params = sampled[-1].token_id, request.params
        ends = token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)
        reason: FinishReason | None = "stop" if ends else None
        if reason is None and len(sampled) == request.num_left:
            reason = "length"
        if request.prepared.text_stream is None:
            return "", reason
        if ends and not params.include_stop_str_in_output:
            return request.prepared.text_stream.finish(), reason
        delta = request.prepared.text_stream.push(token_id, final=reason is not None)
        return delta.text, "stop" if delta.stopped else reason


def _pack(
    sweep: Sequence[Scheduled], token_ids: list[int], needed: list[int], rows: list[torch.Tensor] | None
) -> PackedBatch:
    segments: list[Segment] = []
    position_ids: list[int] = []
    logits_positions: list[int] = []
    for item in sweep:
        start, end = len(position_ids), len(position_ids) + len(item.token_ids)
        position_ids += range(item.past, item.past + len(item.token_ids))
        segments.append(Segment(start, end, item.request.kv, item.past))
        logits_positions += range(end - item.num_outputs, end)
    batch = PackedBatch(
        input_ids=torch.tensor([token_ids]),
        position_ids=torch.tensor([position_ids]),
        segments=segments,
        logits_positions=torch.tensor(logits_positions, dtype=torch.long),
    )
    if rows is not None:
        index = {token_id: row for row, token_id in enumerate(needed)}
        batch.embedding_rows = torch.stack(rows)
        batch.embedding_index = torch.tensor([[index[token_id] for token_id in token_ids]])
    return batch
