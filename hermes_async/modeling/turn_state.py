"""The state that transformers carries between two calls of the model: its tensors, wherever they are kept.

transformers has no common class for it. Most models have a `Cache` of layers; some have lists of tensors, or objects of
their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from hermes_async.modeling.transformers_api import ENCODER_OUTPUTS

_MOST_DEPTH = 8


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of `value` in which each tensor is replaced by what `function` makes of it.

    Goes into mappings, lists, tuples, and the attributes of objects that hold tensors. A tensor that is in several
    places is replaced by one. Everything else is shared with the original.
    """
    return _Mapping(function)(value, 0)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The distinct tensors of a state, in a fixed order."""
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, collect)
    return found


def state_bytes(value: Any) -> int:
    """The memory of all tensors of a state; tensors that share memory count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_of(value)}
    return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True, slots=True)
class StatePart:
    """A layer's part of a state, or a part that belongs to no layer.

    Attributes:
        window: The most tokens that it keeps; None for all.
    """

    nbytes: int
    num_tensors: int
    window: int | None


def parts_of(state: dict[str, Any]) -> dict[tuple[str, int], StatePart]:
    """The parts of a state, by name and layer."""
    parts: dict[tuple[str, int], StatePart] = {}
    for name, value in state.items():
        layers = list(_layers([value])) if isinstance(value, Cache) else []
        for idx, layer in enumerate(layers or [value]):
            tensors = tensors_of(layer)
            if tensors:
                window = getattr(layer, "sliding_window", None)
                parts[name, idx] = StatePart(sum(tensor.nbytes for tensor in tensors), len(tensors), window)
    return parts


def compact(value: Any) -> Any:
    """A copy whose tensors keep no memory alive that they do not show, such as keys outside of a window."""

    def compacted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    return map_tensors(value, compacted)


def caches_of(state: dict[str, Any]) -> list[Cache]:
    """transformers' caches in a state; an `EncoderDecoderCache` counts as one."""
    return [value for value in state.values() if isinstance(value, Cache)]


def is_croppable(state: dict[str, Any], num_tokens: int, *, recorded: bool) -> bool:
    """Whether the last `num_tokens` tokens can be removed from a state.

    Args:
        recorded: The state records what the last call dropped (`record_past`).
    """
    caches = caches_of(state)
    others = (value for name, value in state.items() if name != ENCODER_OUTPUTS and not isinstance(value, Cache))
    if not caches or any(tensors_of(value) for value in others):
        return False
    for layer in _layers(caches):
        if not getattr(layer, "is_croppable", False):
            return False
        window = getattr(layer, "sliding_window", None)
        if window is None or layer.get_seq_length() < window:
            continue
        kept = layer.keys.shape[-2]
        if not (recorded and layer.record_past and kept - num_tokens >= window - 1):
            return False
    return True


def is_cuttable(state: dict[str, Any], length: int) -> bool:
    """Whether a state can be cut to the first `length` tokens although its layers may have different numbers of them.

    So it is after a call that ended between two layers.
    """
    caches = caches_of(state)
    if any(isinstance(cache, EncoderDecoderCache) for cache in caches):
        return False
    if any(not _is_whole(layer, length) for layer in _layers(caches)):
        return False
    return is_croppable(state, 0, recorded=False)


def _is_whole(layer: Any, length: int) -> bool:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return keys is not None and values is not None and keys.shape[-2] == values.shape[-2] >= length


def cut(state: dict[str, Any], length: int) -> None:
    """Removes all tokens after the first `length`, from each layer as many as it has. Needs `is_cuttable`."""
    for layer in _layers(caches_of(state)):
        layer.crop(length - layer.get_seq_length())


def record_past(state: dict[str, Any]) -> None:
    """From now on, layers with a window keep what the last call dropped until `crop`."""
    for cache in caches_of(state):
        cache.activate_past_recording()  # type: ignore[no-untyped-call]


def crop(state: dict[str, Any], num_tokens: int) -> None:
    """Removes the last `num_tokens` tokens. 0 drops what `record_past` has kept."""
    for cache in caches_of(state):
        cache.crop(-num_tokens)


def _layers(caches: list[Cache]) -> Iterator[Any]:
    for cache in caches:
        parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
        for part in [part for part in parts if part is not None] or [cache]:
            yield from part.layers


class _Mapping:
    """Copies a structure with other tensors; remembers what it has copied."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._function = function
        self._copied: dict[int, tuple[Any, Any]] = {}  # by identity, with the original to keep it alive

    def __call__(self, value: Any, depth: int) -> Any:
        if isinstance(value, (str, bytes, int, float, bool, type(None), torch.dtype, torch.device)):
            return value
        if id(value) in self._copied:
            return self._copied[id(value)][1]
        copied = self._copy(value, depth)
        self._copied[id(value)] = value, copied
        return copied

    def _copy(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.Tensor):
            return self._function(value)
        if depth == _MOST_DEPTH:
            return value
        if isinstance(value, dict):
            same = copy.copy(value)
            for key, item in value.items():
                same[key] = self(item, depth + 1)
            return same
        if isinstance(value, list):
            return [self(item, depth + 1) for item in value]
        if type(value) is tuple:
            return tuple(self(item, depth + 1) for item in value)
        if type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
            same = copy.copy(value)
            same.__dict__.update({name: self(item, depth + 1) for name, item in vars(value).items()})
            return same
        return value
