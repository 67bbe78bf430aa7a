"""Builds a checkpoint's model without weights, and finds out how it runs: packed, in turns, or forward only."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace

from hermes_async.config import EngineConfig
from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.modeling.activations import WorkspaceBounds
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.pooling import PoolingConfig, pooling_config, with_dense
from hermes_async.modeling.probe import Probe, probe_forward, probe_packed
from hermes_async.modeling.probe_turns import probe_turns
from hermes_async.modeling.selfcheck import check_packing
from hermes_async.modeling.selfcheck_turns import check_turns
from hermes_async.modeling.skeleton import Skeleton, build_skeleton, load_config, with_context_length
from hermes_async.modeling.transformers_api import AttentionChoice, warn_of_untested_versions
from hermes_async.modeling.turns import TurnTraits
from hermes_async.storage.checkpoint import Checkpoint

_BUILDING = threading.Lock()
"""Held while a model is built: transformers changes torch's default dtype for the whole process meanwhile."""


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """A model without weights, and how it runs.

    Attributes:
        refusal: Why it runs in turns; None if it does not, or was asked to.
    """

    skeleton: Skeleton
    attention: PackedAttention
    probe: Probe
    refusal: UnsupportedModelError | None = None

    @property
    def turns_reason(self) -> str:
        """One line for the plan; empty if the model does not run in turns."""
        if self.probe.turns is None:
            return ""
        traits = self.probe.turns.traits
        why = "as batching='turns' asks for" if self.refusal is None else f"a packed row does not work: {self.refusal}"
        cannot = [] if traits.chunks else ["a prompt is not divided"]
        cannot += [] if traits.keeps else ["no cache: each token computes the whole sequence"]
        cannot += [] if traits.crops else ["prompt lookup is off, because drafted tokens cannot be removed"]
        return "; ".join([f"in turns, {why}", *cannot])

    def bounds(self) -> WorkspaceBounds:
        return WorkspaceBounds(self.skeleton, self.probe, self.attention)


def build_and_probe(checkpoint: Checkpoint, config: EngineConfig, exits: ExitStack) -> ProbedModel:
    """Builds a model without weights and probes it. `exits` unregisters its attention from transformers."""
    warn_of_untested_versions()
    attention = PackedAttention()
    exits.callback(attention.close)
    with _BUILDING:
        model_config = load_config(checkpoint)
        skeleton = build_skeleton(checkpoint, model_config, attention.name)
        skeleton = with_context_length(skeleton, config.context_length)
        if not skeleton.generates:
            return ProbedModel(skeleton, attention, probe_forward(skeleton))
        refusal: UnsupportedModelError | None = None
        if config.batching != "turns":
            try:
                if config.self_check == "require":
                    check_packing(model_config, attention)
                return ProbedModel(skeleton, attention, probe_packed(skeleton, attention))
            except UnsupportedModelError as error:
                if config.batching == "packed":
                    raise
                refusal = error
        traits = check_turns(model_config) if config.self_check == "require" else TurnTraits()
        AttentionChoice(skeleton.model).or_plain_for(attention.name).apply()
        return ProbedModel(skeleton, attention, probe_turns(skeleton, traits), refusal)


def with_pooling(model: ProbedModel, checkpoint: Checkpoint) -> tuple[ProbedModel, PoolingConfig | CheckpointError]:
    """The model with the checkpoint's Dense layers, and its pooling; or the model unchanged, and the error."""
    skeleton = model.skeleton
    try:
        pooling = pooling_config(
            checkpoint.root or checkpoint.path,
            skeleton.model.config.architectures or (),
            is_causal=getattr(skeleton.model.config, "is_causal", True) is not False,
        )
        return replace(model, skeleton=with_dense(skeleton, pooling)), pooling
    except CheckpointError as error:
        return model, error
