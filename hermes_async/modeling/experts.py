"""The experts of a mixture: which weights each has, and how tokens are computed by those that they are routed to.

transformers lets a function be chosen that computes all experts of a layer. `RoutedExperts` is one that asks for just
the experts that some token was routed to, and computes each as soon as its weights are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.errors import CheckpointError
from hermes_async.modeling.calls import Turn
from hermes_async.modeling.experts_api import (
    ExpertsModule,
    experts_modules,
    plain_experts,
    register_experts,
    unregister_experts,
)
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.modeling.transformers_api import own_parameters
from hermes_async.pipeload.stage import Stage, StageLayout
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.storage.tensor_spec import TensorSpec

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        name: The experts' module in the model.
        parameters: Names of the model's parameters that hold the weights of all experts.
        layouts: What each expert reads. Its parameters are named after its own stage, `"<module>.<expert>"`.
        encoded: The parameters of the layouts that are computed from stored tensors, by name.
        dtypes: That each projection is computed in, by its name in the module.
        cast_bytes: Of the largest expert's parameters that are cast to the dtype they compute in.
        position: How many stages of the partition are entered before the experts.
    """

    name: str
    parameters: tuple[str, ...]
    layouts: tuple[StageLayout, ...]
    encoded: Mapping[str, EncodedParameter]
    dtypes: Mapping[str, torch.dtype]
    cast_bytes: int
    position: int = 0


def expert_layers(skeleton: Skeleton, probe: Probe) -> tuple[ExpertLayer, ...]:
    """The layers whose experts can be read one by one, in the order in which they are computed."""
    layers = []
    for path in experts_modules(skeleton.model):
        own = own_parameters(skeleton.model.get_submodule(path))
        names = {leaf: f"{path}.{leaf}" for leaf in _PROJECTIONS if leaf in own}
        seldom_called = path not in probe.visits or path in probe.used_outside or path in probe.groups
        if seldom_called or probe.unused.intersection(names.values()):
            continue
        layer = _layer(skeleton, path, names)
        if layer is not None:
            layers.append(layer)
    return tuple(sorted(layers, key=lambda layer: probe.visits[layer.name]))


def _layer(skeleton: Skeleton, path: str, names: Mapping[str, str]) -> ExpertLayer | None:
    """None if the experts of a layer are not stored one behind the other."""
    stored: dict[str, list[TensorSpec] | EncodedParameter] = {}
    for leaf, name in names.items():
        if name in skeleton.encoded:
            if not skeleton.encoded[name].has_experts:
                return None
            stored[leaf] = skeleton.encoded[name]
        elif name in skeleton.tensors and len(skeleton.tensors[name].shape) == 3:
            stored[leaf] = skeleton.tensors[name].divided()
        else:
            return None
    if not stored:
        return None
    counts = {one.shape[0] if isinstance(one, EncodedParameter) else len(one) for one in stored.values()}
    if len(counts) != 1:
        return None
    layouts, encoded = [], {}
    for idx in range(counts.pop()):
        tensors: list[tuple[str, TensorSpec]] = []
        for leaf, one in stored.items():
            name = f"{path}.{idx}.{leaf}"
            if isinstance(one, EncodedParameter):
                encoded[name] = one.expert(name, idx)
                tensors += encoded[name].specs()
            else:
                tensors.append((name, one[idx]))
        layouts.append(StageLayout.of(f"{path}.{idx}", tensors))
    dtypes = {leaf: skeleton.dtypes[name] for leaf, name in names.items()}
    return ExpertLayer(
        name=path,
        parameters=tuple(names.values()),
        layouts=tuple(layouts),
        encoded=encoded,
        dtypes=dtypes,
        cast_bytes=max(_cast_bytes(layout, dtypes) for layout in layouts),
    )


def _cast_bytes(layout: StageLayout, dtypes: Mapping[str, torch.dtype]) -> int:
    """Of an expert."""
    nbytes = 0
    for placement in layout.placements:
        dtype = dtypes.get(placement.name.rpartition(".")[2], placement.dtype)
        nbytes += math.prod(placement.shape) * dtype.itemsize if dtype != placement.dtype else 0
    return nbytes


