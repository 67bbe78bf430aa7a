"""A small model that drafts tokens for a large one; all of it stays in memory, inside the same budget."""

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
from hermes_async.modeling.kv_cache import KVPool, Segment, SequenceKV, num_blocks, num_kept
from hermes_async.modeling.packed import PackedBatch
from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.pipeload.stage import Stage
from hermes_async.serving.planned_model import PlannedDraft
from hermes_async.serving.request import Request
from hermes_async.serving.scheduler import Scheduled
from hermes_async.serving.sweep_times import SweepTimes
from hermes_async.storage.buffers import BufferPool
from hermes_async.storage.reader import ReadStatistics
from hermes_async.storage.tensor_spec import file_states
from hermes_async.storage.threads import run_in_thread


@dataclass(eq=False, slots=True)
class _Sequence:
    """What the draft model has of one request: its KV, and the tokens that are in it."""

    kv: SequenceKV
    token_ids: list[int] = field(default_factory=list)

    def keep_common(self, token_ids: Sequence[int]) -> None:
        """Forgets what was drafted and not accepted."""
        self.kv.length = num_kept(self.token_ids, token_ids)
        del self.token_ids[self.kv.length :]


class DraftModel:
    """Drafts for the sequences of a sweep, all of them in one batch.

    Each token is drafted by a copy of the request's own sampler, which draws the same random numbers as the sampler
    itself will when it verifies. So where both models agree the draft is right also when tokens are sampled, and what
    is verified keeps its distribution (see `SweepRunner`).

    Attributes:
        times: What its passes take, for all sequences together.
    """

    def __init__(self, opened: PlannedDraft, model: StreamedModel, pool: KVPool, vocab_size: int) -> None:
        self.times = SweepTimes()
        self._model = model
        self._pool = pool
        self._vocab_size = vocab_size
        self._max_tokens = opened.max_tokens
        self._context_length = opened.skeleton.context_length
        # All mutable state.
        self._sequences: dict[Request, _Sequence] = {}

    def can_draft(self, request: Request) -> bool:
        """Whether there is room for the request's sequence; makes room at its first call."""
        if request in self._sequences:
            return True
        count = num_blocks(request.prepared.capacity)
        too_long = self._context_length is not None and request.prepared.capacity > self._context_length
        if too_long or count > self._pool.num_blocks - self._pool.num_used:
            return False
        self._sequences[request] = _Sequence(SequenceKV(self._pool, self._pool.allocate(count)))
        return True

    def forget(self, request: Request) -> None:
        """Gives back what is held for a request; no draft of it may be under way."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self._pool.free(sequence.kv.blocks)

    async def draft(self, items: Sequence[Scheduled]) -> None:
        """Puts `num_drafted` tokens behind the last token of each item.

        Cancellation: waits for the draft to end, which takes a small model's passes.
        """
        await run_in_thread(self._draft, items)

    def _draft(self, items: Sequence[Scheduled]) -> None:
        left = {item: item.num_drafted for item in items}
        samplers = {item: copy.deepcopy(item.request.prepared.sampler) for item in items}
        for item in items:
            self._sequences[item.request].keep_common(item.request.token_ids)
        with torch.inference_mode():
            while left:
                for item, row in self._pass(list(left)):
                    try:
                        with one_request("the choice of a drafted token"):
                            item.token_ids.append(samplers[item].sample(row).token_id)
                        left[item] -= 1
                    except RequestError:  # nothing to choose from, for this model: the other one decides
                        item.num_drafted -= left[item]
                        left[item] = 0
                    if left[item] == 0:
                        del left[item]

    def _pass(self, items: Sequence[Scheduled]) -> list[tuple[Scheduled, torch.Tensor]]:
        """One pass over what is pending of each item, as far as there is room; logits where nothing more is pending."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        segments: list[Segment] = []
        outputs: list[tuple[Scheduled, int]] = []
        for item in items:
            sequence = self._sequences[item.request]
            length = sequence.kv.length
            pending = [*item.request.token_ids, *item.token_ids[1:]][length:]
            chunk = pending[: self._max_tokens - len(input_ids)]
            if not chunk:
                break
            segments.append(Segment(len(input_ids), len(input_ids) + len(chunk), sequence.kv, length))
            input_ids += chunk
            position_ids += range(length, length + len(chunk))
            if len(chunk) == len(pending):
                outputs.append((item, len(input_ids) - 1))
        started = time.perf_counter()
        logits = self._model.forward(
            PackedBatch(
                input_ids=torch.tensor([input_ids]),
                position_ids=torch.tensor([position_ids]),
                segments=segments,
                logits_positions=torch.tensor([position for _, position in outputs], dtype=torch.long),
            )
        )
        self.times.record(len(input_ids), time.perf_counter() - started)
        for item, segment in zip(items, segments, strict=False):
            sequence = self._sequences[item.request]
            sequence.token_ids += input_ids[segment.start : segment.end]
            sequence.kv.length = len(sequence.token_ids)
        return [(item, self._of_target(row)) for (item, _), row in zip(outputs, logits, strict=True)]

    def _of_target(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits for the target's vocabulary: heads of one tokenizer may be padded differently."""
        return F.pad(logits[: self._vocab_size], (0, max(0, self._vocab_size - len(logits))), value=-torch.inf)


@asynccontextmanager
async def running_draft_model(
    opened: PlannedDraft, governor: MemoryGovernor, statistics: ReadStatistics, vocab_size: int, *, direct: bool
) -> AsyncGenerator[DraftModel, None]:
    """Takes the draft model's memory and loads it; undoes both in reverse order.

    Raises:
        ReadError: Weights could not be read.
    """
    async with AsyncExitStack() as exits:
        exits.enter_context(governor.acquire_nowait("draft model", opened.fixed_bytes))
        exits.enter_context(governor.acquire_nowait("KV of the draft model", opened.kv_bytes))
        pool = KVPool(opened.seen.kv, opened.kv_bytes)
        exits.callback(pool.close)
        layouts = [layout for layout in (opened.partition.base, *opened.partition.stages) if layout.placements]
        stages = [Stage(idx, layout, resident=True) for idx, layout in enumerate(layouts)]
        pipeline = Pipeline(
            stages,
            num_loading_agents=1,
            ring=BufferPool(0, 0),
            statistics=statistics,
            direct=direct,
            file_states=file_states(opened.skeleton.tensors.values()),
        )
        model = StreamedModel(
            opened.skeleton.model,
            opened.attention,
            stages,
            streamed_embedding=False,
            gate=pipeline,
            on_stage=lambda batch: None,
        )
        exits.callback(model.close)
        await exits.enter_async_context(pipeline.running())
        await pipeline.wait_resident()
        yield DraftModel(opened, model, pool, vocab_size)
