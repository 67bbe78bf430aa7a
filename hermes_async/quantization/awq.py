"""Checkpoints in AWQ's layouts, as AutoAWQ and AutoRound write them.

Source: AutoAWQ (casper-hansen/AutoAWQ), `WQLinear_GEMM`, `WQLinear_GEMV` and `dequantize_gemm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hermes_async.errors import UnsupportedModelError
from hermes_async.quantization.encoding import Encoding, IntegerGroups, IntegerRows, Parts, StoredMatrix
from hermes_async.quantization.gptq import bits_of, folder_of, group_size_of, misshapen, named_parts
from hermes_async.quantization.packed_integers import (
    WORD_BITS,
    num_groups,
    scale_whole,
    scratch_bytes,
    turned,
    unpacked,
    whole_numbers_for,
    words_of,
    write_packed,
    write_scaled,
)
from hermes_async.quantization.pieces import FLOAT16_ELEMENTS, INT8_ELEMENTS, pieces
from hermes_async.storage.tensor_spec import TensorSpec

_BITS = (4,)
_IN_A_WORD = WORD_BITS // 4
_ROW_STEP = 64
"""Rows whose words take half of a cache line: the other half is not read twice while it is in the cache."""
_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of the numbers in a word."""
_NAMES = {"packed": "qweight", "zero_point": "qzeros", "scale": "scales"}


