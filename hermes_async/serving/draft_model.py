"""A small model that drafts tokens for a large one. It is resident, in the same budget."""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from hermes_async.errors import RequestError
from hermes_async.foreign_errors import one_request
from hermes_async.modeling.kv_cache import KVPool, SequenceKV, num_blocks, num_kept
from hermes_async.modeling.packed import PackedBatch, PackedSequence
from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import Stage
from hermes_async.serving.jobs import GenerationJob
from hermes_async.serving.planned_model import PlannedDraft
from hermes_async.serving.request import Request
from hermes_async.serving.sweep_times import SweepTimes
from hermes_async.storage.buffers import BufferLock, BufferPool
from hermes_async.storage.read_watch import ReadWatch
from hermes_async.storage.reader import ReadStatistics
from hermes_async.storage.tensor_spec import file_states
from hermes_async.storage.threads import run_in_thread


@dataclass(eq=False, slots=True)
class _DraftSequence:
    """The draft model's KV of one request, and the tokens in it."""

    kv: SequenceKV
    token_ids: list[int] = field(default_factory=list)

    def keep_common(self, token_ids: Sequence[int]) -> None:
        """Drops the drafted tokens that were not accepted."""
        self.kv.length = num_kept(self.token_ids, token_ids)
        del self.token_ids[self.kv.length :]


class DraftModel:
    """Drafts for all sequences of a sweep in one batch.

    A copy of the request's sampler chooses each drafted token, with the random numbers that the sampler itself will use
    when it verifies the token. So a sampled draft is right wherever both models agree (see `Sweep._outcome`).

    Attributes:
        times: Seconds of its passes, by tokens of all sequences together.
    """

    def __init__(self, opened: PlannedDraft, model: StreamedModel, pool: KVPool, vocab_size: int) -> None:
        self.times = SweepTimes()
        self._model = model
        self._pool = pool
        self._vocab_size = vocab_size
        self._max_tokens = opened.max_tokens
        self._context_length = opened.skeleton.context_length
        # All mutable state.
        self._sequences: dict[Request, _DraftSequence] = {}

    def can_draft(self, request: Request) -> bool:
        """Whether the request has KV here. The first call for a request allocates it, if there is room."""
        if request in self._sequences:
            return True
        count = num_blocks(request.prepared.capacity)
        too_long = self._context_length is not None and request.prepared.capacity > self._context_length
        if too_long or count > self._pool.num_blocks - self._pool.num_used:
            return False
        try:
            blocks = self._pool.allocate(count)
        except MemoryError:  # a draft only saves time
            return False
        self._sequences[request] = _DraftSequence(SequenceKV(self._pool, blocks))
        return True

    def forget(self, request: Request) -> None:
        """Frees a request's KV; no draft for it may be under way."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self._pool.free(sequence.kv.blocks)

    async def draft(self, jobs: Sequence[GenerationJob]) -> None:
        """Appends `num_drafted` tokens to each job.

        Cancellation: waits for the end of the draft, some passes of the small model.
        """
        await run_in_thread(self._draft, jobs)

    def _draft(self, jobs: Sequence[GenerationJob]) -> None:
        num_left = {job: job.num_drafted for job in jobs}
        samplers = {job: copy.deepcopy(job.request.prepared.sampler) for job in jobs}
        for job in jobs:
            self._sequences[job.request].keep_common(job.request.token_ids)
        with torch.inference_mode():
            while num_left:
                for job, row in self._run_pass(list(num_left)):
                    try:
                        with one_request("the choice of a drafted token"):
                            job.token_ids.append(samplers[job].sample(row).token_id)
                        num_left[job] -= 1
                    except RequestError:  # no token can be chosen from these logits: the draft ends here
                        job.num_drafted -= num_left[job]
                        num_left[job] = 0
                    if num_left[job] == 0:
                        del num_left[job]

    def _run_pass(self, jobs: Sequence[GenerationJob]) -> list[tuple[GenerationJob, torch.Tensor]]:
        """Computes pending tokens of the jobs, up to `max_tokens`; logits [vocab] of jobs with none left pending."""
        packed: list[PackedSequence] = []
        num_left = self._max_tokens
        for job in jobs:
            kv = self._sequences[job.request].kv
            pending = [*job.request.token_ids, *job.token_ids[1:]][kv.length :]
            chunk = pending[:num_left]
            if not chunk:
                break
            num_left -= len(chunk)
            packed.append(PackedSequence(kv, kv.length, chunk, num_outputs=int(len(chunk) == len(pending))))
        started = time.perf_counter()
        logits = self._model.forward(PackedBatch.of(packed))
        self.times.record(self._max_tokens - num_left, time.perf_counter() - started)
        for job, packed_job in zip(jobs, packed, strict=False):
            sequence = self._sequences[job.request]
            sequence.token_ids += packed_job.token_ids
            sequence.kv.length = len(sequence.token_ids)
        outputs = [job for job, packed_job in zip(jobs, packed, strict=False) if packed_job.num_outputs]
        return [(job, self._target_logits(row)) for job, row in zip(outputs, logits, strict=True)]

    def _target_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Fits logits to the target's vocabulary: two heads for one tokenizer may be padded differently."""
        return F.pad(logits[: self._vocab_size], (0, max(0, self._vocab_size - len(logits))), value=-torch.inf)


@asynccontextmanager
async def running_draft_model(
    opened: PlannedDraft,
    governor: MemoryGovernor,
    statistics: ReadStatistics,
    vocab_size: int,
    *,
    direct: bool,
    lock: BufferLock,
    watch: ReadWatch,
) -> AsyncGenerator[DraftModel, None]:
    """Leases the draft model's memory and loads its weights.

    Raises:
        ReadError: Weights could not be read, or a read is overdue.
    """
    async with AsyncExitStack() as exits:
        exits.enter_context(governor.acquire_nowait("draft model", opened.fixed_bytes))
        exits.enter_context(governor.acquire_nowait("KV of the draft model", opened.kv_bytes))
        pool = KVPool(opened.probe.kv, opened.kv_bytes)
        exits.callback(pool.close)
        layouts = [layout for layout in (opened.partition.base, *opened.partition.stages) if layout.placements]
        stages = [Stage(idx, layout, resident=True) for idx, layout in enumerate(layouts)]
        pipeline = Pipeline(
            stages,
            num_loading_agents=1,
            ring=MemoryGovernor(0),
            buffers=BufferPool(0, 0),
            lock=lock,
            statistics=statistics,
            direct=direct,
            file_states=file_states(opened.skeleton.tensors.values()),
            watch=watch,
        )
        model = StreamedModel(opened.skeleton.model, opened.attention, stages, products=opened.products, gate=pipeline)
        exits.callback(model.close)
        await exits.enter_async_context(pipeline.running())
        await pipeline.wait_resident()
        yield DraftModel(opened, model, pool, vocab_size)
