"""Which kernels multiply: oneDNN's, which torch takes by itself, or torch's own.

Attention in bf16 or fp16, on CPUs with matrix instructions, makes kernels of oneDNN for each number of queries and of
keys, and torch keeps all of them, for each thread, for as long as the process runs: half a megabyte for each new length
of a prompt. No variable bounds them. So attention is computed without oneDNN there, at the same speed.
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

_LEAST_PACKED_QUERIES = 64  # torch packs no fewer
_packs_attention = cache(packs_attention)  # asked for in each layer of each sweep


class _Switch:
    """The process's one switch, off for as long as anybody has turned it off."""

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
    """Computes with torch's own kernels, which round otherwise; all threads of the process do meanwhile."""
    _SWITCH.turn_off()
    try:
        yield
    finally:
        _SWITCH.turn_back()


def bounded_attention_kernels(queries: torch.Tensor) -> AbstractContextManager[None]:
    """Attention of these queries `[..., tokens, dim]` keeps no kernels of its own."""
    if queries.shape[-2] >= _LEAST_PACKED_QUERIES and _packs_attention(queries.dtype):
        return without_one_dnn()
    return nullcontext()


class BoundedAttention(TorchFunctionMode):
    """Within the block, and on its thread, `bounded_attention_kernels` holds for attention that is not ours."""

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


def bounded_attention(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """`BoundedAttention` where the CPU needs it for this dtype: it costs a microsecond an operation."""
    return BoundedAttention() if _packs_attention(dtype) else nullcontext()
