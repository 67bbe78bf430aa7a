"""Plain forward passes: each gives transformers' own output, and those that wait at one time share a sweep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import torch

from hermes_async.config import format_bytes, format_count
from hermes_async.errors import HermesError, MemoryBudgetError, RequestError
from hermes_async.modeling.activations import recorded_bytes
from hermes_async.modeling.inputs import checked_inputs, count_tokens, embedded_inputs
from hermes_async.modeling.passes import EmbeddingRows, ForwardPass, NotLoadedError
from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.pipeline import Pipeline, SweepAbandoned
from hermes_async.planning.plan import Plan
from hermes_async.serving.planned_model import PlannedModel
from hermes_async.storage.rows import RowReader


@dataclass(eq=False)
class ForwardRequest:
    """One forward pass that somebody waits for.

    Attributes:
        inputs: The names of what the model is given.
        token_ids: All that its input embedding may be given, each once, sorted.
        num_tokens: Of all its sequences or images, padding included.
        nbytes: Most memory that its activations take.
        done: Set when it has a result or an error.
        error: Why it has none.
    """

    forward_pass: ForwardPass
    inputs: tuple[str, ...]
    token_ids: list[int]
    num_tokens: int
    nbytes: int
    done: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | None = None

    def end(self, error: HermesError | None = None) -> None:
        self.error = error
        self.done.set()


def prepare_forward(
    opened: PlannedModel,
    inputs: Mapping[str, Any],
    then: Callable[[Any], Any] = lambda output: output,
    *,
    base: bool = False,
) -> ForwardRequest:
    """Checks inputs against the model and the plan; for a worker thread.

    Args:
        then: Makes of the output what is wanted, on the inference thread.
        base: Leave the model's head out, and a decoder behind an encoder.

    Raises:
        RequestError: As `checked_inputs`.
        MemoryBudgetError: The activations would take more than the plan sets aside for them.
    """
    skeleton, plan = opened.skeleton, opened.plan
    model = skeleton.text_encoder if base else skeleton.named_model
    checked = checked_inputs(skeleton, model, inputs)
    sequences, tokens = count_tokens(checked, opened.seen)
    nbytes = opened.forward_bytes(sequences, tokens) + recorded_bytes(
        skeleton,
        sequences,
        tokens,
        hidden_states=bool(checked.get("output_hidden_states")),
        attentions=bool(checked.get("output_attentions")),
    )
    embedded = [checked[key].flatten() for key in embedded_inputs(model, checked)]
    token_ids = torch.unique(torch.cat(embedded)).tolist() if embedded else []
    num_tokens = max(sequences * tokens, len(token_ids))
    if nbytes > plan.workspace_bytes or num_tokens > plan.max_tokens_per_sweep:
        minimum = plan.memory_budget + max(0, nbytes - plan.workspace_bytes)
        raise MemoryBudgetError(
            f"{format_count(num_tokens, 'token')} ({sequences} sequences or images of {tokens}) may take "
            f"{format_bytes(nbytes)} of activations; the plan sets aside {format_bytes(plan.workspace_bytes)} for "
            f"{format_count(plan.max_tokens_per_sweep, 'token')}. Give fewer at once, "
            f"or the engine max_tokens_per_sweep={num_tokens} and a memory_budget of about "
            f"{format_bytes(minimum)}",
            requested_bytes=nbytes,
            budget_bytes=plan.workspace_bytes,
            minimum_bytes=minimum,
        )

    def compute() -> Any:
        return then(model(**checked))

    return ForwardRequest(ForwardPass(compute), tuple(checked), token_ids, num_tokens, nbytes)


class Forwarding:
    """The passes that wait, and the sweeps that run them. Event-loop side only.

    Args:
        rows: Reads the input embedding's rows; None where it is resident.
        wake: Called when there is something to do.
    """

    def __init__(
        self, model: StreamedModel, pipeline: Pipeline, rows: RowReader | None, plan: Plan, wake: Callable[[], None]
    ) -> None:
        self._model = model
        self._pipeline = pipeline
        self._rows = rows
        self._plan = plan
        self._wake = wake
        # All mutable state: who waits, in order; who is in the running sweep, and its read of embedding rows.
        self._waiting: deque[ForwardRequest] = deque()
        self._running: list[ForwardRequest] = []
        self._reading_rows: anyio.CancelScope | None = None

    @property
    def num_under_way(self) -> int:
        """Passes that wait, or are in the running sweep."""
        return len(self._waiting) + len(self._running)

    async def run(self, request: ForwardRequest) -> Any:
        """Waits for a pass and returns its result.

        Raises:
            RequestError: The model's forward does not run on these inputs.
            ReadError: Weights could not be read; the engine goes on.

        Cancellation: the pass ends before its next stage.
        """
        self._waiting.append(request)
        self._wake()
        try:
            await request.done.wait()
        finally:
            if not request.done.is_set():
                self._drop(request)
        if request.error is not None:
            raise request.error from request.error.__cause__
        return request.forward_pass.result

    def take(self) -> list[ForwardRequest]:
        """The next sweep: as many as there is memory for, first come, first served."""
        taken: list[ForwardRequest] = []
        num_tokens, nbytes = self._plan.max_tokens_per_sweep, self._plan.workspace_bytes
        while self._waiting and self._waiting[0].num_tokens <= num_tokens and self._waiting[0].nbytes <= nbytes:
            request = self._waiting.popleft()
            num_tokens, nbytes = num_tokens - request.num_tokens, nbytes - request.nbytes
            taken.append(request)
        return taken

    async def sweep(self, requests: list[ForwardRequest]) -> None:
        """Runs a sweep; each request then is done.

        Cancellation: ends within one stage; the requests are not done until `end` is called.
        """
        self._running = requests
        passes = [request.forward_pass for request in requests]
        error: HermesError | None = None
        try:
            needed = sorted({token_id for request in requests for token_id in request.token_ids})
            rows: list[torch.Tensor] = []
            if self._rows is not None and needed:
                with anyio.CancelScope() as self._reading_rows:
                    rows = await self._rows.read(needed)
            if not all(forward_pass.dropped for forward_pass in passes):
                await self._pipeline.sweep(partial(self._compute, requests, dict(zip(needed, rows, strict=False))))
        except SweepAbandoned:  # each of the passes knows why
            pass
        except HermesError as read_error:
            error = read_error
        self._running, self._reading_rows = [], None
        for request in requests:
            request.end(error or self._error_of(request))

    def end(self, error: HermesError) -> None:
        """Ends all that wait or were running."""
        for request in (*self._running, *self._waiting):
            request.end(error)
        self._waiting.clear()

    def _drop(self, request: ForwardRequest) -> None:
        request.forward_pass.dropped = True
        if request in self._waiting:
            self._waiting.remove(request)
        elif self._running and all(other.forward_pass.dropped for other in self._running):
            self._pipeline.abandon()
            if self._reading_rows is not None:
                self._reading_rows.cancel()

    def _compute(self, requests: list[ForwardRequest], rows: Mapping[int, torch.Tensor]) -> None:
        """On the inference agent's thread. Each pass gets the rows of its own tokens."""
        for request in requests:
            if rows and request.token_ids:
                request.forward_pass.embedding = EmbeddingRows(
                    torch.stack([rows[token_id] for token_id in request.token_ids]), torch.tensor(request.token_ids)
                )
        self._model.run_passes([request.forward_pass for request in requests])

    def _error_of(self, request: ForwardRequest) -> HermesError | None:
        error = request.forward_pass.error
        name = type(self._model.model).__name__
        if isinstance(error, NotLoadedError):
            given = ", ".join(name for name in request.inputs if name != "use_cache")
            not_here = RequestError(f"{name}.forward cannot be given {given} together here; leave some out: {error}")
            not_here.__cause__ = error
            return not_here
        if error is None or isinstance(error, HermesError):
            return error
        reason = (str(error).strip().splitlines() or [""])[0]
        refused = RequestError(f"{name}.forward does not run on these inputs: {type(error).__name__}: {reason}")
        refused.__cause__ = error
        return refused