class ExpertGate(Protocol):
    """What the experts' function asks for; in the engine, the `Pipeline`."""

    def ask(self, experts: Sequence[Stage]) -> None:
        """Has experts of a layer read, and keeps them until they are left or `forget` is called. Does not wait."""
        ...

    def forget(self, experts: Sequence[Stage]) -> None:
        """Takes back a part of what was asked for."""
        ...


class RoutedExperts:
    """An experts function for transformers' `ExpertsInterface`, registered under its own name until `close`.

    Its result is that of transformers' own functions: the outputs of a token's experts, each times its weight, are
    added in the order in which the router names them.

    Args:
        layers: The experts of each layer, by the name of their module.
        gate: Told which experts are needed.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[Stage]], gate: ExpertGate) -> None:
        self._gate = gate
        self._layers = {id(model.get_submodule(name)): tuple(stages) for name, stages in layers.items()}
        # All mutable state: the projections of the expert that is in memory now, by name.
        self.weights: Mapping[str, torch.Tensor] = {}
        self.name = f"hermes_async_{id(self):x}"
        register_experts(self.name, self, map(model.get_submodule, layers))

    def close(self) -> None:
        """Removes the name from transformers' registry."""
        unregister_experts(self.name)

    def __call__(
        self, module: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes the experts of each token.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: The experts of each token, [tokens, k]. The number of experts itself stands for none.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, hidden].

        Raises:
            CheckpointError: A token is routed to an expert that does not exist.
        """
        stages = self._layers.get(id(module))
        if stages is None:  # its experts are not read one by one
            return plain_experts(module)(hidden_states, top_k_index, top_k_weights)
        num_tokens, num_chosen = top_k_index.shape
        pairs = _pairs_of_experts(top_k_index, len(stages))
        missing = {stages[idx]: (idx, rows) for idx, rows in pairs.items()}
        flat_weights = top_k_weights.reshape(-1, 1)
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        weighted = torch.zeros((num_tokens * num_chosen, hidden_states.shape[-1]), dtype=dtype)
        turn = Turn.current()
        self._gate.ask(tuple(missing))
        try:
            while missing:
                idx, rows = missing.pop(turn.rest_for_one(tuple(missing)))
                outputs = self._compute(module, idx, hidden_states[rows // num_chosen])
                weighted[rows] = (outputs * flat_weights[rows]).to(dtype)
        finally:
            self._gate.forget(tuple(missing))
        return weighted.view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def _compute(self, module: ExpertsModule, expert_idx: int, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs [n, hidden] of the expert that is in memory now, for `inputs` [n, hidden].

        Source: transformers' `batched_mm_experts_forward`, of which this is the part of one expert.
        """

        def project(name: str, states: torch.Tensor) -> torch.Tensor:
            weight = self.weights[name]
            bias = getattr(module, f"{name}_bias")[expert_idx] if module.has_bias else None
            return F.linear(states, weight.t() if module.is_transposed else weight, bias)

        states = project("gate_up_proj" if module.has_gate else "up_proj", inputs)
        states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
        states = project("down_proj", states)
        return module.post_expert_norm(states) if module.has_post_expert_norm else states


def _pairs_of_experts(top_k_index: torch.Tensor, num_experts: int) -> dict[int, torch.Tensor]:
    """For each expert that is chosen, in ascending order, the positions in the flattened `top_k_index`.

    Raises:
        CheckpointError: An expert does not exist. The number of experts itself stands for none.
    """
    flat = top_k_index.reshape(-1)
    in_order, positions = torch.sort(flat, stable=True)
    experts, counts = torch.unique_consecutive(in_order, return_counts=True)
    found = dict(zip(experts.tolist(), torch.split(positions, counts.tolist()), strict=True))
    found.pop(num_experts, None)
    wrong = [expert for expert in found if not 0 <= expert < num_experts]
    if wrong:
        raise CheckpointError(
            f"a token is routed to expert {wrong[0]}, and the layer has {num_experts} experts: a tensor of the "
            "checkpoint that routes tokens is wrong"
        )
    return found
