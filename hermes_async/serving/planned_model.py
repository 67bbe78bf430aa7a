"""A model that is not yet loaded: the checkpoint, the skeleton, the probe and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hermes_async.memory.claims import Claim
from hermes_async.modeling.activations import SweepSize, WorkspaceBounds
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.inputs import num_values
from hermes_async.modeling.partition import Partition
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.planning.plan import Plan
from hermes_async.quantization.bfloat16_products import Bfloat16Products
from hermes_async.serving.jobs import GenerationJob
from hermes_async.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class PlannedDraft:
    """A draft model that is not yet loaded. All of it will be resident.

    Attributes:
        attention: Registered with transformers until `close`.
        products: As in `PlannedModel`.
        fixed_bytes: Bytes of its weights and of the workspace for a pass.
        max_tokens: Of one pass.
    """

    skeleton: Skeleton
    attention: PackedAttention
    probe: Probe
    partition: Partition
    products: Bfloat16Products
    fixed_bytes: int
    max_tokens: int
    kv_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Of the buffers that its weights lie in."""
        return self.partition.base.slot_bytes + sum(stage.slot_bytes for stage in self.partition.stages)

    def close(self) -> None:
        self.attention.close()


def usable_bytes(plan: Plan, draft: PlannedDraft | None) -> int:
    """What an engine uses of its budget, at most, with its draft model; see `Plan.usable_bytes`."""
    if draft is None:
        return plan.usable_bytes
    draft_kv_bytes = draft.kv_bytes * plan.usable_kv_bytes // max(1, plan.kv_bytes)
    return min(plan.memory_budget, plan.usable_bytes + draft.fixed_bytes + draft_kv_bytes)


@dataclass(slots=True)
class PlannedModel:
    """A model that is planned and not yet loaded.

    Attributes:
        plan: Replaced by a resize; nothing else ever changes.
        attention: Registered with transformers until `close`.
        bounds: Of the memory that activations take.
        baseline_bytes: Resident memory of the process, libraries and tokenizer included, before any weight was read.
        claim: On the memory that all engines of the user share; released by `close`.
        products: How inputs are multiplied with bfloat16 weights.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    attention: PackedAttention
    probe: Probe
    partition: Partition
    products: Bfloat16Products
    plan: Plan
    bounds: WorkspaceBounds
    draft: PlannedDraft | None
    baseline_bytes: int
    claim: Claim

    def workspace_of(self, jobs: Sequence[GenerationJob], *, kv_bytes: int | None = None) -> int:
        """The most memory that the activations of a sweep with these jobs take.

        Args:
            kv_bytes: Of all sequences; None for as many as the plan has.
        """
        turns = [job for job in jobs if job.request.prepared.in_turns]
        packed = [job for job in jobs if not job.request.prepared.in_turns]
        size = SweepSize(
            packed_tokens=sum(len(job.token_ids) for job in packed),
            packed_outputs=sum(job.num_outputs for job in packed),
            turn_tokens=sum(job.num_tokens for job in turns),
            turn_outputs=sum(job.num_outputs for job in turns),
            num_values=tuple(num_values(job.model_inputs) for job in turns if job.has_images),
        )
        return self.bounds.calls(size, kv_bytes=self.plan.kv_bytes if kv_bytes is None else kv_bytes)

    def fits(self, jobs: Sequence[GenerationJob]) -> bool:
        """Whether their activations fit into the workspace."""
        return self.workspace_of(jobs) <= self.plan.workspace_bytes

    def close(self) -> None:
        self.claim.release()
        self.attention.close()
        if self.draft is not None:
            self.draft.close()
