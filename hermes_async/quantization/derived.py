"""Matrices whose numbers are made of those of another encoding: rounded, computed, or in another order of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hermes_async.quantization.encoding import Encoding, Parts


@dataclass(frozen=True)
class DerivedEncoding(Encoding):
    """What makes the model's numbers of those of another encoding.

    Attributes:
        encoding: How the numbers are stored.
    """

    encoding: Encoding

    @property
    def name(self) -> str:
        return self.encoding.name

    @property
    def compiles(self) -> bool:
        return self.encoding.compiles

    @property
    def needs_compiler(self) -> bool:
        return self.encoding.needs_compiler

    def prepare(self, dtype: torch.dtype) -> None:
        self.encoding.prepare(dtype)

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        return self.encoding.shapes(rows, columns)

    @property
    def row_step(self) -> int:
        return self.encoding.row_step

    @property
    def cut_step(self) -> int:
        return self.encoding.cut_step

    def part_rows(self, part: str, rows: int) -> int | None:
        return self.encoding.part_rows(part, rows)

    @property
    def divisible(self) -> bool:
        return self.encoding.divisible

    def detail(self, rows: int, columns: int) -> str:
        return self.encoding.detail(rows, columns)

    def is_scale(self, part: str) -> bool:
        return self.encoding.is_scale(part)

    def may_be_zero(self, part: str) -> bool:
        return self.encoding.may_be_zero(part)


@dataclass(frozen=True)
class Bfloat16Values(DerivedEncoding):
    """Values that are rounded to bfloat16 first, whatever dtype they are wanted in."""

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        rounded = out if out.dtype == torch.bfloat16 else torch.empty(out.shape, dtype=torch.bfloat16)
        self.encoding.dequantize(parts, start, stop, rounded)
        if rounded is not out:
            out.copy_(rounded)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return 2 * rows * columns + self.encoding.scratch_bytes(rows, columns, 2)


CHANGES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "minus one": lambda values: values - 1,
    "log of the negative": lambda values: torch.log(-values),
}


@dataclass(frozen=True)
class ChangedNumbers(DerivedEncoding):
    """Numbers that are computed from the stored ones, in float32.

    Attributes:
        change: One of `CHANGES`.
    """

    change: str

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        values = torch.empty(out.shape, dtype=torch.float32)
        self.encoding.dequantize(parts, start, stop, values)
        out.copy_(CHANGES[self.change](values))

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return 3 * rows * columns * 4 + self.encoding.scratch_bytes(rows, columns, 4)


@dataclass(frozen=True)
class OrderedColumns(DerivedEncoding):
    """Columns in another order than the stored ones.

    Attributes:
        order: For each column of the matrix, the stored column that it is.
    """

    order: tuple[int, ...]

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        values = torch.empty_like(out)
        self.encoding.dequantize(parts, start, stop, values)
        torch.index_select(values, 1, torch.tensor(self.order), out=out)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns * itemsize + 8 * columns + self.encoding.scratch_bytes(rows, columns, itemsize)
