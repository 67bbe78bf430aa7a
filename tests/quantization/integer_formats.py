"""What tests of packed whole numbers share: how they are packed, one by one, and that rows are dequantized right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hermes_async.quantization.encoding import Encoding
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.tensor_spec import TensorSpec
from tests.modeling.test_activations import allocated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS_OF_MUCH, COLUMNS_OF_MUCH = 128, 8192


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] of numbers [rows, columns] from 0 on: each row is one long number, the first lowest."""
    words = -(-numbers.shape[1] * bits // 32)
    rows = [sum(number << bits * idx for idx, number in enumerate(row)) for row in numbers.tolist()]
    octets = b"".join(row.to_bytes(4 * words, "little") for row in rows)
    return torch.frombuffer(bytearray(octets), dtype=torch.int32).view(len(rows), words)


def some_numbers(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape)


def some_scales(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.rand(shape) * 0.02 + 0.01).to(dtype)


def each_column(values: torch.Tensor, columns: int) -> torch.Tensor:
    """Of groups [rows, groups], the value of each column."""
    return values.repeat_interleave(columns // values.shape[1], 1)


def check(encoding: Encoding, parts: Mapping[str, torch.Tensor], expected: torch.Tensor, *, exact: bool = True) -> None:
    """All rows, and some of them, are as expected in each dtype."""
    rows, columns = expected.shape
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == dict(encoding.shapes(rows, columns))
    step = encoding.row_step
    middle = max(1, rows // 2 // step) * step
    for dtype in DTYPES if exact else DTYPES[1:]:
        for start, stop in {(0, rows), (0, min(middle, rows)), (min(middle, rows // step * step), rows)}:
            if start < stop:
                out = torch.full((stop - start, columns), torch.nan, dtype=dtype)
                with torch.inference_mode():
                    encoding.dequantize(parts, start, stop, out)
                torch.testing.assert_close(out, expected[start:stop].to(dtype), rtol=0, atol=0)


def check_scratch(encoding: Encoding, parts: Mapping[str, torch.Tensor]) -> None:
    """What many rows take is what the encoding says, or less; their values mean nothing.

    Args:
        parts: Some of each part, for its dtype.
    """
    rows, columns = ROWS_OF_MUCH, COLUMNS_OF_MUCH
    many = {part: torch.ones(shape, dtype=parts[part].dtype) for part, shape in encoding.shapes(rows, columns).items()}
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty((rows, columns), dtype=dtype)
        taken = allocated(lambda out=out: encoding.dequantize(many, 0, rows, out))  # type: ignore[misc]
        assert taken.most_bytes <= encoding.scratch_bytes(rows, columns, dtype.itemsize)


def found_in(method: str, settings: Mapping[str, Any], tensors: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """The matrices of a checkpoint that has these tensors: name, dtype and shape of each."""
    specs = {name: TensorSpec(name, Path("folder/m.safetensors"), 0, 0, *rest) for name, *rest in tensors}
    return quantized_matrices(Path("folder"), method, settings, specs)
