"""Chooses how one token is multiplied with bfloat16 weights, by a measurement of this machine that is made once."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from hermes_async.config import EngineConfig
from hermes_async.modeling.vector_products import has_vector_weights, measured_gain
from hermes_async.planning.profile import VectorProfile
from hermes_async.planning.profile_store import load_vector_profile, save_profile, vector_profile_file
from hermes_async.serving.planned_model import PlannedModel

_FASTER = 1.1  # `mv` counts as faster above this gain


def choose_kernels(planned: PlannedModel, config: EngineConfig) -> None:
    """Sets `vector_products` of a planned model, and says so in its plan. Call it on a worker thread.

    Nothing is measured where `kernels` is "transformers", where no weight could be used so, or where the plan already
    uses torch's own kernels for one token.
    """
    model = planned.skeleton.model
    if config.kernels == "transformers" or planned.plan.native_tokens or not has_vector_weights(model):
        return
    gain = vector_gain()
    if gain <= _FASTER:
        return
    planned.vector_products = True
    line = (
        f"one token: torch.mv is {gain:.1f} times as fast as linear here, and may round bfloat16 otherwise; "
        "kernels='transformers' keeps linear"
    )
    planned.plan = replace(planned.plan, explanation=(*planned.plan.explanation, line))


def vector_gain(folder: Path | None = None) -> float:
    """The speed of `mv` as a multiple of `linear`'s, as it was measured here before, or is measured now.

    Args:
        folder: Of the measurement; the user's cache by default.
    """
    file = vector_profile_file(folder)
    known = load_vector_profile(file)
    if known is None:
        known = VectorProfile(created_at=time.time(), gain=measured_gain())
        save_profile(file, known)
    return known.gain
