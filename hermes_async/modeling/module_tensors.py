"""Exchanges parameters and buffers of a module without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hermes_async.modeling.transformers_api import own_buffers, own_parameters


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a parameter or buffer."""

    module: nn.Module
    name: str

    def get(self) -> torch.Tensor:
        value = getattr(self.module, self.name)
        assert isinstance(value, torch.Tensor)
        return value

    def put(self, value: torch.Tensor) -> None:
        """Makes `value` the parameter or buffer, without the slow `Module.__setattr__`."""
        parameters = own_parameters(self.module)
        if self.name not in parameters:
            own_buffers(self.module)[self.name] = value
        elif isinstance(value, nn.Parameter):
            parameters[self.name] = value
        else:
            parameters[self.name] = nn.Parameter(value, requires_grad=False)


def place_of(model: nn.Module, name: str) -> Place:
    """The place of the parameter or buffer with this name."""
    path, _, leaf = name.rpartition(".")
    return Place(model.get_submodule(path), leaf)


def places_of(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """The places of many, by name; much faster than one after another."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = {name: name.rpartition(".") for name in names}
    return {name: Place(modules[path], leaf) for name, (path, _, leaf) in parts.items()}


def ones_for_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ones in place of those tensors that are whole numbers, for a model that runs without its checkpoint.

    Whole numbers count or index something: one is a valid value everywhere, zero is not a divisor.
    """
    return {
        name: torch.ones_like(tensor, device="cpu")
        for name, tensor in tensors.items()
        if not (tensor.is_floating_point() or tensor.is_complex())
    }


@contextmanager
def replaced_tensors(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block, `values` are the parameters and buffers of `model` with these names."""
    places = places_of(model, values)
    own = {name: place.get() for name, place in places.items()}
    try:
        for name, place in places.items():
            place.put(values[name])
        yield
    finally:
        for name, place in places.items():
            place.put(own[name])
