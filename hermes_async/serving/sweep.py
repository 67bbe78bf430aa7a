"""One sweep: drafts, embedding rows, the model calls on the compute thread, and the choice of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, zip_longest

import anyio
import torch

from hermes_async.errors import HermesError, RequestError
from hermes_async.foreign_errors import one_request, reason_of
from hermes_async.modeling.calls import EmbeddingRows, ModelCall, NotLoadedError, PackedCall
from hermes_async.modeling.kv_cache import SequenceKV
from hermes_async.modeling.packed import PackedBatch, PackedSequence
from hermes_async.modeling.turns import TurnInput
from hermes_async.pipeload.agents import PipelineStatistics, SweepAbandoned
from hermes_async.results import FinishReason, SampledToken
from hermes_async.serving.jobs import ForwardJob, GenerationJob, Outcome
from hermes_async.serving.kv_blocks import BlockReservation
from hermes_async.serving.loaded_model import LoadedModel
from hermes_async.serving.request import Request
from hermes_async.serving.turn_caches import TurnReservation
from hermes_async.storage.threads import LoopEvent

_Rows = dict[str, dict[int, torch.Tensor]]
"""The rows of a sweep's tokens, by the name of their table, then by their number; empty if no table is read by row."""


@dataclass(frozen=True, slots=True)
class SweepOutcomes:
    """What a sweep did.

    Attributes:
        generated: One outcome for each generation job that was completed.
        error: Why no job was completed, such as a failed read; None if jobs were aborted.
    """

    generated: Sequence[Outcome] = field(default_factory=list)
    error: HermesError | None = None


