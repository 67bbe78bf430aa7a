"""Which kernels multiply matrices: oneDNN's, which are torch's default, or torch's own.

For attention in bf16 or fp16, on CPUs with matrix instructions, torch makes a oneDNN kernel for each number of queries
and of keys. It keeps all of them, for each thread, until the process ends: half a megabyte for each new length of a
prompt. No setting limits them. So attention is computed without oneDNN there, which is as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hermes_async.modeling.transformers_api import enable_one_dnn, one_dnn_enabled, packs_attention

_LEAST_PACKED_QUERIES = 64  # torch packs matrices from so many queries on
_packs_attention = cache(packs_attention)  # asked for in each layer of each sweep


class _Switch:
    """The switch of the process. It is off as long as one of those who turned it off has not turned it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_off = 0
        self._before = True

    def turn_off(self) -> None:
        with self._lock:
            if self._num_off == 0:
                self._before = one_dnn_enabled()
                enable_one_dnn(False)
            self._num_off += 1

    def turn_back(self) -> None:
        with self._lock:
            self._num_off -= 1
            if self._num_off == 0:
                enable_one_dnn(self._before)


_SWITCH = _Switch()


@contextmanager
def without_one_dnn() -> Iterator[None]:
    """Within the block all threads of the process compute with torch's own kernels, which round differently."""
    _SWITCH.turn_off()
    try:
        yield
    finally:
        _SWITCH.turn_back()


def bounded_attention_kernels(queries: torch.Tensor) -> AbstractContextManager[None]:
    """Within the block no kernels are kept for attention with these queries `[..., tokens, dim]`."""
    if queries.shape[-2] >= _LEAST_PACKED_QUERIES and _packs_attention(queries.dtype):
        return without_one_dnn()
    return nullcontext()


class BoundedAttention(TorchFunctionMode):
    """Applies `bounded_attention_kernels` to every attention of torch, within the block and on its thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with bounded_attention_kernels(args[0] if args else kwargs["query"]):
            return func(*args, **kwargs)


def bounded_attention(dtype: torch.dtype, most_queries: int | None = None) -> AbstractContextManager[Any]:
    """`BoundedAttention`, only where the CPU needs it for this dtype: it costs a microsecond per operation.

    Args:
        most_queries: No attention has more queries; None if that is not known.
    """
    if most_queries is not None and most_queries < _LEAST_PACKED_QUERIES:
        return nullcontext()
    return BoundedAttention() if _packs_attention(dtype) else nullcontext()
