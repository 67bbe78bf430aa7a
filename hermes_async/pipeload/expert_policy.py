"""What the expert cache keeps and reads ahead, and the sizes of its buffers: what the planner must know of it, too."""

from __future__ import annotations

from collections.abc import Sequence

USE_KEPT = 0.9
"""What is left of a use after each further visit of the layer. Near 1 keeps the experts that are used most often, near
0 those that were used last. `python -m benchmarks.expert_policy` compares values."""

NEARLY_ALL = 0.9
"""A sweep that asks for this share of a layer's experts is expected to ask for all of the next layer."""

MOST_AHEAD = 8
"""Experts that are read before a sweep asks for them, at most."""

NEW_BUFFERS = 16
"""Buffers for experts that are made at once, so that neighbours share huge pages."""

_SIMILAR_SIZES = 1.02  # buffers may be larger than necessary by this factor, so that more experts share a size


def slot_sizes(layers: Sequence[Sequence[int]]) -> list[int]:
    """The size of the buffers for the experts of each layer, given the bytes of each expert; similar sizes are one."""
    sizes = sorted({max(layer) for layer in layers}, reverse=True)
    merged: list[int] = []
    for size in sizes:
        if not merged or merged[-1] > size * _SIMILAR_SIZES:
            merged.append(size)
    return [min(size for size in merged if size >= max(layer)) for layer in layers]
