"""Reads that hang until a test lets them go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hermes_async import Engine
from tests.inside import inside


class Hanging:
    """Reads of chosen places hang until the test's end.

    Attributes:
        where: Says of an offset whether a read there hangs.
        offsets: Of the reads that hang or did.
    """

    def __init__(self, disk: Any) -> None:
        self.where: Callable[[int], bool] = lambda offset: False
        self.offsets: list[int] = []
        self.let_go = threading.Event()
        disk.on_read = self._read

    def _read(self, path: Path, offset: int, read: Callable[[], int]) -> int:
        if self.where(offset):
            self.offsets.append(offset)
            if not self.let_go.wait(60):  # no assert: it must also wait under `python -O`
                raise TimeoutError("the test did not let the read go")
        return read()

    @property
    def num_hanging(self) -> int:
        """Reads that hang or did."""
        return len(self.offsets)

    def everything(self) -> None:
        """Of any file."""
        self.where = lambda offset: True

    def rows(self, engine: Engine, token_id: int | None = None) -> None:
        """Of the input embedding: of one token's row, or of all."""
        spec = inside(engine).embedding
        first, end = spec.offset, spec.offset + spec.nbytes
        if token_id is not None:
            row_bytes = spec.nbytes // spec.shape[0]
            first, end = first + token_id * row_bytes, first + (token_id + 1) * row_bytes
        self.where = lambda offset: first - 4096 < offset < end

    def weights(self, engine: Engine) -> None:
        """Of everything else."""
        spec = inside(engine).embedding
        self.where = lambda offset: not spec.offset - 4096 < offset < spec.offset + spec.nbytes

    def end(self) -> None:
        """The disk is back."""
        self.where = lambda offset: False
        self.let_go.set()
