"""A model that is planned and not yet loaded: what opening a checkpoint found out, and how the budget is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hermes_async.memory.claims import Claim
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.partition import Partition
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.planning.plan import Plan
from hermes_async.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class PlannedDraft:
    """A draft model that is not yet loaded; all of it will be in memory.

    Attributes:
        attention: Registered with transformers until `close`.
        fixed_bytes: Of its weights and of the workspace for a pass.
        kv_bytes: What the plan leaves for its KV.
        max_tokens: Of one pass.
    """

    skeleton: Skeleton
    attention: PackedAttention
    seen: Probe
    partition: Partition
    fixed_bytes: int
    max_tokens: int
    kv_bytes: int = 0

    def close(self) -> None:
        self.attention.close()


@dataclass(slots=True)
class PlannedModel:
    """A model that is planned and not yet loaded.

    Attributes:
        plan: Replaced when a running engine gets another budget; nothing else ever changes.
        attention: Registered with transformers until `close`.
        partition: The plan's.
        forward_bytes: What a plain forward pass may take, by sequences (or images) and tokens of each.
        draft: The draft model, if one was given.
        baseline_bytes: Resident memory of the process, libraries and tokenizer included, before any weight was read.
        claim: On the memory that the engines of the user have in common; until `close`.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    attention: PackedAttention
    seen: Probe
    partition: Partition
    plan: Plan
    forward_bytes: Callable[[int, int], int]
    draft: PlannedDraft | None
    baseline_bytes: int
    claim: Claim

    def close(self) -> None:
        self.claim.release()
        self.attention.close()
        if self.draft is not None:
            self.draft.close()
