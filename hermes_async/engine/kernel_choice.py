"""Chooses how inputs are multiplied with bfloat16 weights, by a measurement of this machine that is made once."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.config import EngineConfig
from hermes_async.errors import ConfigError
from hermes_async.memory.available import free_bytes
from hermes_async.modeling.bfloat16_weight import bfloat16_shapes
from hermes_async.planning.profile import ProductsProfile
from hermes_async.planning.profile_store import load_products_profile, products_profile_file, save_profile
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products

_FASTER = 1.1  # a function counts as faster than `linear` above this gain
_SHAPE = (2, 4096, 4096)  # of the weights that are measured: 64 MiB, so that they come from memory, as in a model
_TOKENS = (1, 16, 32, 64, 256)
_LEAST_FREE = 512 << 20  # bytes; with less, nothing is measured
_SECONDS = 0.2  # for each number of tokens
_FEWEST_TIMES = 3
_LEAST_TOKENS = 2  # that are widened; one has `mv`


def choose_products(model: nn.Module, config: EngineConfig, folder: Path | None = None) -> Bfloat16Products:
    """How inputs are multiplied with the bfloat16 weights of a model. Call it on a worker thread.

    Nothing is measured where `kernels` is "transformers", where the model has no large weight in bfloat16, or where so
    little memory is free that the measurement might take what the engine needs; then `linear` multiplies.

    Args:
        folder: Of the measurement; the user's cache by default.
    """
    if config.kernels == "transformers" or not bfloat16_shapes(model):
        return LINEAR
    profile = products_profile(folder)
    return LINEAR if profile is None else chosen_products(profile)


def products_profile(folder: Path | None = None) -> ProductsProfile | None:
    """What was measured here before, or is measured now; None where too little memory is free for that."""
    file = products_profile_file(folder)
    known = load_products_profile(file)
    if known is None and _has_room():
        known = ProductsProfile(created_at=time.time(), gains=measured_gains())
        save_profile(file, known)
    return known


def _has_room() -> bool:
    try:
        return free_bytes() >= _LEAST_FREE
    except ConfigError:  # the system does not tell
        return True


def chosen_products(profile: ProductsProfile) -> Bfloat16Products:
    """The functions that are faster than `linear`: for many tokens, for all numbers from the fewest on."""
    widened_tokens, widened_gain = 0, 0.0
    for num_tokens, gain in sorted(profile.gains.items(), reverse=True):
        if num_tokens < _LEAST_TOKENS or gain <= _FASTER:
            break
        widened_tokens, widened_gain = num_tokens, max(widened_gain, gain)
    vector_gain = profile.gains.get(1, 0.0)
    return Bfloat16Products(
        vector_gain=vector_gain if vector_gain > _FASTER else 0.0,
        widened_tokens=widened_tokens,
        widened_gain=widened_gain,
        scales_inputs=True,
    )


def measured_gains() -> dict[int, float]:
    """How many times as fast as `linear` `mv` is with one token, and products in float32 with more, by tokens.

    It takes a second or two, and 64 MiB. Call it on a worker thread. Both are timed in turn, and the medians count. The
    fastest times would be those of weights that the processor's cache still has.
    """
    other = Bfloat16Products(vector_gain=1.0, widened_tokens=_LEAST_TOKENS)
    with torch.inference_mode():
        weights = torch.full(_SHAPE, 0.02, dtype=torch.bfloat16)
        inputs = {count: torch.ones(count, _SHAPE[-1], dtype=weights.dtype) for count in _TOKENS}
        return {count: _gain(lines, weights, other) for count, lines in inputs.items()}


def _gain(inputs: torch.Tensor, weights: torch.Tensor, other: Bfloat16Products) -> float:
    ways: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (F.linear, other.linear)
    seconds: Sequence[list[float]] = ([], [])
    for way in ways:
        way(inputs, weights[0])
    in_turn = itertools.cycle(weights)
    while len(seconds[0]) < _FEWEST_TIMES or sum(map(sum, seconds)) < _SECONDS:
        for way, own in zip(ways, seconds, strict=True):
            weight = next(in_turn)
            started = time.perf_counter()
            way(inputs, weight)
            own.append(time.perf_counter() - started)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
