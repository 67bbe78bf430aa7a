"""What every way of storing a matrix in fewer bits has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from hermes_async.errors import CorruptShardError
from hermes_async.storage.tensor_spec import TensorSpec

Parts: TypeAlias = Mapping[str, torch.Tensor]
"""The stored tensors of one matrix, by their role, such as "weight" and "scale"."""


class Encoding(ABC):
    """How a matrix [rows, columns] is stored, in one tensor or several.

    Encodings are values: frozen dataclasses without tensors, compared by their fields. One object serves many matrices.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages and plans, such as "fp8" or "Q4_K"."""

    def detail(self, rows: int, columns: int) -> str:
        """What a plan says of a matrix in addition, such as "e4m3, blocks of 128x128"; empty for nothing."""
        groups = self.integers(rows, columns)
        if groups is None:
            return ""
        return "a scale for each row" if groups.group == columns else f"groups of {groups.group}"

    @property
    def elements_per_second(self) -> float:
        """An estimate of how many elements one core dequantizes in a second, for plans without a profile."""
        return 4e9 if self.compiles and has_compiler() else 1e9

    @abstractmethod
    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each part of a matrix.

        Raises:
            ValueError: No matrix of this size can be stored so; the text says why.
        """

    @abstractmethod
    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        """Writes the rows `start` to `stop` (exclusive) of the matrix.

        `start` is a multiple of `row_step`, and so is `stop`, unless it is the end of the matrix. Runs on the compute
        thread, within `torch.inference_mode`. Must not change the parts.

        Args:
            out: [stop - start, columns], contiguous, in float32, bfloat16 or float16. Values are rounded once, to
                this dtype.
        """

    @property
    def row_step(self) -> int:
        """`dequantize` takes rows from any multiple of this on."""
        return 1

    def part_rows(self, part: str, rows: int) -> int | None:
        """How many of a part's first dimension belong to the first `rows` rows, a multiple of `cut_step`.

        None if all rows need the whole part. It is what allows a matrix to be divided into blocks of rows that are read
        apart from each other: see `divisible`.
        """
        return None

    @property
    def divisible(self) -> bool:
        """Whether blocks of rows can be read apart: every part has its own rows of each block, or is very small."""
        return False

    @property
    def cut_step(self) -> int:
        """Blocks of rows that are read apart begin at multiples of this, which is a multiple of `row_step`."""
        return self.row_step

    def is_scale(self, part: str) -> bool:
        """Whether a part has scales alone. They are checked when the checkpoint is opened.

        They are floating-point numbers; or bytes, which are powers of two (E8M0).
        """
        return "scale" in part

    def may_be_zero(self, part: str) -> bool:
        """Whether some of a part's scales may be zero.

        Most writers bound their scales from below, or store another number for a block of zeros. A zero is then bytes
        that were never written.
        """
        return False

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """The most bytes that `dequantize` takes for `rows` rows, beside `out`.

        Args:
            itemsize: Of the dtype of `out`.
        """
        return 3 * rows * columns * 4

    def compiled_rows(self, parts: Parts, columns: int, dtype: torch.dtype) -> CompiledRows | None:
        """Compiled functions that do what `dequantize` does for a dtype, with values in float32.

        None if there are none for such a matrix.

        Args:
            columns: Of the matrix.
        """
        return None

    @property
    def compiles(self) -> bool:
        """Whether there are compiled functions of it, where Numba is installed."""
        return False

    @property
    def needs_compiler(self) -> bool:
        """Whether `dequantize` needs compiled functions."""
        return False

    def prepare(self, dtype: torch.dtype) -> None:  # noqa: B027 - most encodings have nothing to prepare
        """Compiles the functions for a dtype, if there are any. It may take seconds; call it on a worker thread."""

    def product(self, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        """The product of `inputs` [n, columns] with all rows, [n, rows], by a kernel that does not dequantize.

        None if there is none for this number of inputs; then blocks of rows are dequantized, and multiplied.
        """
        return None

    @property
    def scales_inputs(self) -> bool:
        """Whether it has a `scaled_product`."""
        return False

    def scaled_product(self, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        """The product of a bfloat16 vector `inputs` [columns] with all rows, [rows].

        The inputs are multiplied with the scales of blocks, in place of the weights. So the rounding of these products
        to bfloat16 is that of an input, and not that of a weight. None if these parts do not allow it.
        """
        return None

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        """How the matrix is made of whole numbers in groups, if it is: then `integer_rows` gives them."""
        return None

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        """The rows `start` to `stop` (exclusive) as whole numbers; both are as for `dequantize`."""
        raise NotImplementedError(f"{self.name} matrices are not made of whole numbers in groups")


@dataclass(frozen=True, slots=True)
class IntegerGroups:
    """A matrix of whole numbers. Those of a group, some columns of one row, share a scale, and a zero or a minimum.

    Attributes:
        bits: 4 or 8, of each number.
        group: Columns of a group.
        part: The stored tensor that has the numbers. It has at least `bits` for each.
        symmetric: All zero points are in the middle: 8 for 4 bits, 0 for 8 bits. There are no minimums.
    """

    bits: int
    group: int
    part: str
    symmetric: bool


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """Rows of such a matrix. A weight is `(number - zero) * scale`, or `number * scale - minimum`.

    Attributes:
        numbers: [rows, columns], int8; from 0 to 15 for 4 bits.
        scales: [rows, groups], floating point.
        zeros: The same. None if the matrix is `IntegerGroups.symmetric`, or has minimums.
        minimums: The same. None if there are zeros, or the matrix is symmetric.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    minimums: torch.Tensor | None = None


@cache
def has_compiler() -> bool:
    """Whether Numba is installed, which compiles functions."""
    return find_spec("numba") is not None


@dataclass(frozen=True, slots=True)
class CompiledRows:
    """Functions of one matrix that release the interpreter's lock and use nothing of torch.

    Several threads may call them at once. All arrays are in float32 and contiguous.

    Attributes:
        write: Takes a first row, the row behind the last, and an array [rows, columns]: writes their values to it.
        multiplier: Takes inputs [n, columns] and an array [n, all rows], and returns a function of a first row and the
            row behind the last: it writes the products with these rows to the array. n is 1, or a multiple of
            `inputs_at_once`.
    """

    write: Callable[[int, int, NDArray[np.float32]], None]
    multiplier: Callable[[NDArray[np.float32], NDArray[np.float32]], Callable[[int, int], None]]
    inputs_at_once: int


@dataclass(frozen=True)
class PlainEncoding(Encoding):
    """A matrix of floating-point numbers, one after another: the part "weight"."""

    @property
    def name(self) -> str:
        return "plain"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        return {"weight": (rows, columns)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(parts["weight"][start:stop])

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows

    @property
    def divisible(self) -> bool:
        return True

    @property
    def elements_per_second(self) -> float:
        return 8e9

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix, or several of one size, as a checkpoint stores them.

    Attributes:
        encoding: How.
        shape: [rows, columns], or [matrices, rows, columns] if several are stacked in the same tensors. This is the
            shape of the weight in the model, unless `transposed`.
        parts: The stored tensors by their role. Of stacked matrices each has a first dimension more.
        transposed: Whether the weight in the model is the other way round: [columns, rows].
        row_order: For each row of the weight, the stored row that it is; None where they are the same.
        reshaped: The shape of the parameter, if it is no matrix, such as a norm or a convolution.
        as_linear: Whether it is stored as the weight of an `nn.Linear`, [outputs, inputs], also where the model has a
            `Conv1D` of transformers instead, whose weight is [inputs, outputs].
    """

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Mapping[str, TensorSpec]
    transposed: bool = False
    row_order: tuple[int, ...] | None = None
    reshaped: tuple[int, ...] | None = None
    as_linear: bool = False

    @classmethod
    def plain(cls, spec: TensorSpec) -> StoredMatrix:
        """A matrix, or a stack of them, that is not quantized."""
        return cls(PlainEncoding(), spec.shape, {"weight": spec})

    @property
    def first(self) -> TensorSpec:
        """The stored tensor that messages name."""
        return next(iter(self.parts.values()))

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the model."""
        if self.reshaped is not None:
            return self.reshaped
        *stacked, rows, columns = self.shape
        return (*stacked, columns, rows) if self.transposed else self.shape

    def check(self) -> None:
        """Compares the parts' shapes with those that the encoding asks for.

        Raises:
            CorruptShardError: They differ. The message names the tensor and its file.
        """
        *stacked, rows, columns = self.shape
        try:
            shapes = self.encoding.shapes(rows, columns)
        except ValueError as error:
            raise CorruptShardError(
                f"{self.first.file}: tensor {self.first.name!r} ({self.encoding.name}): {error}", path=self.first.file
            ) from None
        for part, spec in self.parts.items():
            expected = (*stacked, *shapes[part]) if part in shapes else None
            if expected is not None and spec.shape != expected:
                raise CorruptShardError(
                    f"{spec.file}: tensor {spec.name!r} has shape {list(spec.shape)}, but as the {part} of a "
                    f"{self.encoding.name} matrix of {rows} rows and {columns} columns it would have {list(expected)}",
                    path=spec.file,
                )
        missing = [part for part in shapes if part not in self.parts]
        if missing:
            raise CorruptShardError(
                f"{self.first.file}: tensor {self.first.name!r} ({self.encoding.name}) lacks its {missing[0]}",
                path=self.first.file,
            )

    def block_rows(self, elements: int) -> int:
        """The rows of a block of so many elements: a multiple of the encoding's step, and at least one step."""
        step = self.encoding.row_step
        return max(step, elements // max(1, self.shape[-1]) // step * step)

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """The rows of the matrix in such blocks: first and last (exclusive)."""
        rows, block_rows = self.shape[0], self.block_rows(elements)
        return ((start, min(rows, start + block_rows)) for start in range(0, rows, block_rows))

    def matrices(self) -> list[StoredMatrix]:
        """Each of the stacked matrices by itself; just this one if there is no stack."""
        if len(self.shape) == 2:
            return [self]
        divided = {part: spec.divided() for part, spec in self.parts.items()}
        return [
            replace(self, shape=self.shape[-2:], parts={part: specs[idx] for part, specs in divided.items()})
            for idx in range(prod(self.shape[:-2]))
        ]

    @property
    def divisible(self) -> bool:
        """Whether blocks of its rows can be read apart from each other."""
        as_stored = self.row_order is None and self.reshaped is None and not self.transposed
        return as_stored and self.encoding.divisible and len(self.shape) == 2

    def can_give_rows(self, step: int) -> bool:
        """Whether `rows` can be cut at multiples of `step`."""
        return self.divisible and step % self.encoding.cut_step == 0

    def rows(self, start: int, stop: int) -> StoredMatrix:
        """The matrix of the rows `start` to `stop` (exclusive), if it is `divisible`."""
        parts = {}
        for part, spec in self.parts.items():
            first, last = self.encoding.part_rows(part, start), self.encoding.part_rows(part, stop)
            parts[part] = spec if first is None or last is None else spec.rows(first, min(last, spec.shape[0]))
        return StoredMatrix(self.encoding, (stop - start, self.shape[1]), parts)
