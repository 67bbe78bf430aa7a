"""Large bfloat16 weights, whose products are computed by the functions that are the fastest on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.modeling.module_tensors import Place
from hermes_async.quantization.bfloat16_products import Bfloat16Products
from hermes_async.quantization.row_threads import ONE_THREAD, RowThreads

LEAST_ELEMENTS = 3 << 20  # of a matrix: with smaller ones, `linear` is as fast or faster


class Bfloat16Weight(nn.Parameter):
    """A weight [rows, columns] whose `linear` is that of `Bfloat16Products`. All else is as with a parameter."""

    _products: Bfloat16Products
    _threads: RowThreads

    @classmethod
    def of(cls, weight: torch.Tensor, products: Bfloat16Products, threads: RowThreads = ONE_THREAD) -> Self:
        """The weight, without a copy.

        Args:
            threads: Divide products of compiled functions.
        """
        own = cls(weight, requires_grad=False)
        own._products, own._threads = products, threads
        return own

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            func = _linear
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs` [..., columns] to [..., rows]."""
    if isinstance(weight, Bfloat16Weight):
        return weight._products.linear(inputs, weight, bias, weight._threads)
    return F.linear(inputs, weight, bias)


def is_large(weight: torch.Tensor) -> bool:
    """Whether a tensor is a bfloat16 matrix that is large enough to be a `Bfloat16Weight`."""
    return weight.dtype == torch.bfloat16 and weight.dim() == 2 and weight.numel() >= LEAST_ELEMENTS


def with_products(weight: torch.Tensor, products: Bfloat16Products, threads: RowThreads) -> torch.Tensor:
    """The weight, as a `Bfloat16Weight` if it is large and `linear` does not multiply everything."""
    return Bfloat16Weight.of(weight, products, threads) if not products.is_linear and is_large(weight) else weight


def may_be_bfloat16_weight(place: Place, weight: torch.Tensor) -> bool:
    """Whether a module's parameter may be a `Bfloat16Weight`: the large weight of a linear layer."""
    return isinstance(place.module, nn.Linear) and place.name == "weight" and is_large(weight)


def bfloat16_shapes(model: nn.Module) -> frozenset[tuple[int, int]]:
    """[rows, columns] of all large bfloat16 matrices that the model may multiply with, those of experts included."""
    return frozenset(_shapes(model))


def _shapes(model: nn.Module) -> Iterator[tuple[int, int]]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != torch.bfloat16 or not 2 <= parameter.dim() <= 3:
                continue
            if isinstance(module, nn.Linear) or parameter.dim() == 3:
                rows, columns = parameter.shape[-2:]
                if rows * columns >= LEAST_ELEMENTS:
                    yield rows, columns
