"""Finds out which modules run only for prompts with images, and what an image takes, with weights that are all zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.inputs import num_values
from hermes_async.modeling.observation import Alive, Observation, observe
from hermes_async.modeling.probe import ImageProbe, Probe, idle_parameters
from hermes_async.modeling.probe_turns import in_layers
from hermes_async.modeling.row_tables import joined_uses
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.modeling.turns import TurnInput, Turns

IMAGE_GROUP = "vision"
"""The group of the modules that run only for prompts with images."""


def with_turns(packed: Probe, turns: Probe) -> Probe:
    """What a model needs whose texts are packed, and which also runs in turns."""
    return replace(
        packed,
        visits=_merged(packed.visits, turns.visits),
        used_outside=packed.used_outside | turns.used_outside,
        used_whole=packed.used_whole | turns.used_whole,
        table_uses=joined_uses([packed.table_uses, turns.table_uses]),
        unused=packed.unused & turns.unused,
        turns=turns.turns,
        bytes_of_turn=turns.bytes_of_turn,
        tokens_of_turn=turns.tokens_of_turn,
        bytes_per_past_token=turns.bytes_per_past_token,
        keeps_scores=turns.keeps_scores,
    )


def with_images(
    skeleton: Skeleton, probe: Probe, token_ids: Sequence[int], model_inputs: Mapping[str, torch.Tensor]
) -> Probe:
    """Runs a prompt with an image once, as turns do, and adds to `probe` what it showed.

    Modules are optional if the probe has shown that texts are computed without any of their parameters.

    Args:
        probe: Of texts; the model runs in turns, at least with images. It has transformers' own attention now.
        token_ids, model_inputs: The prompt, with an image.

    Raises:
        UnsupportedModelError: The model does not run on it.
    """
    model, layout = skeleton.model, probe.turns
    assert layout is not None

    def look(names: Sequence[str]) -> tuple[Observation, int]:
        turns, alive = Turns(model, layout.traits), Alive()
        turn = TurnInput(turns.new_cache(), token_ids, 0, num_outputs=1, model_inputs=model_inputs)
        run, input_ids = partial(turns.forward, turn), torch.tensor([token_ids])
        with alive:
            seen = observe(model, run, names=names, input_ids=input_ids, on_what="on a prompt with an image")
        return seen, alive.most_bytes

    names = list(model.state_dict())
    seen, nbytes = look(names)
    called = {*probe.visits, *probe.used_outside, *seen.visits, *seen.used_outside}
    idle = idle_parameters(names, called, in_layers(model, names, called))
    if idle:
        try:  # parameters of a module that is not called may still be used by the module around it
            look([name for name in names if name not in idle])
        except UnsupportedModelError:
            idle = frozenset()
    groups = {
        module: IMAGE_GROUP
        for module in seen.visits
        if module not in probe.visits and all(name in probe.unused for name in names if name.startswith(f"{module}."))
    }
    return replace(
        probe,
        visits=_merged(probe.visits, seen.visits),
        used_outside=probe.used_outside | seen.used_outside,
        used_whole=probe.used_whole | seen.used_whole,
        table_uses=joined_uses([probe.table_uses, seen.table_uses]),
        groups={**probe.groups, **groups},
        unused=probe.unused & idle,
        images=ImageProbe(num_tokens=len(token_ids), num_values=num_values(model_inputs), nbytes=nbytes),
    )


def _merged(usual: Iterable[str], other: Iterable[str]) -> dict[str, int]:
    """The order of `usual`, with the modules that are only in `other` before those that they run before."""
    usual = dict.fromkeys(usual)
    before: dict[str, list[str]] = {}
    pending: list[str] = []
    for name in other:
        if name in usual:
            before[name], pending = pending, []
        else:
            pending.append(name)
    order = [each for name in usual for each in (*before.get(name, ()), name)]
    return {name: idx for idx, name in enumerate([*order, *pending])}
