"""Finds out how a model runs in turns, and what its cache takes, by a few calls with weights that are all zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import nn
from transformers import PreTrainedModel

from hermes_async.modeling.inputs import example_token_ids, input_names
from hermes_async.modeling.kv_cache import KVLayout
from hermes_async.modeling.module_state import tensor_attributes
from hermes_async.modeling.observation import Alive, Observation, observe
from hermes_async.modeling.probe import Probe, without_unused
from hermes_async.modeling.row_tables import joined_uses
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.modeling.turns import TurnCache, TurnInput, TurnLayout, Turns, TurnTraits
from hermes_async.storage.buffers import ALIGNMENT

TURN_TOKENS = 32
"""Tokens of the prompt whose activations are measured."""


def probe_turns(skeleton: Skeleton, traits: TurnTraits) -> Probe:
    """Runs a model that generates with zeros, as turns do: a prompt, and a token after it.

    A model may use other weights, or use them in another way, for a single token than for several.

    Raises:
        UnsupportedModelError: The model's forward does not run.
    """
    names = list(skeleton.model.state_dict())
    probe = partial(_probe_turns, skeleton.model, traits)
    first = probe(names)
    # Some modules of a layer run only in longer sequences. So only what lies outside of all layers that ran is unused.
    layers = tuple(f"{name}." for name in _layer_names(skeleton.model) if name in first.visits)
    found = without_unused(first, names, probe, [name for name in names if name.startswith(layers)])
    # A prompt with an image needs what a text does not.
    return replace(found, unused=frozenset()) if "pixel_values" in input_names(skeleton.model) else found


def _layer_names(model: PreTrainedModel) -> Iterator[str]:
    """The names of the modules in module lists: the transformer layers, and other repeated modules."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            yield from (f"{path}.{name}" for name, _ in module.named_children())


def _probe_turns(model: PreTrainedModel, traits: TurnTraits, names: list[str]) -> Probe:
    before = tensor_attributes(model)
    # The first call leaves its state on the modules, where it is found.
    turns, cache, shorter = Turns(model, replace(traits, module_state=())), TurnCache(keeps=traits.keeps), TurnCache()
    alive, probes = Alive(), list[Observation]()

    def look(token_ids: list[int], past: int) -> None:
        def run() -> None:
            with nullcontext() if past else alive:  # entered here, because the zeros in place of weights do not count
                turns.forward(TurnInput(cache, token_ids, past, num_outputs=1))

        input_ids = torch.tensor([token_ids[past:]])
        probes.append(observe(model, run, names=names, input_ids=input_ids, on_what="in turns"))

    look(list(islice(cycle(example_token_ids(model)), TURN_TOKENS)), 0)
    changed = {place for place, value in tensor_attributes(model).items() if before.get(place) is not value}
    for path, name in changed:
        setattr(model.get_submodule(path), name, before.get((path, name)))
    traits = replace(traits, module_state=tuple(sorted(changed)))
    turns = Turns(model, traits)
    cache = turns.new_cache()
    for num_tokens in (1, 2, 3) if traits.keeps else (1,):
        look([0] * num_tokens, num_tokens - 1)
        if num_tokens == 2:
            shorter = cache.copy()
    layout = TurnLayout(traits, ALIGNMENT, (), 0)  # of a model without a cache, a sequence has only its tokens
    if traits.keeps:
        layout = TurnLayout.measure(traits, shorter, cache)
    visits = {name: idx for idx, name in enumerate(dict.fromkeys(name for probe in probes for name in probe.visits))}
    return Probe(
        visits=visits,
        used_outside=frozenset().union(*(probe.used_outside for probe in probes)),
        kv=KVLayout({}, model.dtype),
        table_uses=joined_uses(probe.table_uses for probe in probes),
        turns=layout,
        bytes_of_turn=alive.most_bytes,
    )