class Sweep:
    """One pass over the stages. Generation jobs that are packed are one call; turns and forward jobs are a call each.

    Made for one `run`. Event-loop side only, but `_compute` runs on the compute thread.
    """

    def __init__(
        self, loaded: LoadedModel, generation: Sequence[GenerationJob] = (), forwards: Sequence[ForwardJob] = ()
    ) -> None:
        self.generation = generation
        self.forwards = forwards
        self._loaded = loaded
        self._tables = loaded.planned.partition.row_tables
        self._packed = [job for job in generation if not job.request.prepared.in_turns]
        # All mutable state. `_left` has an event for each request, set when the sweep no longer uses its KV;
        # `_reading_rows` is the scope of the read of embedding rows; `_batch` is the packed batch, and `_turns` are the
        # calls of jobs that are not packed.
        self._left = {job.request: LoopEvent() for job in generation}
        self._reading_rows: anyio.CancelScope | None = None
        self._batch: PackedBatch | None = None
        self._turns: list[tuple[GenerationJob, ModelCall]] = []

    async def run(self) -> SweepOutcomes:
        """Computes the sweep.

        A request that is aborted meanwhile leaves at the next stage and has no outcome. If that happens before anything
        is computed, the sweep ends without outcomes, and its other jobs take part in the next one.

        Raises:
            Exception: The packed call raised it, which ends the engine.

        Cancellation: ends within one stage; nothing was cached.
        """
        try:
            return await self._run()
        except SweepAbandoned:
            return SweepOutcomes()
        except HermesError as error:
            return SweepOutcomes(error=error)
        finally:
            for left in self._left.values():
                left.set()

    async def _run(self) -> SweepOutcomes:
        loaded = self._loaded
        drafting = [job for job in self.generation if job.needs_draft]
        if loaded.draft_model is not None and drafting:
            await loaded.draft_model.draft(drafting)
        kv_bytes, forwards_bytes = loaded.kv_bytes, sum(job.nbytes for job in self.forwards)
        activation_bytes = loaded.planned.workspace_of(self.generation, kv_bytes=kv_bytes) + forwards_bytes
        await loaded.lending.before_sweep(activation_bytes)
        self._check_dropped()
        rows = await self._read_rows()
        before, loads_resident = replace(loaded.pipeline.statistics), loaded.pipeline.loads_resident
        groups = self._groups()
        outcomes = await loaded.pipeline.sweep(partial(self._compute, rows), groups)
        if not self.forwards and not groups:
            self._record_times(before, loads_resident)
        return SweepOutcomes(outcomes)

    def _groups(self) -> frozenset[str]:
        """The groups of stages that its calls enter: all that there are, if a call has inputs beside tokens."""
        has_encoder = self._loaded.planned.skeleton.is_encoder_decoder
        has_inputs = any(job.model_inputs for job in self.generation)
        has_inputs = has_inputs or any(has_encoder or "pixel_values" in job.input_names for job in self.forwards)
        return frozenset(self._loaded.planned.probe.groups.values()) if has_inputs else frozenset()

    # --- aborted requests ---

    def uses(self, request: Request) -> bool:
        """Whether a request takes part in the sweep."""
        return request in self._left

    def drop(self, request: Request) -> bool:
        """Drops an aborted request at the next stage; False if the sweep already uses nothing of it."""
        if self._reading_rows is not None:
            self._reading_rows.cancel()  # the other jobs take part in the next sweep
            return False
        if self._batch is not None:
            self._mark_aborted(self._batch)
        for job, call in self._turns:
            call.dropped = call.dropped or job.request.aborted
        self._loaded.pipeline.look()
        return True

    def _mark_aborted(self, batch: PackedBatch) -> None:
        """Marks the segments of aborted requests, unless another job uses the blocks that they compute."""
        for job, segment in zip(self._packed, batch.segments, strict=True):
            if job.request.aborted and not job.shares_blocks:
                segment.abandoned = True

    def drop_forward(self, job: ForwardJob) -> None:
        """Ends the call of a cancelled forward job, at the next stage."""
        job.call.dropped = True
        self._loaded.pipeline.look()
        if self._reading_rows is not None and not self.generation and all(each.call.dropped for each in self.forwards):
            self._reading_rows.cancel()

    async def wait_left(self, request: Request) -> None:
        """Waits until the sweep no longer uses the KV of a request."""
        await self._left[request].wait()

    def _check_dropped(self) -> None:
        """Raises `SweepAbandoned` if a request was aborted, or if all jobs are dropped forward jobs."""
        dropped = [job.call.dropped for job in self.forwards]
        if any(job.request.aborted for job in self.generation) or (not self.generation and all(dropped)):
            raise SweepAbandoned

    # --- embeddings that are read by row ---

    async def _read_rows(self) -> _Rows:
        """The rows of all tokens of the sweep.

        Raises:
            SweepAbandoned: A request was aborted during the read.
        """
        reader = self._loaded.rows
        generated = (token_id for job in self.generation for token_id in _looked_up(job))
        token_ids = sorted({*generated, *(token_id for job in self.forwards for token_id in job.token_ids)})
        if reader is None or not token_ids:
            return {}
        wanted = [table.rows_of(token_ids) for table in self._tables]
        rows: list[list[torch.Tensor]] = []
        with anyio.CancelScope() as self._reading_rows:
            rows = await reader.read(wanted)
        abandoned, self._reading_rows = self._reading_rows.cancel_called, None
        if abandoned:
            raise SweepAbandoned
        return {
            table.name: dict(zip(row_ids, views, strict=True))
            for table, row_ids, views in zip(self._tables, wanted, rows, strict=True)
        }

    def _rows_of_call(self, token_ids: Sequence[int], rows: _Rows) -> dict[str, EmbeddingRows]:
        """The rows of one call. It gets no others, so that it does not depend on other calls."""
        if not rows or not token_ids:
            return {}
        return {
            table.name: EmbeddingRows.of({row: rows[table.name][row] for row in table.rows_of(token_ids)})
            for table in self._tables
        }

    # --- the calls, on the compute thread: the event loop makes no tensors ---

    def _compute(self, rows: _Rows) -> list[Outcome]:
        """Runs all calls; returns the outcomes of the generation jobs that were completed."""
        packed = self._packed_call(rows)
        calls: list[ModelCall] = [] if packed is None else [packed]
        in_turns = [job for job in self.generation if job.request.prepared.in_turns]
        self._turns = [(job, self._turn_call(job, rows)) for job in in_turns]
        for job, call in self._turns:
            call.dropped = job.request.aborted  # `drop` may have come too early for these
            calls.append(call)
        try:
            self._loaded.model.run([*calls, *(self._forward_call(job, rows) for job in self.forwards)])
        except SweepAbandoned:
            if all(call.error is None for call in calls):
                raise
        outcomes: list[Outcome] = []
        if packed is not None:
            if packed.error is not None:
                raise packed.error
            outcomes += packed.result if packed.completed else []
        ended = [(job, call) for job, call in self._turns if call.completed or call.error is not None]
        return outcomes + [self._turn_outcome(job, call) for job, call in ended]

    def _turn_call(self, job: GenerationJob, rows: _Rows) -> ModelCall:
        turns, reservation = self._loaded.turns, job.request.reservation
        assert turns is not None and isinstance(reservation, TurnReservation)
        token_ids = [*job.request.token_ids[: job.past], *job.token_ids]
        return turns.call(
            TurnInput(reservation.cache, token_ids, job.past, job.num_outputs, job.model_inputs),
            lambda logits: self._outcome(job, list(logits)),
            rows=self._rows_of_call(sorted(set(_looked_up(job))), rows),
            left=self._left[job.request],
        )

    def _turn_outcome(self, job: GenerationJob, call: ModelCall) -> Outcome:
        if call.error is None:
            outcome: Outcome = call.result
            return outcome
        if isinstance(call.error, NotLoadedError):
            raise call.error
        if isinstance(call.error, HermesError):  # such as of experts that do not exist
            return Outcome(job, 0, error=call.error)
        name = type(self._loaded.planned.skeleton.model).__name__
        error = RequestError(f"{name}.forward failed on this sequence: {reason_of(call.error)}")
        error.__cause__ = call.error
        return Outcome(job, 0, error=error)

    def _forward_call(self, job: ForwardJob, rows: _Rows) -> ModelCall:
        job.call.rows = self._rows_of_call(job.token_ids, rows)
        return job.call

    def _packed_call(self, rows: _Rows) -> PackedCall | None:
        if not self._packed:
            return None
        self._batch = PackedBatch.of(
            PackedSequence(self._kv_of(job), job.past, job.token_ids, job.num_outputs, left=self._left[job.request])
            for job in self._packed
        )
        self._mark_aborted(self._batch)  # those that `drop` came too early for
        token_ids = sorted({token_id for job in self._packed for token_id in job.token_ids})
        return self._loaded.model.packed_call(self._batch, self._choose_tokens, self._rows_of_call(token_ids, rows))

    def _kv_of(self, job: GenerationJob) -> SequenceKV:
        assert isinstance(job.request.reservation, BlockReservation)
        return job.request.reservation.kv

    def _record_times(self, before: PipelineStatistics, loads_resident: bool) -> None:
        """Records the sweep's times for the scheduler.

        Args:
            loads_resident: The sweep also waited for resident stages, which later sweeps do not.
        """
        loaded, now = self._loaded, self._loaded.pipeline.statistics
        compute_s = now.compute_seconds - before.compute_seconds
        stall_s = now.stall_seconds - before.stall_seconds
        num_tokens = sum(job.num_tokens for job in self.generation)
        if loaded.pipeline.experts.experts:  # what is read depends on the tokens, as what is computed does
            loaded.times.record(num_tokens, compute_s + stall_s)
            loaded.times.record_read(0.0)
            return
        loaded.times.record(num_tokens, compute_s)
        if loads_resident:
            return
        if loaded.pipeline.streams:
            loaded.times.record_stalls(compute_s + stall_s, stall_s)
        else:
            loaded.times.record_read(0.0)

    # --- the choice of tokens, on the compute thread ---

    def _choose_tokens(self, logits: torch.Tensor) -> list[Outcome]:
        """The outcomes of all jobs that were not dropped; `logits` are [outputs, vocab]."""
        assert self._batch is not None
        outcomes = []
        rows = iter(logits)
        for job, segment in zip(self._packed, self._batch.segments, strict=True):
            own = list(islice(rows, job.num_outputs))
            if not segment.dropped:
                outcomes.append(self._outcome(job, own))
        return outcomes

    def _outcome(self, job: GenerationJob, logits: list[torch.Tensor]) -> Outcome:
        """Chooses tokens up to the first that differs from its draft.

        The request's sampler chooses each token as it would without drafts: it draws once for each token, in the same
        order. So greedy and sampled tokens do not depend on drafts.
        Source: rejection sampling (Leviathan et al., arXiv 2211.17192) for a draft that is certain of its tokens.
        """
        request = job.request
        length = job.past + len(job.token_ids) - job.num_drafted
        if not logits or request.aborted:
            return Outcome(job, length)
        drafted = job.token_ids[len(job.token_ids) - job.num_drafted :]
        sampled: list[SampledToken] = []
        text = ""
        reason: FinishReason | None = None
        for row, draft in zip_longest(logits, drafted):
            try:
                with one_request("the choice of a token"):
                    token = request.prepared.sampler.sample(row)
                with one_request("the decoding of a token"):
                    delta, reason = self._next_text(request, [*sampled, token])
            except RequestError as error:
                return Outcome(job, length + len(sampled), tuple(sampled), text, error=error)
            sampled.append(token)
            text += delta
            if reason is not None or token.token_id != draft:
                break
        return Outcome(job, length + len(sampled) - 1, tuple(sampled), text, reason)

    def _next_text(self, request: Request, sampled: Sequence[SampledToken]) -> tuple[str, FinishReason | None]:
        """The text that is certain with the last token, and the finish reason if the request ends with it."""
        token_id, params = sampled[-1].token_id, request.params
        eos_token_ids = self._loaded.planned.skeleton.eos_token_ids
        ends = token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)
        reason: FinishReason | None = "stop" if ends else None
        if reason is None and len(sampled) == request.num_left:
            reason = "length"
        if request.prepared.text_stream is None:
            return "", reason
        if ends and not params.include_stop_str_in_output:
            return request.prepared.text_stream.finish(), reason
        delta = request.prepared.text_stream.push(token_id, final=reason is not None)
        return delta.text, "stop" if delta.stopped else reason


def _looked_up(job: GenerationJob) -> Iterable[int]:
    """The token ids that the job's call embeds."""
    return job.token_ids if job.past else chain(job.token_ids, job.request.prepared.encoder_ids)
