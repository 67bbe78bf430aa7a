"""Multiplies a matrix with one number for each of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray

from hermes_async.quantization.byte_kernels import ByteMatrix, Bytes, dequantizer, multiplier, prepare
from hermes_async.quantization.encoding import CompiledRows, Encoding, has_compiler
from hermes_async.quantization.kernel_sizes import LINES_AT_ONCE
from hermes_async.quantization.pieces import pieces

_COMPILED_DTYPES = {torch.float32, torch.bfloat16}
"""Of the values that compiled functions write."""
_COLUMN_STEP = 32
"""Compiled functions handle columns, and columns of blocks, in multiples of so many."""
E8M0_BIAS = 127
EXPONENT_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
"""Of scales that are stored as exponents alone."""
SCRATCH_BYTES = 192 << 10
"""Of memory that an operation takes piece by piece, so that it stays in the processor's cache."""
_VECTOR = 32
"""Numbers of 16 bits that a processor multiplies at once: torch multiplies shorter rows one by one."""
WIDE = 64
"""Columns of a block from which on it is worth an operator's inner loop of its own."""


@dataclass(frozen=True)
class BlockSize:
    """Rows and columns of a block; None for all rows, or all columns, of the matrix.

    Where blocks do not divide the matrix, the last ones are smaller.
    """

    rows: int | None
    columns: int | None

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """The blocks of a matrix: how many are below each other, and how many beside each other."""
        return _count(rows, self.rows), _count(columns, self.columns)

    def grid_rows(self, start: int, stop: int) -> slice:
        """The rows of blocks that the rows `start` to `stop` lie in."""
        return slice(None) if self.rows is None else slice(start // self.rows, -(-stop // self.rows))

    def first_row(self, row: int) -> int:
        """The first row of the blocks that a row lies in. Where a block has all rows, each row may be its first."""
        return row if self.rows is None else row // self.rows * self.rows

    def pieces(self, rows: int, columns: int, most: int) -> Iterator[slice]:
        """Divides rows into pieces of at most so many elements: of whole blocks, or of rows of one row of blocks."""
        height = self.rows or max(1, rows)
        span = max(height, most // max(1, columns) // height * height)
        for top in range(0, rows, span):
            for start, stop in pieces(min(span, rows - top), columns, most):
                yield slice(top + start, top + stop)


class BlockEncoding(Encoding):
    """An encoding whose part "weight" has the rows of the matrix, and other parts something for each block of it.

    Attributes:
        block: Rows and columns of a block.
    """

    block: BlockSize

    @property
    def row_step(self) -> int:
        return self.block.rows or 1

    def part_rows(self, part: str, rows: int) -> int | None:
        if part == "weight":
            return rows
        return None if self.block.rows is None else _count(rows, self.block.rows)

    @property
    def divisible(self) -> bool:
        return True


@dataclass(frozen=True)
class ScaledBytes:
    """A matrix of numbers of one byte, or of half of one, for compiled functions.

    Attributes:
        kind: Of the numbers: "fp8" (e4m3), "int8", "uint8" or "int4". Of the last two, the middle of the range is 0.
        numbers: [rows, bytes], contiguous.
        scale: The grid of the blocks' scales, in float32.
        block: Rows and columns of a block.
        rounds: Each value is rounded to bfloat16.
        zeros: As `scale`; a value is (number - zero) * scale.
    """

    kind: str
    numbers: torch.Tensor
    scale: torch.Tensor
    block: BlockSize
    rounds: bool
    zeros: torch.Tensor | None = None

    def dequantize(self, start: int, out: torch.Tensor) -> None:
        """Writes some rows from one on to `out` [rows, columns], in float32 or bfloat16, and contiguous."""
        bits = out.dtype == torch.bfloat16
        values = out.view(torch.uint16) if bits else out
        dequantizer(self._of_bytes(), self._matrix(out.shape[1]), bits=bits)(start, values.numpy())

    def compiled_rows(self, columns: int) -> CompiledRows:
        of_bytes, matrix = self._of_bytes(), self._matrix(columns)
        dequantize = dequantizer(of_bytes, matrix, bits=False)

        def write(start: int, stop: int, out: NDArray[np.float32]) -> None:
            dequantize(start, out)

        return CompiledRows(write, partial(multiplier, of_bytes, matrix), LINES_AT_ONCE)

    def _of_bytes(self) -> Bytes:
        return Bytes(self.kind, self.zeros is not None, self.rounds)

    def _matrix(self, columns: int) -> ByteMatrix:
        numbers, grid = self.numbers.view(torch.uint8).numpy().reshape(-1), self.scale.contiguous().numpy()
        zeros = grid if self.zeros is None else self.zeros.contiguous().numpy()
        return ByteMatrix(numbers, grid, zeros, (self.block.rows or len(self.numbers), self.block.columns or columns))


def can_compile(columns: int, block: BlockSize, *dtypes: torch.dtype) -> bool:
    """Whether Numba is installed, and compiled functions handle matrices of so many columns.

    Args:
        dtypes: Which values are rounded to, one after the other.
    """
    in_steps = columns % _COLUMN_STEP == 0 and (block.columns or columns) % _COLUMN_STEP == 0
    return in_steps and has_compiler() and {*dtypes} <= _COMPILED_DTYPES


def prepare_bytes(kind: str, *dtypes: torch.dtype, has_zeros: bool = False) -> None:
    """Compiles the functions of `ScaledBytes` for a dtype, if Numba is installed.

    Args:
        dtypes: Which values may be rounded to; the last is that of the model.
    """
    if not has_compiler() or not {*dtypes} <= _COMPILED_DTYPES:
        return
    for rounds in {dtype == torch.bfloat16 for dtype in dtypes}:
        prepare(Bytes(kind, has_zeros, rounds), bits=dtypes[-1] == torch.bfloat16)


def _count(size: int, block: int | None) -> int:
    return 1 if block is None else -(-size // block)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales in float32. They may be stored as exponents alone: as a dtype of its own, or as bytes."""
    if scale.dtype not in EXPONENT_DTYPES:
        return scale.float()
    codes = scale.view(torch.uint8).reshape(-1).to(torch.int32)
    return _powers(scale.dtype).index_select(0, codes).view(scale.shape)


@cache
def _powers(dtype: torch.dtype) -> torch.Tensor:
    """The number that each byte of a dtype of exponents stands for. Of bytes, 255 is 2**128: infinity."""
    codes = torch.arange(256, dtype=torch.uint8)
    return torch.exp2(codes.float() - E8M0_BIAS) if dtype == torch.uint8 else codes.view(dtype).float()


def multiply_blocks(values: torch.Tensor, scale: torch.Tensor, block: BlockSize) -> None:
    """Multiplies each block with its scale, in place. Products are computed in float32, and rounded once.

    Args:
        values: [rows, columns], contiguous. The first row is the first of a block, or all are in one row of blocks.
        scale: The grid of these rows' blocks, in float32.
    """
    rows, columns = values.shape
    height, width = block.rows or rows, block.columns or columns
    num_down, num_across = rows // height, columns // width  # of whole blocks
    if num_down * height == rows and num_across * width == columns:
        _multiply(values.view(num_down, height, num_across, width), scale)
        return
    bottom, right = num_down * height, num_across * width
    for down, lines in ((slice(0, num_down), slice(0, bottom)), (slice(num_down, None), slice(bottom, rows))):
        for across, those in (
            (slice(0, num_across), slice(0, right)),
            (slice(num_across, None), slice(right, columns)),
        ):
            piece, factors = values[lines, those], scale[down, across]
            if piece.numel():
                (below, beside), (tall, wide) = factors.shape, piece.shape
                _multiply(piece.view(below, tall // below, beside, wide // beside), factors)


def _multiply(blocks: torch.Tensor, factors: torch.Tensor) -> None:
    """Blocks [M, height, N, width] times factors [M, N]."""
    num_down, height, num_across, width = blocks.shape
    if blocks.dtype is torch.float32:
        blocks.mul_(factors[:, None, :, None])
    elif factors.numel() == 1:
        blocks.mul_(factors.item())  # of a number of Python, torch rounds only the product
    elif width >= WIDE and blocks.is_contiguous() and all(map(isfinite, bounds_of(factors))):
        if height == 1:
            _multiply_channels(blocks.view(1, 1, num_down * num_across, width), factors.reshape(1, -1))
        else:
            _multiply_channels(blocks, factors)
    elif width >= _VECTOR and torch.equal((same := factors.to(blocks.dtype)).float(), factors):
        blocks.mul_(same[:, None, :, None])
    else:
        step = max(1, SCRATCH_BYTES // (4 * height * num_across * width))
        scratch = torch.empty((min(step, num_down), height, num_across, width))
        for some, those in zip(torch.split(blocks, step), torch.split(factors, step), strict=True):
            some.copy_(scratch[: len(some)].copy_(some).mul_(those[:, None, :, None]))


def bounds_of(factors: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest; NaN if one of them is."""
    lowest, highest = torch.aminmax(factors)
    return float(lowest), float(highest)


def _multiply_channels(blocks: torch.Tensor, factors: torch.Tensor) -> None:
    """As `_multiply`, for numbers of 16 bits and finite factors. A zero keeps its sign."""
    bias = torch.full_like(factors[0], -0.0)
    for values, row in zip(blocks, factors, strict=True):
        multiply_and_add(values, row, bias, row * 0.0)


def multiply_and_add(values: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor) -> None:
    """Computes `value * factor + (bias - mean * factor)` in float32, in place, and rounds once.

    Of torch's operators, only the normalization of batches does that without a copy of the numbers in float32.

    Args:
        values: [batch, channels, width], of 16 bits each; contiguous.
        factor, bias, mean: Of each channel, in float32; finite.
    """
    nothing = factor.new_empty(0), factor.new_empty(0)
    torch.native_batch_norm(
        values,
        weight=factor,
        bias=bias,
        running_mean=mean,
        running_var=torch.ones_like(factor),
        training=False,
        momentum=0.0,
        eps=0.0,
        out=(values, *nothing),
    )
