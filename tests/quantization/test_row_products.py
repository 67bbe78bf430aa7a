"""Products whose rows several threads dequantize and multiply are those of the whole matrix."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from hermes_async.quantization.gguf_blocks import GGUF_TYPES, GgufEncoding
from hermes_async.quantization.row_products import product_of_rows
from hermes_async.quantization.row_threads import ONE_THREAD, RowThreads
from tests.modeling.test_activations import allocated

COLUMNS = 4352  # more than are multiplied at once with a row


@pytest.fixture
def three() -> RowThreads:
    threads = RowThreads(3)
    yield threads
    threads.close()


@pytest.mark.parametrize("num_rows", [1, 47, 48, 300, 3000])
def test_every_row_is_computed_once(three: RowThreads, num_rows: int) -> None:
    times, used = np.zeros(num_rows, np.int64), set()

    def part(first: int, last: int) -> None:
        used.add(threading.get_ident())
        times[first:last] += 1
        time.sleep(0.001)

    three.divide(num_rows, part)
    assert (times == 1).all()
    assert len(used) <= 3
    assert threading.get_ident() in used
    assert len(used) > 1 or num_rows < 96


def test_no_rows_are_nothing_to_do(three: RowThreads) -> None:
    three.divide(0, lambda *_: pytest.fail("there are no rows"))


@pytest.mark.parametrize("caller_fails", [True, False])
def test_an_error_is_raised_when_all_have_ended(three: RowThreads, caller_fails: bool) -> None:
    others, began = threading.Barrier(3), time.monotonic()
    ended: list[int] = []

    def part(*_: int) -> None:
        others.wait(timeout=60)
        if (threading.current_thread() is threading.main_thread()) == caller_fails:
            raise ZeroDivisionError
        time.sleep(0.05)
        ended.append(threading.get_ident())

    with pytest.raises(ZeroDivisionError):
        three.divide(144, part)
    assert time.monotonic() - began >= 0.05
    assert len(ended) == (2 if caller_fails else 1)
    rows: list[int] = []
    three.divide(32, lambda first, last: rows.extend(range(first, last)))
    assert sorted(rows) == list(range(32))


def test_close_ends_the_threads() -> None:
    threads = RowThreads(4)
    threads.divide(1000, lambda *_: time.sleep(0.001))
    assert [one for one in threading.enumerate() if one.name.startswith("hermes rows")]
    threads.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("hermes rows")]
    threads.close()


@pytest.mark.parametrize("name", [name for name, block in GGUF_TYPES.items() if block.elements > 1])
@pytest.mark.parametrize("num_lines", [1, 3, 4, 20, 300])
def test_products_are_those_of_the_dequantized_matrix(three: RowThreads, name: str, num_lines: int) -> None:
    encoding, block, numbers = GgufEncoding(name), GGUF_TYPES[name], np.random.default_rng(0)
    lines = torch.from_numpy(numbers.standard_normal((num_lines, COLUMNS), np.float32))
    for num_rows in (1, 50, 130):
        data = numbers.integers(0, 50, (num_rows, COLUMNS // block.elements * block.nbytes), np.uint8)
        parts, values = {"weight": torch.from_numpy(data)}, torch.empty(num_rows, COLUMNS)
        encoding.dequantize(parts, 0, num_rows, values)
        expected = lines.double() @ values.double().T
        tolerance = 1e-5 * (lines.double().abs() @ values.double().abs().T)
        compiled = encoding.compiled_rows(parts, COLUMNS, torch.float32)
        assert compiled is not None
        for threads, block_rows in ((three, 64), (three, 1), (ONE_THREAD, 1000)):
            product = product_of_rows(compiled, num_rows, lines, None, block_rows=block_rows, threads=threads)
            assert product.dtype == torch.float32
            assert ((product.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("num_lines", [2, 20])
def test_lines_need_not_be_contiguous(num_lines: int) -> None:
    encoding = GgufEncoding("Q8_0")
    parts = {"weight": torch.randint(0, 50, (40, COLUMNS // 32 * 34), dtype=torch.uint8)}
    compiled, lines = encoding.compiled_rows(parts, COLUMNS, torch.float32), torch.randn(COLUMNS, num_lines).T
    assert compiled is not None
    expected = product_of_rows(compiled, 40, lines.contiguous(), None, block_rows=64, threads=ONE_THREAD)
    assert torch.equal(product_of_rows(compiled, 40, lines, None, block_rows=64, threads=ONE_THREAD), expected)


@pytest.mark.parametrize("num_lines", [1, 300])
def test_memory_is_that_of_a_block_and_of_the_results(three: RowThreads, num_lines: int) -> None:
    encoding = GgufEncoding("Q8_0")
    parts = {"weight": torch.zeros((200, COLUMNS // 32 * 34), dtype=torch.uint8)}
    compiled, lines = encoding.compiled_rows(parts, COLUMNS, torch.float32), torch.randn(num_lines, COLUMNS)
    assert compiled is not None
    taken = allocated(lambda: product_of_rows(compiled, 200, lines, None, block_rows=20, threads=three))
    assert taken.most_bytes <= 4 * (20 * COLUMNS + 2 * num_lines * 200)


def test_matrices_of_plain_numbers_have_no_compiled_functions() -> None:
    assert GgufEncoding("F16").compiled_rows({"weight": torch.zeros(4, 8, dtype=torch.uint8)}, 4, torch.float32) is None
