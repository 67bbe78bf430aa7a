"""How transformers computes the experts of a mixture: a part of `transformers_api.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from hermes_async.modeling.transformers_api import needs


class ExpertsModule(Protocol):
    """What transformers' functions for experts use of the module that holds the experts of a layer.

    With `has_bias`, the module has a parameter `<projection>_bias` [experts, n] for each projection.
    """

    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    config: PreTrainedConfig

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor: ...


def experts_modules(model: nn.Module) -> dict[str, ExpertsModule]:
    """The modules whose experts a function of transformers' `ExpertsInterface` can compute, by name."""
    needed = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")
    return {
        name: cast(ExpertsModule, module)
        for name, module in model.named_modules()
        if hasattr(type(module).forward, "__wrapped__") and all(hasattr(module, one) for one in needed)
    }


def plain_experts(module: ExpertsModule) -> Callable[..., torch.Tensor]:
    """The architecture's own forward of the module, which takes one expert after another."""
    with needs("own forward of experts"):
        forward: Callable[..., torch.Tensor] = partial(type(module).forward.__wrapped__, module)  # type: ignore[attr-defined]
    return forward


def register_experts(name: str, function: Callable[..., Any], modules: Iterable[nn.Module]) -> None:
    """Makes `function` an implementation of experts of this name, and that of these modules."""
    with needs("registry of experts functions"):
        import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.register(name, function)
        for module in modules:
            cast(ExpertsModule, module).config._experts_implementation_internal = name


def unregister_experts(name: str) -> None:
    """Removes the name from transformers' registry, if it is there."""
    with needs("registry of experts functions"):
        interface = import_module("transformers.integrations.moe").ExpertsInterface
        interface._global_mapping.pop(name, None)
