"""Forward passes: checks their inputs, queues them for a sweep, and makes errors for users."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from hermes_async.config import format_bytes, format_count
from hermes_async.errors import HermesError, MemoryBudgetError, RequestError
from hermes_async.foreign_errors import reason_of
from hermes_async.modeling.calls import ModelCall, NotLoadedError
from hermes_async.modeling.inputs import checked_inputs, count_tokens, embedded_token_ids, num_values
from hermes_async.modeling.kernels import bounded_attention
from hermes_async.serving.jobs import ForwardJob
from hermes_async.serving.planned_model import PlannedModel


def prepare_forward(
    planned: PlannedModel,
    inputs: Mapping[str, Any],
    then: Callable[[Any], Any] = lambda output: output,
    *,
    base: bool = False,
) -> ForwardJob:
    """Checks inputs against the model and the plan. Call it on a worker thread.

    Args:
        then: Turns the model's output into the result, on the compute thread.
        base: Run the model without its head, or an encoder without its decoder.

    Raises:
        RequestError: As `checked_inputs`.
        MemoryBudgetError: The activations may take more memory than the plan's workspace.
    """
    skeleton, plan = planned.skeleton, planned.plan
    model = skeleton.text_encoder if base else skeleton.named_model
    checked = checked_inputs(skeleton, model, inputs)
    sequences, tokens = count_tokens(checked, planned.probe)
    nbytes = planned.bounds.plain(sequences=sequences, tokens=tokens) + planned.bounds.recorded(
        sequences=sequences,
        tokens=tokens,
        hidden_states=bool(checked.get("output_hidden_states")),
        attentions=bool(checked.get("output_attentions")),
    )
    if planned.probe.images is not None and "pixel_values" in checked:
        nbytes += planned.bounds.images(num_values(checked))
    token_ids = embedded_token_ids(skeleton, checked)
    num_tokens = max(sequences * tokens, len(token_ids))
    if nbytes > plan.workspace_bytes or num_tokens > plan.max_tokens_per_sweep:
        minimum = plan.memory_budget + max(0, nbytes - plan.workspace_bytes)
        raise MemoryBudgetError(
            f"{format_count(num_tokens, 'token')} ({sequences} sequences or images of {tokens}) may take "
            f"{format_bytes(nbytes)} of activations; the plan has {format_bytes(plan.workspace_bytes)} for "
            f"{format_count(plan.max_tokens_per_sweep, 'token')}. Pass fewer at once, or open the engine with "
            f"max_tokens_per_sweep={num_tokens} and a memory_budget of about {format_bytes(minimum)}",
            requested_bytes=nbytes,
            budget_bytes=plan.workspace_bytes,
            minimum_bytes=minimum,
        )

    def compute() -> Any:
        with bounded_attention(skeleton.dtype):
            return then(model(**checked))

    return ForwardJob(
        call=ModelCall(compute), input_names=tuple(checked), token_ids=token_ids, num_tokens=num_tokens, nbytes=nbytes
    )


class ForwardQueue:
    """Forward passes that wait for a sweep, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: deque[ForwardJob] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: ForwardJob) -> None:
        self._waiting.append(job)

    def discard(self, job: ForwardJob) -> None:
        """Removes a job, if it waits."""
        if job in self._waiting:
            self._waiting.remove(job)

    def put_back(self, jobs: list[ForwardJob]) -> None:
        """Returns jobs that did not run to the front of the queue."""
        self._waiting.extendleft(reversed(jobs))

    def take(self, num_tokens: int, nbytes: int) -> list[ForwardJob]:
        """Takes the first jobs that together have at most `num_tokens` tokens and `nbytes` of activations."""
        taken: list[ForwardJob] = []
        while self._waiting and self._waiting[0].num_tokens <= num_tokens and self._waiting[0].nbytes <= nbytes:
            job = self._waiting.popleft()
            num_tokens, nbytes = num_tokens - job.num_tokens, nbytes - job.nbytes
            taken.append(job)
        return taken

    def end_all(self, error: HermesError) -> None:
        while self._waiting:
            self._waiting.popleft().end(error)


def forward_error(job: ForwardJob, model_name: str) -> HermesError | None:
    """The error that the user gets for the error of a job's call, if it has one."""
    error = job.call.error
    if error is None or (isinstance(error, HermesError) and not isinstance(error, NotLoadedError)):
        return error
    if isinstance(error, NotLoadedError):
        given = ", ".join(name for name in job.input_names if name != "use_cache")
        refused = RequestError(f"{model_name}.forward cannot be given {given} together here; leave some out: {error}")
    else:
        refused = RequestError(f"{model_name}.forward does not run on these inputs: {reason_of(error)}")
    refused.__cause__ = error
    return refused
