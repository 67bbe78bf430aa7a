"""Whole numbers of 2, 3, 4 or 8 bits that lie one after another in words of 32 bits, and rows that are stored so.

The first number of a row is in the lowest bits of its first word; a number of 3 bits may begin in one word and end in
the next.

Source: the layout of `weight_packed` in compressed-tensors; of `qweight` in GPTQ, transposed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.block_scales import (
    WIDE,
    BlockSize,
    ScaledBytes,
    can_compile,
    multiply_and_add,
    prepare_bytes,
)
from hermes_async.quantization.encoding import CompiledRows, Encoding, IntegerGroups, IntegerRows, Parts
from hermes_async.quantization.pieces import FLOAT16_ELEMENTS, FLOAT32_ELEMENTS, INT8_ELEMENTS, pieces
from hermes_async.storage.tensor_spec import TensorSpec

WORD_BITS = 32
_KINDS = {4: "int4", 8: "uint8"}
"""Numbers of so many bits that compiled functions dequantize."""
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers_per_step(bits: int) -> int:
    """The fewest numbers that take whole words."""
    return WORD_BITS if WORD_BITS % bits else WORD_BITS // bits


def words_of(count: int, bits: int) -> int:
    """The words that so many numbers take."""
    return -(-count * bits // WORD_BITS)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` numbers of each row.

    Args:
        words: int32 [rows, words]; each row is contiguous.

    Returns:
        int8 [rows, count] in memory of its own. Numbers of 8 bits are less 128.
    """
    octets = words.view(torch.uint8)
    if bits == 8:
        return octets[:, :count].bitwise_xor(0x80).view(torch.int8)
    # The bits of several numbers are divided in halves, until each number has a byte of its own.
    if bits == 4:
        lanes = _halved(octets.to(torch.int16), 4, 0x0F0F)
    elif bits == 2:
        lanes = _halved(_halved(octets.to(torch.int32), 12, 0x000F000F), 6, 0x03030303)
    else:
        triples = octets.view(len(octets), -1, 3).to(torch.int64)
        lanes = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        lanes = _halved(_halved(lanes, 20, 0x00000FFF00000FFF), 10, 0x003F003F003F003F)
        lanes = _halved(lanes, 5, 0x0707070707070707)
    return lanes.view(torch.int8)[:, :count]


def _halved(lanes: torch.Tensor, shift: int, mask: int) -> torch.Tensor:
    """Moves the upper half of the bits in each lane, and keeps those of the mask. Changes `lanes`."""
    return lanes.bitwise_or_(lanes << shift).bitwise_and_(mask)


def middle_of(bits: int) -> int:
    """What the middle of the numbers' range is in `unpacked`."""
    return 0 if bits == 8 else 1 << (bits - 1)


def turned(words: torch.Tensor) -> torch.Tensor:
    """A copy with rows as columns. (`contiguous` would not give a dimension of size 1 the stride that views need.)"""
    return words.contiguous().t().clone(memory_format=torch.contiguous_format)


