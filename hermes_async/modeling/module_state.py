"""State that a model keeps on its modules between calls, outside of any cache.

A few architectures have recurrent states there, or position offsets of an image. A sequence's values are put on the
modules while its call runs, and taken off while another call does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_ALWAYS = ("rope_deltas",)
"""Attributes that change only in calls with images. They are not needed to go on after fewer tokens: a sequence has its
positions itself (`TurnCache.positions`)."""


class ModuleState:
    """The attributes of one model's modules that belong to a sequence.

    Args:
        names: The path of each module, and the attribute.

    Attributes:
        crops: The values do not depend on the last tokens, so these can be removed.
    """

    def __init__(self, model: nn.Module, names: Sequence[tuple[str, str]]) -> None:
        found = {(path, name) for path, module in model.named_modules() for name in _ALWAYS if name in vars(module)}
        self._places = [(model.get_submodule(path), name) for path, name in sorted({*names, *found})]
        self.initial = self._values()
        self.crops = all(name in _ALWAYS for _, name in self._places)

    def exchange(self, values: Sequence[Any]) -> list[Any]:
        """Puts `values` on the modules, and returns those that were there before."""
        if not self._places:
            return []
        before = self._values()
        for (module, name), value in zip(self._places, values, strict=True):
            setattr(module, name, value)
        return before

    def _values(self) -> list[Any]:
        return [getattr(module, name) for module, name in self._places]


def tensor_attributes(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """The attributes that are tensors but neither parameters nor buffers, by module and name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
