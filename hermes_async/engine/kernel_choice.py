"""Chooses how inputs are multiplied with bfloat16 weights, by a measurement of this machine that is made once."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

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
from hermes_async.quantization.encoding import has_compiler
from hermes_async.quantization.row_threads import RowThreads
from hermes_async.quantization.tile_products import MOST_LINES, prepare_tiles

_FASTER = 1.1  # a function counts as faster than `linear` above this gain
_SHAPE = (2, 4096, 4096)  # of the weights that are measured: 64 MiB, so that they come from memory, as in a model
_TOKENS = (1, 16, 32, 64, 256)
_TILED_TOKENS = (2, 4, 8, 16, 32, 64, MOST_LINES)
_COMPILER_BYTES = 128 << 20  # that LLVM takes, and Numba where a function is new
_LEAST_FREE = 512 << 20  # bytes; with less, nothing is measured
_SECONDS = 0.2  # for each number of tokens
_FEWEST_TIMES = 3
_LEAST_TOKENS = 2  # that are widened; one has `mv`


def choose_products(
    model: nn.Module, config: EngineConfig, folder: Path | None = None, *, compiles: bool = False
) -> Bfloat16Products:
    """How inputs are multiplied with the bfloat16 weights of a model. Call it on a worker thread.

    Nothing is measured where `kernels` is "transformers", where the model has no large weight in bfloat16, or where so
    little memory is free that the measurement might take what the engine needs; then `linear` multiplies.

    Args:
        folder: Of the measurement; the user's cache by default.
        compiles: Whether compiled functions may be used. Numba must be installed then.
    """
    if config.kernels == "transformers" or not bfloat16_shapes(model):
        return LINEAR
    profile = products_profile(folder, compiles=compiles)
    if profile is None:
        return LINEAR
    products = chosen_products(profile)
    if products.tiled_tokens:
        prepare_tiles(torch.bfloat16, torch.bfloat16)
    return products


def products_profile(folder: Path | None = None, *, compiles: bool = False) -> ProductsProfile | None:
    """What was measured here before, or is measured now; None where too little memory is free for that."""
    file = products_profile_file(folder, compiles=compiles)
    known = load_products_profile(file)
    if known is None and _has_room():
        gains, tiled_gains = measured_gains(), measured_tiled_gains() if compiles else {}
        known = ProductsProfile(created_at=time.time(), gains=gains, tiled_gains=tiled_gains)
        save_profile(file, known)
    return known


def compiler_pays(nbytes: int, room: int) -> bool:
    """Whether Numba is installed, and the memory of compiled functions would not save reads.

    It saves none where all weights stay in memory.

    Args:
        nbytes: Of all weights.
        room: The engine's budget, or the memory that is free.
    """
    return has_compiler() and nbytes + _COMPILER_BYTES <= room


def _has_room() -> bool:
    try:
        return free_bytes() >= _LEAST_FREE
    except ConfigError:  # the system does not tell
        return True


def chosen_products(profile: ProductsProfile) -> Bfloat16Products:
    """The functions that are faster than `linear`: for many tokens, for all numbers from the fewest on.

    Compiled functions have all numbers between two for which they are the fastest.
    """
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
        tiled_tokens=_tiled_tokens(profile),
        tiled_gain=max(profile.tiled_gains.values(), default=0.0),
    )


def _tiled_tokens(profile: ProductsProfile) -> range:
    fastest: list[int] = []
    for num_tokens, gain in sorted(profile.tiled_gains.items()):
        if gain > max(_FASTER, profile.gains.get(num_tokens, 0.0)):
            fastest.append(num_tokens)
        elif fastest:
            break
    return range(fastest[0], fastest[-1] + 1) if fastest else range(0)


def measured_gains() -> dict[int, float]:
    """How many times as fast as `linear` `mv` is with one token, and products in float32 with more, by tokens.

    It takes a second or two, and 64 MiB. Call it on a worker thread. Both are timed in turn, and the medians count. The
    fastest times would be those of weights that the processor's cache still has.
    """
    other = Bfloat16Products(vector_gain=1.0, widened_tokens=_LEAST_TOKENS)
    return _gains(_TOKENS, other.linear)


def measured_tiled_gains() -> dict[int, float]:
    """How many times as fast as `linear` compiled functions are, by tokens. As `measured_gains`."""
    prepare_tiles(torch.bfloat16, torch.bfloat16)
    tiled = Bfloat16Products(tiled_tokens=range(1, MOST_LINES + 1))
    threads = RowThreads(torch.get_num_threads())
    try:
        return _gains(_TILED_TOKENS, lambda inputs, weight: tiled.linear(inputs, weight, threads=threads))
    finally:
        threads.close()


_Way: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _gains(counts: Sequence[int], way: _Way) -> dict[int, float]:
    with torch.inference_mode():
        weights = torch.full(_SHAPE, 0.02, dtype=torch.bfloat16)
        inputs = {count: torch.ones(count, _SHAPE[-1], dtype=weights.dtype) for count in counts}
        return {count: _gain(lines, weights, way) for count, lines in inputs.items()}


def _gain(inputs: torch.Tensor, weights: torch.Tensor, way: _Way) -> float:
    ways: tuple[_Way, ...] = (F.linear, way)
    seconds: Sequence[list[float]] = ([], [])
    for each in ways:
        each(inputs, weights[0])
    in_turn = itertools.cycle(weights)
    while len(seconds[0]) < _FEWEST_TIMES or sum(map(sum, seconds)) < _SECONDS:
        for each, own in zip(ways, seconds, strict=True):
            weight = next(in_turn)
            started = time.perf_counter()
            each(inputs, weight)
            own.append(time.perf_counter() - started)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
