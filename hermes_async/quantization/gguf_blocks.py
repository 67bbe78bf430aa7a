"""The block formats of GGUF: rows of blocks, each of which holds its scales beside its packed numbers.

Source: the `gguf` package's `constants.GGML_QUANT_SIZES` (sizes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hermes_async.quantization.encoding import CompiledRows, Encoding, IntegerGroups, IntegerRows, Parts
from hermes_async.quantization.gguf_kernels import BlockKernels, kernels_of

_FOUR_BITS = {"Q4_0": (2, 16), "Q4_1": (4, 16), "Q4_K": (16, 32)}
"""Types whose numbers have four bits: where in a block these begin, and the bytes that pack two runs of numbers."""
_CHUNK = 1 << 18  # elements that are dequantized at once: their temporary tensors stay in the processor's cache


@dataclass(frozen=True)
class GgufEncoding(Encoding):
    """A matrix in one of GGUF's types: the part "weight", uint8 [rows, bytes of a row].

    Attributes:
        type_name: As the format names it, such as "Q4_K". One of `GGUF_TYPES`.
    """

    type_name: str

    def __post_init__(self) -> None:
        if self.type_name not in GGUF_TYPES:
            raise ValueError(f"GGUF type {self.type_name} cannot be dequantized; these can: {', '.join(GGUF_TYPES)}")

    @property
    def name(self) -> str:
        return self.type_name

    @property
    def compiles(self) -> bool:
        return self.needs_compiler

    @property
    def needs_compiler(self) -> bool:
        return GGUF_TYPES[self.type_name].dtype is None

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        block = GGUF_TYPES[self.type_name]
        if columns % block.elements:
            raise ValueError(f"rows of {columns} numbers cannot be divided into blocks of {block.elements}")
        return {"weight": (rows, columns // block.elements * block.nbytes)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        block, stored = GGUF_TYPES[self.type_name], parts["weight"][start:stop]
        if block.dtype is not None:
            out.copy_(stored.view(block.dtype))
            return
        dequantize, blocks = self._kernels().dequantize, stored.view(-1, block.nbytes).numpy()
        for of_chunk, values in _chunks(out.view(-1, block.elements)):
            dequantize(blocks[of_chunk], values.numpy())

    def compiled_rows(self, parts: Parts, columns: int, dtype: torch.dtype) -> CompiledRows | None:
        block = GGUF_TYPES[self.type_name]
        if block.dtype is not None or dtype != torch.float32:
            return None
        kernels, stored = self._kernels(), parts["weight"].numpy()
        blocks = stored.reshape(-1, block.nbytes)

        def write(start: int, stop: int, out: NDArray[np.float32]) -> None:
            kernels.dequantize(stored[start:stop].reshape(-1, block.nbytes), out.reshape(-1, block.elements))

        return CompiledRows(write, partial(kernels.multiplier, blocks), kernels.lines_at_once)

    def prepare(self, dtype: torch.dtype) -> None:
        if self.needs_compiler:
            self._kernels()

    def _kernels(self) -> BlockKernels:
        block = GGUF_TYPES[self.type_name]
        return kernels_of(self.type_name, block.elements, block.nbytes)

    def integers(self, rows: int, columns: int) -> IntegerGroups | None:
        if self.type_name not in _FOUR_BITS:
            return None
        return IntegerGroups(4, 32, "weight", symmetric=self.type_name == "Q4_0")

    def integer_rows(self, parts: Parts, start: int, stop: int) -> IntegerRows:
        num_rows = stop - start
        blocks = parts["weight"][start:stop].view(-1, GGUF_TYPES[self.type_name].nbytes)
        first, run = _FOUR_BITS[self.type_name]
        octets = blocks[:, first:].view(len(blocks), -1, run)
        numbers = torch.stack([octets & 15, octets >> 4], dim=2).view(num_rows, -1).view(torch.int8)
        if self.type_name == "Q4_K":
            scales, minimums = _scales_and_minimums(blocks)
            return IntegerRows(numbers, scales.view(num_rows, -1), None, minimums.view(num_rows, -1))
        scales = _half(blocks, 0).view(num_rows, -1)
        minimums = None if self.type_name == "Q4_0" else -_half(blocks, 2).view(num_rows, -1)
        return IntegerRows(numbers, scales, None, minimums)

    def part_rows(self, part: str, rows: int) -> int | None:
        return rows

    @property
    def divisible(self) -> bool:
        return True

    def scratch_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return 0 if itemsize == 4 else 4 * min(_CHUNK, rows * columns)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        elements: Numbers of a block.
        nbytes: Bytes of a block.
        dtype: Of the numbers, if they are stored as they are; `gguf_kernels` dequantizes the others.
    """

    elements: int
    nbytes: int
    dtype: torch.dtype | None = None


def _chunks(out: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some blocks at a time, and where their values go in float32 [blocks, elements], from where they are rounded."""
    step = max(1, _CHUNK // out.shape[1])
    if out.dtype == torch.float32:
        yield slice(0, len(out)), out
        return
    scratch = out.new_empty((min(step, len(out)), out.shape[1]), dtype=torch.float32)
    for first in range(0, len(out), step):
        chunk = out[first : first + step]
        yield slice(first, first + step), scratch[: len(chunk)]
        chunk.copy_(scratch[: len(chunk)])


# --- the parts of blocks whose numbers have four bits ---


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The numbers in float16 at a byte of each block, in float32 [blocks, 1]."""
    return blocks[:, offset : offset + 2].view(torch.float16).contiguous().float()


def _scales_and_minimums(blocks: torch.Tensor) -> torch.Tensor:
    """Eight scales, and eight minimums, in twelve bytes: float32 [2, blocks, 8]."""
    packed = blocks[:, 4:16].view(torch.int32).t().contiguous()
    lower, last = packed[:2], packed[2]
    four_bits = torch.stack((last, last >> 4)).bitwise_and_(0x0F0F0F0F)
    upper = (lower >> 2).bitwise_and_(0x30303030).bitwise_or_(four_bits)
    numbers = torch.stack((lower & 0x3F3F3F3F, upper), 2).view(torch.uint8)
    return numbers * blocks[:, :4].view(torch.float16).t().contiguous().float()[:, :, None]


GGUF_TYPES: Mapping[str, BlockType] = {
    "F32": BlockType(1, 4, torch.float32),
    "F16": BlockType(1, 2, torch.float16),
    "BF16": BlockType(1, 2, torch.bfloat16),
    "Q8_0": BlockType(32, 34),
    "Q4_0": BlockType(32, 18),
    "Q4_1": BlockType(32, 20),
    "Q5_0": BlockType(32, 22),
    "Q5_1": BlockType(32, 24),
    "Q2_K": BlockType(256, 84),
    "Q3_K": BlockType(256, 110),
    "Q4_K": BlockType(256, 144),
    "Q5_K": BlockType(256, 176),
    "Q6_K": BlockType(256, 210),
    "Q8_K": BlockType(256, 292),
    "IQ4_NL": BlockType(32, 18),
    "IQ4_XS": BlockType(256, 136),
    "MXFP4": BlockType(32, 17),
    "TQ1_0": BlockType(256, 54),
    "TQ2_0": BlockType(256, 66),
}
"""The types that can be dequantized, by their names."""
