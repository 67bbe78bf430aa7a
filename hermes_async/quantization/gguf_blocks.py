"""The block formats of GGUF: rows of blocks, each of which holds its scales beside its packed numbers.

Source: the `gguf` package's `constants.GGML_QUANT_SIZES` (sizes) and `quants` (values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from hermes_async.quantization.encoding import Encoding, IntegerGroups, IntegerRows, Parts

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

    def shapes(self, rows: int, columns: int) -> Mapping[str, tuple[int, ...]]:
        block = GGUF_TYPES[self.type_name]
        if columns % block.elements:
            raise ValueError(f"rows of {columns} numbers cannot be divided into blocks of {block.elements}")
        return {"weight": (rows, columns // block.elements * block.nbytes)}

    def dequantize(self, parts: Parts, start: int, stop: int, out: torch.Tensor) -> None:
        block, stored = GGUF_TYPES[self.type_name], parts["weight"][start:stop]
        if isinstance(block.values, torch.dtype):
            out.copy_(stored.view(block.values))
        else:
            block.values(stored.view(-1, block.nbytes), out.view(-1, block.elements))

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
        # Of a chunk: numbers in bytes and in float32, and values that are not rounded yet. Of all rows: scales.
        of_chunk = 5 if itemsize == 4 else 9
        return of_chunk * min(_CHUNK, rows * columns) + rows * columns


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        elements: Numbers of a block.
        nbytes: Bytes of a block.
        values: The dtype of the numbers, if they are stored as they are. Else a function that writes the values of
            blocks, uint8 [blocks, nbytes], into a tensor [blocks, elements].
    """

    elements: int
    nbytes: int
    values: torch.dtype | Callable[[torch.Tensor, torch.Tensor], None]


# --- numbers within a block ---
#
# A byte that packs several numbers holds the first of one run of numbers, the first of the next run, and so on. So
# numbers are unpacked into planes, one for each place within the bytes. Eight bytes at a time are an int64.
# Numbers with an offset are unpacked at the upper end of their bytes, with the highest bit flipped. The byte is then
# the number less its offset, times a power of two, by which the scale is divided. Scales and products stay exact.
# Tables are made when they are first needed. Otherwise every import would pay for the first computations of torch.


