"""Which kernels multiply: oneDNN's, which torch takes by itself, or torch's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hermes_async.modeling.transformers_api import enable_one_dnn, one_dnn_enabled


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
