"""Which kernels multiply: oneDNN's, which torch takes by itself, or torch's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_torch_c: Any = torch._C  # `torch.backends.mkldnn.flags` also asks for settings of other devices, and warns


class _Switch:
    """The process's one switch, off for as long as anybody has turned it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_off = 0
        self._before = True

    def turn_off(self) -> None:
        with self._lock:
            if self._num_off == 0:
                self._before = _torch_c._get_mkldnn_enabled()
                _torch_c._set_mkldnn_enabled(False)
            self._num_off += 1

    def turn_back(self) -> None:
        with self._lock:
            self._num_off -= 1
            if self._num_off == 0:
                _torch_c._set_mkldnn_enabled(self._before)


_SWITCH = _Switch()


@contextmanager
def without_one_dnn() -> Iterator[None]:
    """Computes with torch's own kernels, which round otherwise; all threads of the process do meanwhile."""
    _SWITCH.turn_off()
    try:
        yield
    finally:
        _SWITCH.turn_back()