def write_packed(
    words: torch.Tensor,
    zero: torch.Tensor | int,
    scale: torch.Tensor,
    out: torch.Tensor,
    *,
    bits: int,
    g_idx: torch.Tensor | None = None,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Writes (number - zero) * scale for rows of packed numbers.

    Args:
        words: int32 [rows, words]; each row is contiguous.
        zero: int8 [rows, groups], as `unpacked` gives them, or one number.
        scale: [rows, groups], floating point.
        g_idx: The group of each column; None if they are one after another.
        out, rounded_to: See `write_scaled`.
    """
    rows, columns = out.shape
    if bits == 4 and g_idx is None and columns % 2 == 0 and rounded_to in (None, out.dtype):
        whole = whole_numbers_for(scale, out)
        if whole is not None:
            octets = words.view(torch.uint8)[:, : columns // 2]
            for start, stop in pieces(rows, columns, FLOAT16_ELEMENTS):
                pairs = out[start:stop].view(torch.int32)
                pairs.copy_(octets[start:stop])
                pairs.mul_(0x1001).bitwise_and_(0x000F000F).bitwise_or_(whole.bits * 0x10001)
                own_zero = zero if isinstance(zero, int) else zero[start:stop]
                scale_whole(out[start:stop], whole, own_zero, scale[start:stop])
            return
    for start, stop in pieces(rows, columns, INT8_ELEMENTS if g_idx is None else FLOAT32_ELEMENTS):
        own_scale = _of_columns(scale[start:stop], g_idx).unsqueeze(-1)
        own_zero = zero if isinstance(zero, int) else _of_columns(zero[start:stop], g_idx).unsqueeze(-1)
        numbers = unpacked(words[start:stop], bits, columns).view(stop - start, own_scale.shape[1], -1)
        if bits < 8:
            numbers.sub_(own_zero)
            own_zero = 0
        write_scaled(numbers, own_zero, own_scale, out[start:stop], rounded_to=rounded_to)


@dataclass(frozen=True)
class WholeNumbers:
    """Floats of 16 bits whose lowest bits are a whole number, if their other bits are `bits`: `first + number`."""

    first: int
    bits: int


_WHOLE_NUMBERS = {torch.bfloat16: WholeNumbers(128, 0x4300), torch.float16: WholeNumbers(1024, 0x6400)}
_LARGEST_SCALE = 2.0**100  # of larger ones, the product with 1024 could be infinite


def whole_numbers_for(scale: torch.Tensor, out: torch.Tensor) -> WholeNumbers | None:
    """How numbers of 4 bits are written to `out` for `scale_whole`.

    None if it would not be exact, or not faster: for wide or very large scales, small groups, and `out` in float32.
    """
    wide_groups = out.shape[1] // scale.shape[1] >= WIDE
    if scale.dtype == torch.float32 or not wide_groups or not float(scale.abs().amax()) < _LARGEST_SCALE:
        return None
    return _WHOLE_NUMBERS.get(out.dtype)


def scale_whole(out: torch.Tensor, whole: WholeNumbers, zero: torch.Tensor | int, scale: torch.Tensor) -> None:
    """Makes (number - zero) * scale of numbers that are written as `whole` says.

    The products of the scale with `first + number`, and with `first + zero`, are exact in float32. So is their
    difference, and it is rounded once.

    Args:
        out: [rows, columns], contiguous.
        zero: int8 [rows, groups], or one number.
        scale: [rows, groups], floating point.
    """
    factor = scale.float().reshape(-1)
    middle = whole.first + (zero if isinstance(zero, int) else zero.float().reshape(-1))
    multiply_and_add(out.view(1, len(factor), -1), factor, factor * -middle, torch.zeros_like(factor))


def write_scaled(
    numbers: torch.Tensor,
    zero: torch.Tensor | int,
    scale: torch.Tensor,
    out: torch.Tensor,
    *,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Writes (number - zero) * scale.

    Products are computed in float32. That is exact, unless scales have more bits than a half.

    Args:
        numbers: [rows, groups, size], int8 or bfloat16.
        zero: int8 [rows, groups, 1], or 0.
        scale: [rows, groups, 1], floating point.
        out: [rows, columns], with as many elements as `numbers`.
        rounded_to: Products are rounded to this dtype first, and then to that of `out`. None: they are rounded once.
    """
    into = out.view(numbers.shape)
    if scale.dtype == out.dtype == torch.bfloat16:  # which has all differences of two numbers
        into.copy_(numbers)
        if isinstance(zero, torch.Tensor):
            into.sub_(zero)
        into.mul_(scale)
        return
    rows, columns = out.shape
    scale, buffer = scale.float(), None
    for start, stop in pieces(rows, columns, FLOAT32_ELEMENTS):
        if out.dtype == torch.float32:
            products = into[start:stop]
        elif buffer is None:
            products = buffer = torch.empty((stop - start, *numbers.shape[1:]))
        else:
            products = buffer[: stop - start]
        products.copy_(numbers[start:stop])
        if isinstance(zero, torch.Tensor):
            products.sub_(zero[start:stop] if zero.shape[0] > 1 else zero)
        products.mul_(scale[start:stop] if scale.shape[0] > 1 else scale)
        if rounded_to not in (None, out.dtype, torch.float32):
            into[start:stop].copy_(products.to(rounded_to))
        elif out.dtype != torch.float32:
            into[start:stop].copy_(products)


def _of_columns(values: torch.Tensor, g_idx: torch.Tensor | None) -> torch.Tensor:
    """The values of groups [rows, groups]; or, in another order, of each column, [rows, columns]."""
    if g_idx is None:
        return values
    return torch.gather(values, 1, g_idx.to(torch.int64).expand(values.shape[0], -1))


class OrderedEncoding(Encoding):
    """An encoding whose columns may be in groups in any order.

    Attributes:
        group_size: Columns of a group; None if a row is one.
        ordered: Whether the part "g_idx" [columns] has the group of each column. Otherwise they are one after another.
    """

    group_size: int | None
    ordered: bool

    @abstractmethod
    def unordered(self) -> Self:
        """The same for matrices without that part."""


@dataclass(frozen=True)
class PackedEncoding(OrderedEncoding):
    """Rows of packed numbers; groups of columns share a scale and a zero point. A weight is (number - zero) * scale.

    Parts: "packed", int32 [rows, words]; "scale" [rows, groups]; "zero_point" and "g_idx" where there are some.

    Attributes:
        bits: 2, 4 or 8.
        group_size, ordered: See `OrderedEncoding`.
        zero_point: How the part "zero_point" is stored: "packed", along rows, int32 [words, groups]; "plain", whole
            numbers from `-2**(bits - 1)` on, [rows, groups]; None if there is none: all are in the middle.
    """

    bits: int
    group_size: int | None
    zero_point: str | None = None
    ordered: bool = False

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        groups = num_groups(columns, self.group_size)
        shapes: dict[str, tuple[int, ...]] = {
            "packed": (rows, words_of(columns, self.bits)),
            "scale": (rows, groups),
        }
        if self.zero_point == "packed":
            shapes["zero_point"] = (words_of(rows, self.bits), groups)
        elif self.zero_point:
            shapes["zero_point"] = (rows, groups)
        if self.ordered:
            shapes["g_idx"] = (columns,)
        return shapes

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        scaled = self._scaled_bytes(parts, slice(start, stop), out.shape[1], out.dtype)
        if scaled is not None:
            scaled.dequantize(0, out)
            return
        scale, zero = parts["scale"][start:stop], self._zero_point(parts, start, stop)
        words, g_idx = parts["packed"][start:stop], parts["g_idx"] if self.ordered else None
        write_packed(words, zero, scale, out, bits=self.bits, g_idx=g_idx, rounded_to=scale.dtype)

    def compiled_rows(self, parts: Parts, columns: int, dtype: torch.dtype) -> CompiledRows | None:
        scaled = self._scaled_bytes(parts, slice(0, len(parts["packed"])), columns, dtype)
        return None if scaled is None else scaled.compiled_rows(columns)

    def _scaled_bytes(self, parts: Parts, rows: slice, columns: int, dtype: torch.dtype) -> ScaledBytes | None:
        """Some rows for compiled functions, if they handle them."""
        words, scale, block = parts["packed"][rows], parts["scale"][rows], BlockSize(1, self.group_size)
        if not self.compiles or not can_compile(columns, block, scale.dtype, dtype):
            return None
        rounds, zeros = torch.bfloat16 in (scale.dtype, dtype), None
        if self.zero_point is not None:
            zero = self._zero_point(parts, rows.start, rows.stop)
            zeros = torch.as_tensor(zero - middle_of(self.bits)).float()
        return ScaledBytes(_KINDS[self.bits], words, scale.float(), block, rounds=rounds, zeros=zeros)

    @property
    def compiles(self) -> bool:
        return self.bits in _KINDS and not self.ordered

    def prepare(self, dtype: torch.dtype) -> None:
        if self.compiles:
            prepare_bytes(_KINDS[self.bits], torch.bfloat16, dtype, has_zeros=self.zero_point is not None)

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        if self.bits not in (4, 8) or self.ordered:
            return None
        return IntegerGroups(self.bits, self.group_size or columns, "packed", symmetric=self.zero_point is None)

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        scale, zero = parts["scale"][start:stop], self._zero_point(parts, start, stop)
        numbers = unpacked(parts["packed"][start:stop], self.bits, WORD_BITS // self.bits * parts["packed"].shape[1])
        return IntegerRows(numbers, scale, None if isinstance(zero, int) else zero)

    def _zero_point(self, parts: Parts, start: int, stop: int) -> torch.Tensor | int:
        """int8 [rows, groups], as `unpacked` gives them, or one number."""
        if self.zero_point is None:
            return middle_of(self.bits)
        if self.zero_point == "plain":
            return parts["zero_point"][start:stop].to(torch.int8) + middle_of(self.bits)
        words = parts["zero_point"][words_of(start, self.bits) : words_of(stop, self.bits)]
        return unpacked(turned(words), self.bits, stop - start).t()

    @property
    def row_step(self) -> int:
        return numbers_per_step(self.bits) if self.zero_point == "packed" else 1

    def part_rows(self, part: str, rows: int) -> int | None:
        if part == "g_idx":
            return None
        return words_of(rows, self.bits) if part == "zero_point" and self.zero_point == "packed" else rows

    @property
    def divisible(self) -> bool:
        return True

    def unordered(self) -> Self:
        return replace(self, ordered=False)

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return scratch_bytes(rows, columns, self.group_size, bits=self.bits, ordered=self.ordered)


def scratch_bytes(rows: int, columns: int, group_size: int | None, *, ordered: bool = False, bits: int = 4) -> int:
    """Of a piece's numbers and what they are made of, of their products, and of all scales and zero points."""
    numbers = max(columns, min(rows * columns, INT8_ELEMENTS))
    products = max(columns, min(rows * columns, FLOAT32_ELEMENTS))
    scales = rows * -(-columns // (group_size or columns)) + (products if ordered else 0)
    return (8 if bits == 3 else 3) * numbers + 6 * products + 12 * scales + (1 << 14)


def num_groups(columns: int, group_size: int | None) -> int:
    """The groups of a row.

    Raises:
        ValueError: They do not divide it evenly.
    """
    size = columns if group_size is None else group_size
    if size < 1 or columns % size:
        raise ValueError(f"groups of {size} do not divide its {columns} columns")
    return columns // size


def check_dtype(spec: TensorSpec, dtypes: tuple[torch.dtype, ...], what: str) -> None:
    """Compares the dtype of a stored tensor with those that it may have.

    Raises:
        CorruptShardError: It has another. The message names the tensor and its file.
    """
    if spec.dtype not in dtypes or spec.packed is not None:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CorruptShardError(
            f"{spec.file}: tensor {spec.name!r} is in {spec.dtype_name}; as the {what} of a quantized "
            f"matrix it would be in {allowed}",
            path=spec.file,
        )
