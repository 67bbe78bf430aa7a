"""Single rows of a matrix that stays on disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hermes_async.errors import ShortReadError
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.rows import ROWS_AT_ONCE, RowReader
from hermes_async.storage.tensor_spec import TensorSpec

pytestmark = pytest.mark.anyio


def matrix(
    directory: Path, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, TensorSpec]:
    tensor = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).to(dtype)
    path = directory / "rows.safetensors"
    save_file({"before": torch.zeros(13, dtype=torch.uint8), "weight": tensor}, path)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(header_bytes))["weight"]["data_offsets"]
    return tensor, TensorSpec("weight", path, 8 + header_bytes + begin, end - begin, dtype, (rows, columns))


async def read_rows(spec: TensorSpec, rows: list[int], max_rows: int, statistics: ReadStatistics | None = None) -> Any:
    with ThreadPoolExecutor(1) as executor:
        async with (
            Reader([spec.file], executor, statistics or ReadStatistics()) as reader,
            RowReader([spec], reader, max_rows) as row_reader,
        ):
            (views,) = await row_reader.read([rows])
            copied = [view.clone() for view in views]
    return copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[0], [99], [3, 4, 5], [0, 50, 99], list(range(100))])
async def test_rows_are_those_asked_for(tmp_path: Path, dtype: torch.dtype, rows: list[int]) -> None:
    tensor, spec = matrix(tmp_path, 100, 33, dtype)
    views = await read_rows(spec, rows, len(rows))
    assert [view.dtype for view in views] == [dtype] * len(rows)
    assert torch.equal(torch.stack(views), tensor[rows])


async def test_neighbours_are_read_together_and_far_ones_apart(tmp_path: Path) -> None:
    tensor, spec = matrix(tmp_path, 1000, 64)  # 256 bytes a row
    statistics = ReadStatistics()
    rows = [0, 1, 3, 900, 901]
    assert torch.equal(torch.stack(await read_rows(spec, rows, 5, statistics)), tensor[rows])
    assert (statistics.num_reads, statistics.bytes_read) == (2, 4 * 256 + 2 * 256)


async def test_the_next_call_overwrites_the_views(tmp_path: Path) -> None:
    tensor, spec = matrix(tmp_path, 10, 8)
    with ThreadPoolExecutor(1) as executor:
        async with (
            Reader([spec.file], executor, ReadStatistics()) as reader,
            RowReader([spec], reader, 1) as row_reader,
        ):
            for row in (0, 9, 4):
                assert torch.equal((await row_reader.read([[row]]))[0][0], tensor[row])


async def test_more_rows_than_usual_take_a_larger_buffer_until_the_next_call(tmp_path: Path) -> None:
    tensor, spec = matrix(tmp_path, 100, 1100)
    with ThreadPoolExecutor(1) as executor:
        async with (
            Reader([spec.file], executor, ReadStatistics()) as reader,
            RowReader([spec], reader, 5) as row_reader,
        ):
            for rows in ([3], list(range(0, 100, 7)), [99], list(range(100)), [1, 50]):
                assert torch.equal(torch.stack(*await row_reader.read([rows])), tensor[rows])
                assert row_reader._buffer.nbytes == RowReader.buffer_bytes(spec, max(5, len(rows)))


async def test_other_reads_are_held_back_while_rows_would_wait_for_them(tmp_path: Path) -> None:
    """Of as many rows as there are threads, none waits for a read that began after it."""
    tensor, spec = matrix(tmp_path, 100, 4096)
    told: list[str] = []

    @contextmanager
    def held_back() -> Iterator[None]:
        told.append("held back")
        try:
            yield
        finally:
            told.append("let go")

    with ThreadPoolExecutor(ROWS_AT_ONCE) as executor:
        async with (
            Reader([spec.file], executor, ReadStatistics()) as reader,
            RowReader([spec], reader, 100, held_back) as row_reader,
        ):
            few, many = list(range(0, 10 * ROWS_AT_ONCE, 10)), list(range(0, 100, 10))
            assert torch.equal(torch.stack(*await row_reader.read([few])), tensor[few])
            assert told == []
            assert torch.equal(torch.stack(*await row_reader.read([many])), tensor[many])
            assert told == ["held back", "let go"]
            with spec.file.open("r+b") as file:
                file.truncate(spec.offset)
            with pytest.raises(ShortReadError):
                await row_reader.read([many])
            assert told == ["held back", "let go"] * 2


async def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    _, spec = matrix(tmp_path, 10, 8)
    with spec.file.open("r+b") as file:
        file.truncate(spec.offset + 8 * 4)
    with pytest.raises(ShortReadError):
        await read_rows(spec, [0, 9], 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.sampled_from([1, 5, 64, 1023, 1500]), st.data())
def test_the_buffer_is_large_enough_for_any_rows(num_rows: int, columns: int, data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, num_rows - 1), min_size=1, max_size=40)))
    with tempfile.TemporaryDirectory() as directory:
        tensor, spec = matrix(Path(directory), num_rows, columns)
        views = anyio.run(read_rows, spec, rows, len(rows))
        assert torch.equal(torch.stack(views), tensor[rows])
