"""Blocks of GGUF's types have the values that the `gguf` package gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hermes_async.quantization.gguf_blocks import GGUF_TYPES, GgufEncoding
from tests.modeling.test_activations import allocated

gguf = pytest.importorskip("gguf", reason="it defines the values: pip install gguf")

ROWS, COLUMNS = 24, 7 * 1024  # more numbers than are dequantized at once
HALVES = {  # where a block has numbers in float16
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
SPECIAL = np.array([0.0, -0.0, 6e-8, -6e-8, 6e-5, 65504, -65504, 1, -1], np.float16)  # two are below the normal ones


def stored(name: str) -> np.ndarray:
    """Random bytes [rows, bytes of a row], without scales that are infinite or no number."""
    block, numbers = GGUF_TYPES[name], np.random.default_rng(0)
    if block.elements == 1:
        values = numbers.standard_normal((ROWS, COLUMNS), np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    blocks = numbers.integers(0, 256, (ROWS * COLUMNS // block.elements, block.nbytes), np.uint8)
    for offset in HALVES.get(name, ()):
        halves = numbers.integers(0, 0x7C00, len(blocks), np.uint16)
        halves |= numbers.integers(0, 2, len(blocks), np.uint16) << 15
        halves[: len(SPECIAL)] = numbers.permutation(SPECIAL).view(np.uint16)
        blocks[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    if name == "Q8_K":
        blocks[:, :4] = numbers.standard_normal((len(blocks), 1), np.float32).view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] %= 252  # exponents of larger numbers than float32 has
    return blocks.reshape(ROWS, -1)


def expected(name: str, data: np.ndarray) -> torch.Tensor:
    if name == "Q8_K":  # a scale in float32, 256 bytes with a sign, and sums that only products of matrices use
        blocks = data.reshape(-1, 292)
        values = blocks[:, :4].copy().view(np.float32) * blocks[:, 4:260].view(np.int8).astype(np.float32)
    else:
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values.copy()).view(ROWS, COLUMNS)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_values_are_those_of_the_gguf_package(name: str) -> None:
    encoding, data = GgufEncoding(name), stored(name)
    parts, values = {"weight": torch.from_numpy(data)}, expected(name, data)
    assert encoding.shapes(ROWS, COLUMNS) == {"weight": data.shape}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for start, stop in ((0, ROWS), (5, 6), (3, 23)):
            out = torch.empty((stop - start, COLUMNS), dtype=dtype)
            encoding.dequantize(parts, start, stop, out)
            assert torch.equal(out, values[start:stop].to(dtype))
    assert np.array_equal(parts["weight"].numpy(), stored(name))  # they are only read


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_a_row_may_be_one_block(name: str) -> None:
    encoding, block, data = GgufEncoding(name), GGUF_TYPES[name], stored(name)
    values = expected(name, data).view(-1, block.elements)
    out = torch.empty((1, block.elements))
    for row in (0, 1, 2, 3, len(values) - 1):
        encoding.dequantize({"weight": torch.from_numpy(data).view(-1, block.nbytes)}, row, row + 1, out)
        assert torch.equal(out[0], values[row])


@pytest.mark.parametrize("name", [name for name, block in GGUF_TYPES.items() if block.elements > 1])
def test_scratch_is_what_is_taken_at_most(name: str) -> None:
    encoding, parts = GgufEncoding(name), {"weight": torch.from_numpy(stored(name))}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, ROWS):
            out = torch.empty((rows, COLUMNS), dtype=dtype)
            taken = allocated(lambda rows=rows, out=out: encoding.dequantize(parts, 0, rows, out))  # type: ignore[misc]
            assert taken.most_bytes <= encoding.scratch_bytes(rows, COLUMNS, dtype.itemsize)


def test_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    for name, block in GGUF_TYPES.items():
        assert (block.elements, block.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def test_what_is_not_known_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="GGUF type IQ2_XXS cannot be dequantized; these can: F32, "):
        GgufEncoding("IQ2_XXS")
    with pytest.raises(ValueError, match="rows of 300 numbers cannot be divided into blocks of 256"):
        GgufEncoding("Q4_K").shapes(4, 300)
