"""AWQ's layouts: numbers are those of the format, and models give a plain model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.awq import AwqEncoding, AwqRowsEncoding
from tests.quantization.float_formats import SMALL, check_engine, save
from tests.quantization.integer_formats import (
    check,
    check_scratch,
    each_column,
    found_in,
    pack,
    some_numbers,
    some_scales,
)

I32, F16 = torch.int32, torch.float16
PARTS = {"packed": "qweight", "zero_point": "qzeros", "scale": "scales"}
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def interleaved(numbers: torch.Tensor) -> torch.Tensor:
    """The words of numbers [columns, rows]; from its lowest bits on, a word has the rows 0, 2, 4, 6, 1, 3, 5, 7."""
    eights = numbers.view(len(numbers), -1, 8)
    return pack(eights[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape), 4)


def gemm(rows: int, columns: int, size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a matrix, and what they stand for."""
    groups = columns // size
    numbers, zero, scale = some_numbers(4, rows, columns), some_numbers(4, rows, groups), some_scales(F16, rows, groups)
    tensors = {
        "qweight": interleaved(numbers.t().contiguous()),
        "qzeros": interleaved(zero.t().contiguous()),
        "scales": scale.t().contiguous(),
    }
    return tensors, (numbers - each_column(zero, columns)).float() * each_column(scale.float(), columns)


def gemv(rows: int, columns: int, size: int, padded_groups: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = columns // size
    numbers, zero, scale = some_numbers(4, rows, columns), some_numbers(4, rows, groups), some_scales(F16, rows, groups)
    padding = torch.zeros(rows, padded_groups - groups)
    tensors = {
        "qweight": pack(numbers, 4),
        "qzeros": pack(torch.cat([zero, padding.long()], 1), 4),
        "scales": torch.cat([scale, padding.half()], 1),
    }
    return tensors, (numbers - each_column(zero, columns)).float() * each_column(scale.float(), columns)


@pytest.mark.parametrize(("rows", "columns", "size"), [(136, 64, 32), (64, 128, 128), (8, 96, 96)])
def test_numbers(rows: int, columns: int, size: int) -> None:
    tensors, expected = gemm(rows, columns, size)
    parts = {part: tensors[name] for part, name in PARTS.items()}
    encoding = AwqEncoding(None if size == columns else size)
    check(encoding, parts, expected)
    check_scratch(encoding, parts)


@pytest.mark.parametrize(("columns", "size", "padded_groups"), [(64, 32, 32), (192, 64, 16), (1152, 128, 16)])
def test_numbers_along_rows(columns: int, size: int, padded_groups: int) -> None:
    tensors, expected = gemv(24, columns, size, padded_groups)
    check(AwqRowsEncoding(size), {part: tensors[name] for part, name in PARTS.items()}, expected)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "batching", "budget"),
    [
        (SETTINGS, "packed", None),
        ({**SETTINGS, "version": "gemv"}, "turns", None),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"},
            "packed",
            64 << 20,
        ),
    ],
    ids=["gemm", "gemv", "auto-round"],
)
async def test_a_model(tmp_path: Path, settings: dict[str, Any], batching: str, budget: int | None) -> None:
    def quantize(name: str, weight: torch.Tensor) -> Any:
        if "_proj" not in name:
            return None
        rows, columns = weight.shape
        tensors, values = gemv(rows, columns, 32, 32) if settings.get("version") == "gemv" else gemm(rows, columns, 32)
        return {name.removesuffix("weight") + leaf: tensor for leaf, tensor in tensors.items()}, values

    plain = save(tmp_path, LlamaConfig(**SMALL), settings, quantize)
    await check_engine(tmp_path, plain, batching, budget)


GOOD = {"m.qweight": (I32, (64, 4)), "m.qzeros": (I32, (2, 4)), "m.scales": (F16, (2, 32))}
BAD = [
    ({"m.qzeros": None}, {}, CorruptShardError, "zero_point is missing: 'm.qzeros'"),
    ({"m.scales": None}, {}, CorruptShardError, "scale is missing: 'm.scales'"),
    ({"m.scales": (F16, (2, 24))}, {}, CorruptShardError, "'m.scales' has shape"),
    ({"m.qzeros": (I32, (1, 4))}, {}, CorruptShardError, "'m.qzeros' has shape"),
    ({"m.qweight": (torch.int16, (64, 4))}, {}, CorruptShardError, "'m.qweight' is in int16"),
    ({"m.qweight": (I32, (64, 4, 1))}, {}, CorruptShardError, "'m.qweight' has shape"),
    ({}, {"group_size": 48}, CorruptShardError, "groups of 48 do not divide its 64 columns"),
    ({}, {"version": "gemv"}, CorruptShardError, "has shape"),
    ({}, {"bits": 8}, UnsupportedModelError, "have 8 bits"),
    ({}, {"version": "gemv_fast"}, UnsupportedModelError, "in the layout 'gemv_fast'"),
    ({}, {"backend": "llm-awq"}, UnsupportedModelError, "in the layout 'llm-awq'"),
]


@pytest.mark.parametrize(("changed", "settings", "error", "message"), BAD, ids=[str(idx) for idx in range(len(BAD))])
def test_bad_input(changed: Any, settings: Any, error: Any, message: str) -> None:
    tensors = [(name, *rest) for name, rest in {**GOOD, **changed}.items() if rest is not None]
    with pytest.raises(error, match=message) as caught:
        found_in("awq", {**SETTINGS, **settings}, tensors)
    assert type(caught.value) is error
    assert "folder" in str(caught.value)
