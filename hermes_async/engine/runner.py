"""Runs one sweep: packs what the scheduler chose, computes it on the inference thread, and chooses the next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio.from_thread
import torch

from hermes_async.engine.request import FinishReason, Request
from hermes_async.engine.scheduler import Scheduled
from hermes_async.errors import RequestError
from hermes_async.modeling.kv_cache import Segment
from hermes_async.modeling.packed import PackedBatch
from hermes_async.modeling.sampling import SampledToken
from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.pipeline import Pipeline, SweepAbandoned
from hermes_async.storage.rows import RowReader


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep did for one request.

    Attributes:
        num_tokens: Tokens whose keys and values are now cached.
        sampled: The next token; None after a chunk of a prompt that goes on.
        text: The text that this token makes certain, with the rest of it where the request ends.
        finish_reason: Where the request ends with this token.
        error: Why no token could be chosen for this request.
    """

    request: Request
    num_tokens: int
    sampled: SampledToken | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    error: RequestError | None = None


class SweepRunner:
    """Owns the model while the engine runs; one sweep at a time.

    Args:
        rows: Reads the input embedding's rows; None where it is resident.
        eos_token_ids: The model's end-of-sequence tokens.
        release: Gives an aborted request's memory back; called on the event loop.
    """

    def __init__(
        self,
        model: StreamedModel,
        pipeline: Pipeline,
        rows: RowReader | None,
        *,
        eos_token_ids: frozenset[int],
        release: Callable[[Request], None],
    ) -> None:
        self._model = model
        self._pipeline = pipeline
        self._rows = rows
        self._eos_token_ids = eos_token_ids
        self._release = release
        self.sweep: Sequence[Scheduled] = ()

    async def run(self, sweep: Sequence[Scheduled]) -> list[Outcome]:
        """Computes one sweep. Requests that are aborted meanwhile are dropped at the next stage, and have no outcome.

        Raises:
            SweepAbandoned: Every request was aborted.
            ReadError: Weights could not be read; nothing was cached.

        Cancellation: ends within one stage; nothing was cached.
        """
        self.sweep = sweep
        try:
            token_ids = [token_id for item in sweep for token_id in item.token_ids]
            needed = sorted(set(token_ids))
            rows = None if self._rows is None else await self._rows.read(needed)
            if all(item.request.aborted for item in sweep):  # `abandon` came before the pipeline's sweep began
                raise SweepAbandoned
            return await self._pipeline.sweep(lambda: self._compute(sweep, token_ids, needed, rows))
        finally:
            self.sweep = ()

    def abort(self, request: Request) -> bool:
        """Tells the running sweep of an aborted request; False if it is not in it."""
        if not any(item.request is request for item in self.sweep):
            return False
        if all(item.request.aborted for item in self.sweep):
            self._pipeline.abandon()
        return True

    def drop_aborted(self, batch: PackedBatch) -> None:
        """Called by the compute thread before each stage."""
        for item, segment in zip(self.sweep, batch.segments, strict=True):
            if item.request.aborted and not segment.dropped:
                segment.dropped = True
                anyio.from_thread.run_sync(self._release, item.request)

    def _compute(
        self,
        sweep: Sequence[Scheduled],
        token_ids: list[int],
        needed: list[int],
        rows: list[torch.Tensor] | None,
    ) -> list[Outcome]:
        with torch.inference_mode():
            batch = _pack(sweep, token_ids, needed, rows)
            logits = self._model.forward(batch)
            outcomes = []
            next_logits = iter(logits)
            for item, segment in zip(sweep, batch.segments, strict=True):
                row = next(next_logits) if item.samples else None
                if not item.request.aborted and not segment.dropped:
                    outcomes.append(self._outcome(item, row))
            return outcomes

    def _outcome(self, item: Scheduled, logits: torch.Tensor | None) -> Outcome:
        request = item.request
        if logits is None:
            return Outcome(request, len(item.token_ids))
        try:
            sampled = request.prepared.sampler.sample(logits)
        except RequestError as error:
            return Outcome(request, len(item.token_ids), error=error)
        params = request.params
        num_output = request.num_output_tokens + 1
        ends = sampled.token_id in params.stop_token_ids or (
            sampled.token_id in self._eos_token_ids and not params.ignore_eos
        )
        reason: FinishReason | None = "stop" if ends else None
        if reason is None and (
            num_output == params.max_tokens or len(request.token_ids) + 1 >= request.prepared.capacity
        ):
            reason = "length"
        text = ""
        if request.prepared.text_stream is not None:
            delta = request.prepared.text_stream.push(sampled.token_id, final=reason is not None)
            text = delta.text
            if delta.stopped:
                reason = "stop"
        return Outcome(request, len(item.token_ids), sampled, text, reason)


def _pack(
    sweep: Sequence[Scheduled], token_ids: list[int], needed: list[int], rows: list[torch.Tensor] | None
) -> PackedBatch:
    segments: list[Segment] = []
    position_ids: list[int] = []
    logits_positions: list[int] = []
    for item in sweep:
        assert item.request.kv is not None
        start, length = len(position_ids), item.request.kv.length
        position_ids += range(length, length + len(item.token_ids))
        segments.append(Segment(start, len(position_ids), item.request.kv))
        if item.samples:
            logits_positions.append(len(position_ids) - 1)
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
