"""Compiled products of tiles: computed in float32, rounded once, for any numbers of rows, lines and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hermes_async.quantization import tile_products
from hermes_async.quantization.encoding import CompiledRows
from hermes_async.quantization.row_threads import RowThreads
from hermes_async.quantization.tile_products import MOST_LINES, TiledInputs, can_tile, tile_bytes

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 16), (2, 32), (50, 1040), (113, 3088), (200, 1024))
"""Rows and columns: fewer and more than are multiplied at once."""


@pytest.fixture(scope="module")
def threads() -> Iterator[RowThreads]:
    threads = RowThreads(3)
    yield threads
    threads.close()


def exact(lines: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(lines.double(), weight.double(), None if bias is None else bias.double())


def bound(lines: torch.Tensor, weight: torch.Tensor, results: torch.Tensor) -> torch.Tensor:
    """What one rounding to the dtype of the lines changes, and what a sum in float32 loses."""
    lost = F.linear(lines.double().abs(), weight.double().abs()) * weight.shape[1] * 2**-24
    return lost + results.abs() * (2**-8 if lines.dtype == torch.bfloat16 else 2**-24)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_lines", [2, 7, 8, 9, 33, MOST_LINES])
def test_products(
    threads: RowThreads, shape: tuple[int, int], num_lines: int, dtype: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(num_lines)
    lines = torch.randn(num_lines, shape[1], generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    found = torch.full((num_lines, shape[0]), torch.nan, dtype=dtype)
    TiledInputs(lines, threads).multiply(weight, bias, found)
    expected = exact(lines, weight, bias)
    assert bool(((found.double() - expected).abs() <= bound(lines, weight, expected)).all())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_rows_that_are_dequantized(threads: RowThreads, dtype: torch.dtype, with_bias: bool) -> None:
    columns = 9376  # of which a thread dequantizes a few rows at once
    generator = torch.Generator().manual_seed(1)
    weight, lines = torch.randn(90, columns, generator=generator), torch.randn(13, columns, generator=generator)
    lines = lines.to(dtype)
    bias = torch.randn(90, generator=generator).to(dtype) if with_bias else None
    values = weight.numpy()

    def write(first: int, last: int, out: np.ndarray) -> None:
        out[:] = values[first:last]

    def multiplier(*args: object) -> Callable[[int, int], None]:
        raise AssertionError("rows are multiplied with tiles")

    compiled = CompiledRows(write, multiplier, 4)
    found = TiledInputs(lines, threads).multiply_compiled(compiled, bias, 90)
    expected = exact(lines, weight, bias)
    assert (found.dtype, found.shape) == (dtype, (13, 90))
    assert bool(((found.double() - expected).abs() <= bound(lines, weight, expected)).all())


def test_results_begin_at_a_column(threads: RowThreads) -> None:
    lines, weight = torch.randn(5, 32), torch.randn(20, 32)
    bias, found = torch.randn(64), torch.full((5, 64), 7.0)
    TiledInputs(lines, threads).multiply(weight, bias, found, 30)
    torch.testing.assert_close(found[:, 30:50], F.linear(lines, weight, bias[30:50]))
    assert bool((found[:, :30] == 7).all())
    assert bool((found[:, 50:] == 7).all())


def test_results_are_rounded_to_the_even_one_of_two_as_near(threads: RowThreads) -> None:
    """As torch rounds. Each result is a number of float32: 1 plus multiples of 2**-9, and what is not finite."""
    wide = torch.cat([1 + torch.arange(-64, 64) * 2.0**-9, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])])
    high = wide.bfloat16()
    weight = torch.zeros(len(wide), 16, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 1] = high, torch.where(wide.isfinite(), wide - high.float(), 0.0).bfloat16()
    lines = torch.zeros(2, 16, dtype=torch.bfloat16)
    lines[:, :2] = 1.0
    found = torch.empty(2, len(wide), dtype=torch.bfloat16)
    TiledInputs(lines, threads).multiply(weight, None, found)
    torch.testing.assert_close(found, wide.bfloat16().expand(2, -1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((2, 4096), torch.bfloat16, True),
        ((MOST_LINES, 4096), torch.float32, True),
        ((MOST_LINES + 1, 4096), torch.bfloat16, False),
        ((1, 4096), torch.bfloat16, False),
        ((2, 4104), torch.bfloat16, False),
        ((2, 4096), torch.float16, False),
        ((MOST_LINES, 1 << 14), torch.bfloat16, False),
    ],
)
def test_what_can_be_tiled(shape: tuple[int, int], dtype: torch.dtype, expected: bool) -> None:
    assert can_tile(torch.zeros(shape, dtype=dtype)) is expected


def test_nothing_is_tiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_products, "has_compiler", lambda: False)
    assert not can_tile(torch.zeros(2, 4096))


@pytest.mark.parametrize("columns", [16, 4096, 1 << 15])
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    sizes = []
    empty = np.empty

    def counted(shape: object, dtype: type) -> np.ndarray:
        made = empty(shape, dtype)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(tile_products.np, "empty", counted)
    for num_lines in range(2, MOST_LINES + 1):
        lines = torch.zeros(num_lines, columns, dtype=torch.bfloat16)
        if can_tile(lines):
            TiledInputs(lines, RowThreads(1))
            assert sizes[-1] <= tile_bytes(num_lines, columns)
    bounds = [tile_bytes(num_lines, columns) for num_lines in range(1, 2 * MOST_LINES)]
    assert bounds == sorted(bounds)