@dataclass(frozen=True)
class AwqEncoding(Encoding):
    """Numbers of 4 bits packed along rows, with the columns as the first dimension; the version "gemm".

    A word has eight rows of one column: from its lowest bits on the rows 0, 2, 4, 6, 1, 3, 5, 7.

    Parts: "packed", int32 [columns, words]; "zero_point", int32 [groups, words]; "scale" [groups, rows].

    Attributes:
        group_size: Columns of a group; None if a row is one.
    """

    group_size: int | None

    @property
    def name(self) -> str:
        return "AWQ int4"

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        groups = num_groups(columns, self.group_size)
        if rows % _IN_A_WORD:
            raise ValueError(f"its {rows} rows do not fill whole words of {_IN_A_WORD} numbers")
        words = rows // _IN_A_WORD
        return {"packed": (columns, words), "zero_point": (groups, words), "scale": (groups, rows)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        columns, scale = out.shape[1], parts["scale"][:, start:stop].t()
        of_rows = slice(start // _IN_A_WORD, stop // _IN_A_WORD)
        zero = _zero_points(parts["zero_point"][:, of_rows])
        words, whole = turned(parts["packed"][:, of_rows]), whole_numbers_for(scale, out)
        for first, last in pieces(len(words), columns * _IN_A_WORD, FLOAT16_ELEMENTS if whole else INT8_ELEMENTS):
            rows = slice(first * _IN_A_WORD, last * _IN_A_WORD)
            if whole:
                _write_rows(words[first:last], out[rows].view(torch.int16), whole.bits)
                scale_whole(out[rows], whole, zero[rows], scale[rows])
            else:
                numbers = _rows_of(words[first:last]).view(-1, scale.shape[1], columns // scale.shape[1])
                write_scaled(numbers.sub_(zero[rows].unsqueeze(-1)), 0, scale[rows].unsqueeze(-1), out[rows])

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        return IntegerGroups(4, self.group_size or columns, "packed", symmetric=False)

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        words = slice(start // _IN_A_WORD, stop // _IN_A_WORD)
        numbers = _rows_of(turned(parts["packed"][:, words]))
        return IntegerRows(numbers, parts["scale"][:, start:stop].t(), _zero_points(parts["zero_point"][:, words]))

    @property
    def row_step(self) -> int:
        return _ROW_STEP

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        a_word = _IN_A_WORD * columns  # the least numbers that are unpacked at once
        return rows * columns + 9 * a_word + scratch_bytes(rows, columns, self.group_size)


def _rows_of(words: torch.Tensor) -> torch.Tensor:
    """The numbers in words [words, columns]: int8 [rows, columns]."""
    count, columns = words.shape
    numbers = torch.empty((count, _IN_A_WORD, columns), dtype=torch.int8)
    for idx, row in enumerate(_ROWS):
        numbers[:, row].copy_((words >> 4 * idx).bitwise_and_(0xF))
    return numbers.view(-1, columns)


def _write_rows(words: torch.Tensor, out: torch.Tensor, bits: int) -> None:
    """Writes the numbers in words [words, columns] to int16 [rows, columns], each with some other bits."""
    rows = out.view(len(words), _IN_A_WORD, -1)
    halves = words.to(torch.int16), (words >> 16).to(torch.int16)
    for idx, row in enumerate(_ROWS):
        torch.bitwise_right_shift(halves[idx // 4], idx % 4 * 4, out=rows[:, row])
    out.bitwise_and_(0xF).bitwise_or_(bits)


def _zero_points(words: torch.Tensor) -> torch.Tensor:
    """The numbers in words [groups, words]: int8 [rows, groups]. As `_rows_of`, with fewer calls for few numbers."""
    shifts = torch.tensor([4 * _ROWS.index(row) for row in range(_IN_A_WORD)], dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts).bitwise_and_(0xF).to(torch.int8)
    return numbers.view(len(words), -1).t()


@dataclass(frozen=True)
class AwqRowsEncoding(Encoding):
    """Numbers of 4 bits packed along columns, and so are the zero points of a row's groups; the version "gemv".

    Parts: "packed", int32 [rows, words]; "zero_point", int32 [rows, words]; "scale" [rows, groups]. Zero points and
    scales are padded with zeros.

    Attributes:
        group_size: Columns of a group; None if a row is one.
    """

    group_size: int | None

    @property
    def name(self) -> str:
        return "AWQ int4"

    def may_be_zero(self, part: str) -> bool:
        return True  # what they are padded with

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        if columns % _IN_A_WORD:
            raise ValueError(f"its {columns} columns do not fill whole words of {_IN_A_WORD} numbers")
        words = _padded_words(num_groups(columns, self.group_size), self.group_size or columns)
        return {
            "packed": (rows, columns // _IN_A_WORD),
            "zero_point": (rows, words),
            "scale": (rows, words * _IN_A_WORD),
        }

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        columns = out.shape[1]
        groups = num_groups(columns, self.group_size)
        zero, scale = unpacked(parts["zero_point"][start:stop], 4, groups), parts["scale"][start:stop, :groups]
        write_packed(parts["packed"][start:stop], zero, scale, out, bits=4)

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows

    @property
    def divisible(self) -> bool:
        return True

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return scratch_bytes(rows, columns, self.group_size)


def _padded_words(groups: int, group_size: int) -> int:
    """The words of a row's zero points: small groups are padded, so that kernels read them in steps."""
    step = 1 if group_size >= 128 else 2 if group_size == 64 else 4
    return -(-words_of(groups, 4) // step) * step


def awq_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The AWQ matrices among the tensors of a checkpoint, by the names that their weights have unquantized.

    Raises:
        UnsupportedModelError: The layout is another one, or its numbers have other bits.
        CorruptShardError: A matrix lacks a part, or has one of another shape or dtype.
    """
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version not in ("gemm", "gemv") or settings.get("backend") == "llm-awq":
        layout = "llm-awq" if settings.get("backend") == "llm-awq" else version
        raise UnsupportedModelError(
            f"{folder_of(tensors)} is an AWQ checkpoint in the layout {layout!r}; hermes_async reads gemm and gemv. "
            "Use the model that it was made from, or one of these",
            path=folder_of(tensors),
        )
    found: dict[str, StoredMatrix] = {}
    for name, packed in tensors.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        bits_of(settings, _BITS, packed)
        parts = named_parts(module, packed, _NAMES, tensors)
        if len(packed.shape) != 2:
            raise misshapen(packed, "which is no matrix of words")
        size, (first, second) = group_size_of(settings, packed), packed.shape
        if version == "gemv":
            encoding: Encoding = AwqRowsEncoding(size)
            shape = (first, second * _IN_A_WORD)
        else:
            encoding = AwqEncoding(size)
            shape = (second * _IN_A_WORD, first)
        found[f"{module}.weight"] = StoredMatrix(encoding, shape, parts, as_linear=True)
    return found
