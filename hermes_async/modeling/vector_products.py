"""Products of one token with bfloat16 weights by torch's function for a matrix and a vector, where that is faster.

transformers calls `linear` for every number of tokens. On some processors `mv` takes half as long for one token, on
others it takes longer. Both sum in float32 and round each result once, but they add in another order. So results may
differ in the last bit of bfloat16. float32 and float16 are never computed so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.modeling.module_tensors import Place

_LEAST_ELEMENTS = 1 << 18  # of a matrix: with smaller ones, calling takes longer than multiplying
_MEASURED_SHAPE = (1024, 4096)  # 8 MiB
_MEASURED_SECONDS = 0.2
_FEWEST_TIMES = 20


class VectorWeight(nn.Parameter):
    """A weight [rows, columns] whose `linear` with one token is computed by `mv`. All else is as with a parameter."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            func = _linear
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs` [..., columns] to [..., rows]."""
    if inputs.numel() != weight.shape[1]:
        return F.linear(inputs, weight, bias)
    vector = inputs.reshape(-1)
    # With `addmv` the sum and the bias are rounded together, as `linear` does.
    product = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
    return product.view(*inputs.shape[:-1], weight.shape[0])


def may_be_vector_weight(place: Place, weight: torch.Tensor) -> bool:
    """Whether a module's parameter may be a `VectorWeight`: the large bfloat16 weight of a linear layer."""
    return (
        isinstance(place.module, nn.Linear)
        and place.name == "weight"
        and weight.dtype == torch.bfloat16
        and weight.numel() >= _LEAST_ELEMENTS
    )


def has_vector_weights(model: nn.Module) -> bool:
    """Whether any weight of the model may be a `VectorWeight`."""
    return any(
        may_be_vector_weight(Place(module, "weight"), module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def measured_gain() -> float:
    """The speed of `mv` as a multiple of `linear`'s, for one token. It takes a fifth of a second and 8 MiB.

    Call it on a worker thread. Both are timed in turn, and the fastest times count: other programs only make it longer.
    """
    with torch.inference_mode():
        weight = torch.full(_MEASURED_SHAPE, 0.02, dtype=torch.bfloat16)
        inputs = torch.ones(1, _MEASURED_SHAPE[1], dtype=torch.bfloat16)
        ways: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (F.linear, _linear)
        seconds: Sequence[list[float]] = ([], [])
        for way in ways:
            way(inputs, weight)
        while len(seconds[0]) < _FEWEST_TIMES or sum(map(sum, seconds)) < _MEASURED_SECONDS:
            for way, own in zip(ways, seconds, strict=True):
                started = time.perf_counter()
                way(inputs, weight)
                own.append(time.perf_counter() - started)
    return min(seconds[0]) / min(seconds[1])
