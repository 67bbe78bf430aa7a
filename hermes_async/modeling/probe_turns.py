"""Finds out how a model runs in turns, and what its cache takes, by a few calls with weights that are all zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hermes_async.modeling.encoder_inputs import example_encoder_inputs, positions_of_audio, takes_audio
from hermes_async.modeling.inputs import example_token_ids
from hermes_async.modeling.kv_cache import KVLayout
from hermes_async.modeling.module_state import tensor_attributes
from hermes_async.modeling.observation import Alive, Observation, observe
from hermes_async.modeling.probe import Probe, without_unused
from hermes_async.modeling.row_tables import joined_uses
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.modeling.turns import TurnCache, TurnInput, TurnLayout, Turns, TurnTraits
from hermes_async.storage.buffers import ALIGNMENT

TURN_TOKENS = 32
"""Tokens of the prompt whose activations are measured, and of an encoder's input."""

ENCODER = "encoder"
"""The group of what an encoder-decoder computes only in the first call of a sequence."""

_FEW_TOKENS = 2


def probe_turns(skeleton: Skeleton, traits: TurnTraits) -> Probe:
    """Runs a model that generates with zeros, as turns do: a prompt, and tokens after it.

    A model may use other weights, or use them in another way, for a single token than for several.

    Raises:
        UnsupportedModelError: The model's forward does not run.
    """
    names = list(skeleton.model.state_dict())
    probe = partial(_probe_turns, skeleton.model, traits)
    first = probe(names)
    return without_unused(first, names, probe, in_layers(skeleton.model, names, first.visits))


def in_layers(model: PreTrainedModel, names: Iterable[str], ran: Collection[str]) -> frozenset[str]:
    """The parameters of all layers that ran. Some modules of a layer run only in longer sequences.

    Args:
        names: Of all parameters.
        ran: The names of the modules that ran.
    """
    lists = (path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    layers = [f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()]
    prefixes = tuple(f"{layer}." for layer in layers if layer in ran)
    return frozenset(name for name in names if name.startswith(prefixes))


def _probe_turns(model: PreTrainedModel, traits: TurnTraits, names: list[str]) -> Probe:
    before = tensor_attributes(model)
    # The first calls leave their state on the modules, where it is found.
    turns, cache = Turns(model, replace(traits, module_state=())), TurnCache(keeps=traits.keeps)
    attention, probes = _Attention(), list[Observation]()

    def look(cache: TurnCache, token_ids: list[int], past: int, input_ids: list[int]) -> Alive:
        inputs, alive = {} if past else example_encoder_inputs(model, input_ids), Alive()

        def run() -> None:
            with attention, alive:  # entered here, because the zeros in place of weights do not count
                turns.forward(TurnInput(cache, token_ids, past, num_outputs=1, model_inputs=inputs))

        computed = torch.tensor([token_ids[past:]])
        probes.append(observe(model, run, names=names, input_ids=computed, on_what="in turns"))
        return alive

    prompt = list(islice(cycle(example_token_ids(model)), TURN_TOKENS))
    of_prompt = look(cache, prompt, 0, prompt)
    after_prompt = look(cache, [*prompt, prompt[0]], TURN_TOKENS, []) if traits.keeps else None
    changed = {place for place, value in tensor_attributes(model).items() if before.get(place) is not value}
    for path, name in changed:
        setattr(model.get_submodule(path), name, before.get((path, name)))
    traits = replace(traits, module_state=tuple(sorted(changed)))
    turns = Turns(model, traits)
    cache = turns.new_cache()
    look(cache, [0] * _FEW_TOKENS, 0, [0] * _FEW_TOKENS)
    layout = TurnLayout(traits, ALIGNMENT, (), 0)  # of a model without a cache, a sequence has only its tokens
    bytes_per_past_token = 0
    if after_prompt is not None:
        shorter = cache.copy()
        after_few = look(cache, [0] * (_FEW_TOKENS + 1), _FEW_TOKENS, [])
        more_input = None
        if model.config.is_encoder_decoder and not takes_audio(model):
            more_input = turns.new_cache()
            look(more_input, [0] * _FEW_TOKENS, 0, [0] * (_FEW_TOKENS + TURN_TOKENS))
        layout = TurnLayout.measure(traits, shorter, cache, more_input)
        if layout.bytes_per_token:  # a part of what all layers compute belongs to the largest of them
            of_all_layers = (after_prompt.total_bytes - after_few.total_bytes) / (TURN_TOKENS - _FEW_TOKENS)
            bytes_per_past_token = math.ceil(of_all_layers * layout.most_layer_bytes / layout.bytes_per_token)
    groups = _first_only(probes) if model.config.is_encoder_decoder and traits.keeps else {}
    # Later inputs of an encoder are other tokens than those that a call is observed with.
    uses = [probe.table_uses for probe in probes[:1]]
    uses += [{name: use for name, use in probe.table_uses.items() if name not in groups} for probe in probes[1:]]
    visits = {name: idx for idx, name in enumerate(dict.fromkeys(name for probe in probes for name in probe.visits))}
    return Probe(
        visits=visits,
        used_outside=frozenset().union(*(probe.used_outside for probe in probes)),
        used_whole=frozenset().union(*(probe.used_whole for probe in probes)),
        kv=KVLayout({}, model.dtype),
        table_uses=joined_uses(uses),
        turns=layout,
        groups=groups,
        bytes_of_turn=of_prompt.most_bytes,
        tokens_of_turn=TURN_TOKENS + positions_of_audio(model),
        bytes_per_past_token=max(0, bytes_per_past_token),
        keeps_scores=attention.keeps_scores,
    )


def _first_only(probes: Sequence[Observation]) -> dict[str, str]:
    """The group of the modules that run only in first calls, where the encoder's states are made or projected."""
    in_every = frozenset.intersection(*(frozenset(probe.visits) for probe in probes))
    return dict.fromkeys(probes[0].visits.keys() - in_every, ENCODER)


class _Attention(TorchFunctionMode):
    """Notices attention that torch computes in steps, and in float32: where values have another size than keys.

    Attributes:
        keeps_scores: There was such attention. The scores of all pairs of tokens are in memory, of all heads.
    """

    keeps_scores = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and len(args) >= 3 and args[1].shape[-1] != args[2].shape[-1]:
            self.keeps_scores = True
        return func(*args, **(kwargs or {}))