def _chunks(out: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some blocks at a time, and where their values go in float32 [blocks, elements], from where they are rounded."""
    step = _CHUNK // out.shape[1]
    scratch = (
        None if out.dtype == torch.float32 else out.new_empty((min(step, len(out)), out.shape[1]), dtype=torch.float32)
    )
    for first in range(0, len(out), step):
        chunk = out[first : first + step]
        if scratch is None:
            yield slice(first, first + step), chunk
        else:
            yield slice(first, first + step), scratch[: len(chunk)]
            chunk.copy_(scratch[: len(chunk)])


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The numbers in float16 at a byte of each block, in float32 [blocks, 1]."""
    return blocks[:, offset : offset + 2].view(torch.float16).contiguous().float()


def _words(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bytes of each block, eight to an int64 [blocks, (stop - start) / 8]."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(torch.int64)


def _planes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Each number of so many bits in a byte of its own: int64 [numbers of a byte, blocks, words of a block]."""
    return (words >> _places(bits)).bitwise_and_(_in_each_byte((1 << bits) - 1))


def _planes_above(words: torch.Tensor, bits: int) -> torch.Tensor:
    """As `_planes`, but the numbers are at the upper end of their bytes."""
    return (words << _places(bits).flip(0)).bitwise_and_(_in_each_byte(0xFF & 0xFF00 >> bits))


@cache
def _places(bits: int) -> torch.Tensor:
    """Where the numbers of so many bits begin in a byte, [numbers of a byte, 1, 1]."""
    return torch.arange(0, 8, bits, device="cpu")[:, None, None]


def _in_each_byte(byte: int) -> int:
    """An int64 whose bytes are all `byte`."""
    return int.from_bytes(bytes([byte] * 8), "little", signed=True)


# --- blocks of 32 numbers: a scale, perhaps a minimum, and two runs of 16 numbers ---


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _half(blocks, 0)
    for rows, target in _chunks(out):
        target.copy_(blocks[rows, 2:].view(torch.int8))
        target.mul_(scale[rows])


def _two_runs(blocks: torch.Tensor, out: torch.Tensor, *, signed: bool, bits: int) -> None:
    """Q4_0 and Q5_0, which are `signed`, and Q4_1 and Q5_1, which have a minimum."""
    dtype = torch.int8 if signed else torch.uint8
    table = _bit_table(0x80, 0) if signed else _bit_table(0, 0x10)
    packed = blocks.shape[1] - 16
    scale = _half(blocks, 0).div_(1 << 8 - bits if signed else 1)
    minimum = None if signed else _half(blocks, 2)
    for rows, target in _chunks(out):
        words = _words(blocks[rows], packed, packed + 16)
        if bits == 4:
            planes = _planes_above(words.bitwise_xor_(_in_each_byte(0x88)), 4) if signed else _planes(words, 4)
        else:
            planes = _planes(words, 4)
            if signed:
                planes.bitwise_left_shift_(3)
            for run, plane in enumerate(planes):
                fifth = packed - 4 + 2 * run
                plane.bitwise_or_(_spread(blocks[rows, fifth : fifth + 2], table))
        _multiply_runs(planes.view(dtype), scale[rows], target, 16)
        if minimum is not None:
            target.add_(minimum[rows])


def _multiply_runs(planes: torch.Tensor, scale: torch.Tensor, target: torch.Tensor, length: int) -> None:
    """Writes two planes, which hold runs of so many numbers in turns, times a scale of one or more runs."""
    runs = target.view(-1, 2, length)
    for run, plane in enumerate(planes.view(2, -1, length)):
        runs[:, run].copy_(plane)  # each by itself: torch copies a transposed tensor slowly
    target.view(scale.numel(), -1).mul_(scale.view(-1, 1))


def _spread(packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Two bytes [blocks, 2], a bit for each of 16 numbers, as words [blocks, 2] with a byte for each number."""
    packed = packed.view(torch.int16).contiguous().view(torch.uint8)
    return torch.index_select(table, 0, packed.int().view(-1)).view(-1, 2)


@cache
def _bit_table(zero: int, one: int) -> torch.Tensor:
    """For each byte an int64, whose bytes are `zero` or `one` for each of its bits."""
    rows = [[one if byte >> bit & 1 else zero for bit in range(8)] for byte in range(256)]
    return torch.tensor(rows, dtype=torch.uint8, device="cpu").view(torch.int64).view(-1)


_IQ4_NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_NUMBERS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice what they stand for


def _iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _from_table(blocks, out, (2, 18), _half(blocks, 0), _IQ4_NUMBERS)


def _mxfp4(blocks: torch.Tensor, out: torch.Tensor) -> None:
    exponent = blocks[:, :1].int()
    power = torch.where(exponent < 2, 0x00200000 << exponent, exponent - 1 << 23).view(torch.float32)
    _from_table(blocks, out, (1, 17), power, _MXFP4_NUMBERS)


def _iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).view(-1, 8)
    high = torch.stack([blocks[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 8)
    scale = (low | high << 4).sub_(32).view(torch.int8) * _half(blocks, 0)
    _from_table(blocks, out, (8, 136), scale, _IQ4_NUMBERS)


def _from_table(
    blocks: torch.Tensor, out: torch.Tensor, packed: tuple[int, int], scale: torch.Tensor, numbers: tuple[int, ...]
) -> None:
    """Four bits that stand for one of sixteen numbers, times the scale of each 32 numbers."""
    table = _pair_table(numbers)
    for rows, target in _chunks(out):
        pairs = _planes(_words(blocks[rows], *packed), 4).view(torch.int16).int()
        _multiply_runs(torch.index_select(table, 0, pairs.view(-1)).view(torch.int8), scale[rows], target, 16)


@cache
def _pair_table(numbers: tuple[int, ...]) -> torch.Tensor:
    """For each int16 of two bytes from 0 to 15, the int16 of the two bytes with their numbers."""
    values = torch.tensor(numbers, dtype=torch.int8, device="cpu")
    table = torch.stack((values.repeat(256), values.repeat_interleave(256)), 1)
    return table.view(torch.int16).view(-1)


# --- blocks of 256 numbers in eight runs of 32, whose scales and minimums have six bits ---


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale, minimum = _scales_and_minimums(blocks)
    for rows, target in _chunks(out):
        planes = _planes(blocks[rows, 16:].view(torch.int64), 4)
        _multiply_runs(planes.view(torch.uint8), scale[rows], target, 32)
        target.view(-1, 32).sub_(minimum[rows].view(-1, 1))


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale, minimum = _scales_and_minimums(blocks)
    for rows, target in _chunks(out):
        quants, high = blocks[rows, 48:].view(torch.int64), blocks[rows, 16:48].view(torch.int64)
        planes, bits = _planes(quants, 4), _planes(high, 1)
        bits.bitwise_left_shift_(4)
        planes.view(2, -1, 4, 4).bitwise_or_(bits.view(4, 2, -1, 4).permute(1, 2, 0, 3))
        _multiply_runs(planes.view(torch.uint8), scale[rows], target, 32)
        target.view(-1, 32).sub_(minimum[rows].view(-1, 1))


def _scales_and_minimums(blocks: torch.Tensor) -> torch.Tensor:
    """Eight scales, and eight minimums, in twelve bytes: float32 [2, blocks, 8]."""
    packed = blocks[:, 4:16].view(torch.int32).t().contiguous()
    lower, last = packed[:2], packed[2]
    four_bits = torch.stack((last, last >> 4)).bitwise_and_(0x0F0F0F0F)
    upper = (lower >> 2).bitwise_and_(0x30303030).bitwise_or_(four_bits)
    numbers = torch.stack((lower & 0x3F3F3F3F, upper), 2).view(torch.uint8)
    return numbers * blocks[:, :4].view(torch.float16).t().contiguous().float()[:, :, None]


# --- blocks of 256 numbers, of which four runs of 32 are packed together ---


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = (blocks[:, :16] & 15) * _half(blocks, 80)
    minimum = (blocks[:, :16] >> 4) * _half(blocks, 82)
    for rows, target in _chunks(out):
        _unpack(_planes(_words(blocks[rows], 16, 80), 2).view(torch.uint8), target)
        runs = target.view(-1, 16)
        runs.mul_(scale[rows].view(-1, 1)).sub_(minimum[rows].view(-1, 1))


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = torch.stack((blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4), 1).view(-1, 16)
    high = torch.stack([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], 1).view(-1, 16)
    scale = (low | high << 4).sub_(32).view(torch.int8) * _half(blocks, 108).div_(32)
    for rows, target in _chunks(out):
        planes, bits = _planes(_words(blocks[rows], 32, 96), 2), _words(blocks[rows], 0, 32).bitwise_not_()
        of_halves = _planes(bits, 4).transpose(0, 1).reshape(-1, 8) << 2
        planes.bitwise_or_((of_halves >> torch.arange(4)[:, None, None]).bitwise_and_(_in_each_byte(0x04)))
        _unpack(planes.bitwise_left_shift_(5).view(torch.int8), target)
        target.view(-1, 16).mul_(scale[rows].view(-1, 1))


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = blocks[:, 192:208].view(torch.int8) * _half(blocks, 208).div_(4)
    for rows, target in _chunks(out):
        planes = _planes_above(_words(blocks[rows], 128, 192).bitwise_xor_(_in_each_byte(0xAA)), 2)
        lower = _planes(_words(blocks[rows], 0, 128).view(-1, 2, 4).transpose(0, 1).reshape(2, -1), 4)
        planes.view(-1).bitwise_or_(lower.bitwise_left_shift_(2).view(-1))
        _unpack(planes.view(torch.int8), target)
        target.view(-1, 16).mul_(scale[rows].view(-1, 1))


def _tq2_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _half(blocks, 64)
    for rows, target in _chunks(out):
        planes = _planes(_words(blocks[rows], 0, 64), 2).view(torch.uint8)
        _unpack(planes.sub_(1).view(torch.int8), target)
        target.mul_(scale[rows])


def _unpack(planes: torch.Tensor, target: torch.Tensor) -> None:
    """Writes four planes, which hold runs of 32 numbers in turns."""
    runs = target.view(-1, 4, 32)
    for run, plane in enumerate(planes.view(4, -1, 32)):
        runs[:, run].copy_(plane)


# --- the others ---


def _float16(blocks: torch.Tensor, out: torch.Tensor) -> None:
    for rows, target in _chunks(out):
        target.copy_(blocks[rows].view(torch.float16))


def _q8_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = blocks[:, :4].view(torch.float32)
    for rows, target in _chunks(out):
        target.copy_(blocks[rows, 4:260].view(torch.int8))
        target.mul_(scale[rows])


def _tq1_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Five numbers of -1, 0 and 1 to a byte, as digits of a fraction with the base three."""
    scale = _half(blocks, 52)
    for rows, target in _chunks(out):
        for (start, stop), first, num_digits in (((0, 32), 0, 5), ((32, 48), 160, 5), ((48, 52), 240, 4)):
            digits = blocks[rows, start:stop]
            for digit in range(num_digits):
                begin = first + digit * (stop - start)
                numbers = (digits.short() * 3 >> 8).sub_(1)
                torch.mul(numbers, scale[rows], out=target[:, begin : begin + stop - start])
                digits = digits * 3


GGUF_TYPES: Mapping[str, BlockType] = {
    "F32": BlockType(1, 4, torch.float32),
    "F16": BlockType(1, 2, _float16),
    "BF16": BlockType(1, 2, torch.bfloat16),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_0": BlockType(32, 18, partial(_two_runs, signed=True, bits=4)),
    "Q4_1": BlockType(32, 20, partial(_two_runs, signed=False, bits=4)),
    "Q5_0": BlockType(32, 22, partial(_two_runs, signed=True, bits=5)),
    "Q5_1": BlockType(32, 24, partial(_two_runs, signed=False, bits=5)),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "Q8_K": BlockType(256, 292, _q8_k),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
    "MXFP4": BlockType(32, 17, _mxfp4),
    "TQ1_0": BlockType(256, 54, _tq1_0),
    "TQ2_0": BlockType(256, 66, _tq2_0),
}
"""The types that can be dequantized, by their names."""
