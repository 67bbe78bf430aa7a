"""Compiled functions of numbers of one byte: values are those of torch's operators, and products are theirs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hermes_async.quantization.bfloat16_products import Bfloat16Products
from hermes_async.quantization.block_scales import BlockSize
from hermes_async.quantization.encoded_weight import EncodedParameter, EncodedWeight
from hermes_async.quantization.encoding import Encoding, StoredMatrix
from hermes_async.quantization.fp8 import Fp8Encoding
from hermes_async.quantization.packed_integers import PackedEncoding
from hermes_async.quantization.row_products import product_of_rows
from hermes_async.quantization.row_threads import ONE_THREAD, RowThreads
from hermes_async.quantization.scaled_numbers import ScaledEncoding
from tests.quantization.test_encoded_weight import spec

ROWS, COLUMNS = 90, 4384  # more columns than are multiplied at once with a row
SIZES = ((None, None), (1, None), (None, 32), (32, 128), (1, 32), (128, 4384))
DTYPES = (torch.float32, torch.bfloat16)


def parts_of(encoding: Encoding, scale_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A matrix with every byte in it."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(0, 256, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    numbers[0, :256] = torch.arange(256, dtype=torch.uint8)
    shapes = encoding.shapes(ROWS, COLUMNS)
    scale = torch.randn(shapes["scale"], generator=generator) * torch.logspace(-3, 3, shapes["scale"][1])
    parts = {"scale": scale.to(scale_dtype)}
    if "zero_point" in shapes:
        zeros = torch.randint(-(1 << 31), 1 << 31, shapes["zero_point"], generator=generator).to(torch.int32)
        plain = zeros.to(torch.int8) >> 4 if encoding.name == "int4" else zeros.to(torch.int8)
        parts["zero_point"] = zeros if getattr(encoding, "zero_point", None) == "packed" else plain
    if isinstance(encoding, PackedEncoding):
        return parts | {"packed": numbers.view(torch.int32)[:, : shapes["packed"][1]].contiguous()}
    return parts | {"weight": numbers.view(torch.int8 if encoding.name == "int8" else torch.float8_e4m3fn)}


def values_of(encoding: Encoding, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """As torch's operators dequantize it."""
    values = torch.empty(ROWS, COLUMNS, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("hermes_async.quantization.block_scales.has_compiler", lambda: False)
        encoding.dequantize(parts, 0, ROWS, values)
    return values


def encodings() -> list[tuple[Encoding, torch.dtype]]:
    of_fp8 = [(Fp8Encoding(BlockSize(*size)), torch.float32) for size in SIZES]
    of_scaled = [
        (ScaledEncoding(kind, BlockSize(1, None), in_scale_dtype=rounds), scale_dtype)
        for kind in ("fp8", "int8")
        for scale_dtype in DTYPES
        for rounds in (True, False)
    ]
    of_scaled.append((ScaledEncoding("int8", BlockSize(1, 32), zero_point=True), torch.bfloat16))
    of_packed = [
        (PackedEncoding(bits, group, zero), scale_dtype)
        for bits in (4, 8)
        for group in (None, 32)
        for zero in (None, "plain", "packed")
        for scale_dtype in DTYPES
    ]
    return [*of_fp8, *of_scaled, *of_packed]


@pytest.mark.parametrize(("encoding", "scale_dtype"), encodings(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_that_torch_computes(encoding: Encoding, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    parts = parts_of(encoding, scale_dtype)
    compiled, expected = encoding.compiled_rows(parts, COLUMNS, dtype), values_of(encoding, parts, dtype)
    assert compiled is not None
    found, written = torch.empty(ROWS, COLUMNS, dtype=dtype), torch.empty(ROWS - 7, COLUMNS)
    for start, stop in ((0, 32), (32, 64), (64, ROWS)):
        encoding.dequantize(parts, start, stop, found[start:stop])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    compiled.write(7, ROWS, written.numpy())
    torch.testing.assert_close(written, expected[7:].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("encoding", "scale_dtype"), encodings(), ids=str)
@pytest.mark.parametrize("num_lines", [1, 3, 4, 20, 300])
def test_products_are_those_of_the_dequantized_matrix(
    encoding: Encoding, scale_dtype: torch.dtype, num_lines: int
) -> None:
    lines = torch.randn(num_lines, COLUMNS, generator=torch.Generator().manual_seed(num_lines))
    parts, threads = parts_of(encoding, scale_dtype), RowThreads(3)
    if "weight" in parts:
        parts["weight"] = parts["weight"].float().nan_to_num(1).to(parts["weight"].dtype)
    for dtype in DTYPES:
        values = values_of(encoding, parts, dtype).double()
        compiled = encoding.compiled_rows(parts, COLUMNS, dtype)
        assert compiled is not None
        bound = 1e-5 * (lines.double().abs() @ values.abs().T)
        for own in (threads, ONE_THREAD):
            product = product_of_rows(compiled, ROWS, lines, None, block_rows=32, threads=own)
            assert bool(((product.double() - lines.double() @ values.T).abs() <= bound).all())
    threads.close()


def test_what_has_no_compiled_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, whole = Fp8Encoding(BlockSize(None, None)), BlockSize(None, None)
    parts = parts_of(encoding)
    assert encoding.compiled_rows(parts, COLUMNS, torch.float16) is None
    narrow = parts | {"weight": parts["weight"][:, :33].contiguous()}
    assert encoding.compiled_rows(narrow, 33, torch.float32) is None
    assert Fp8Encoding(BlockSize(1, 16)).compiled_rows(parts, COLUMNS, torch.float32) is None
    of_float16 = parts | {"scale": torch.ones(1, 1, dtype=torch.float16)}
    assert ScaledEncoding("fp8", whole).compiled_rows(of_float16, COLUMNS, torch.float32) is None
    monkeypatch.setattr("hermes_async.quantization.block_scales.has_compiler", lambda: False)
    assert encoding.compiled_rows(parts, COLUMNS, torch.float32) is None
    encoding.prepare(torch.float32)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17])
def test_a_bfloat16_model_rounds_each_result_once(*, has_bias: bool, num_tokens: int) -> None:
    encoding, generator = Fp8Encoding(BlockSize(None, 32)), torch.Generator().manual_seed(1)
    weight = torch.randn(50, 64, generator=generator).to(torch.float8_e4m3fn)
    parts = {"weight": weight, "scale": torch.rand(1, 2, generator=generator)}
    specs = {part: spec(part, tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    parameter = EncodedParameter("w", (50, 64), torch.bfloat16, (StoredMatrix(encoding, (50, 64), specs),))
    stored = {f"w/0/{part}": tensor for part, tensor in parts.items()}
    made = EncodedWeight.of(parameter, stored.__getitem__, Bfloat16Products(scales_inputs=True))
    values = torch.empty(50, 64, dtype=torch.bfloat16)
    inputs = torch.randn(num_tokens, 64, generator=generator).to(torch.bfloat16)
    bias = torch.randn(50, generator=generator).to(torch.bfloat16) if has_bias else None
    with torch.inference_mode():
        encoding.dequantize(parts, 0, 50, values)
        exact = F.linear(inputs.double(), values.double(), None if bias is None else bias.double())
        found = F.linear(inputs, made, bias)
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all())
