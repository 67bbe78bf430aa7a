"""Page-aligned memory, views of it, and the ring that hands it out in order."""

from __future__ import annotations

import errno
import mmap
from itertools import pairwise
from pathlib import Path

import anyio
import pytest
import torch

from hermes_async.storage.buffers import ALIGNMENT, Buffer, BufferLock, BufferPool, align_down, align_up
from hermes_async.storage.locked_pages import can_lock, has_locked_pages, lock_limit

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("number", "up", "down"), [(0, 0, 0), (1, 4096, 0), (4096, 4096, 4096), (4097, 8192, 4096)])
def test_alignment(number: int, up: int, down: int) -> None:
    assert (align_up(number), align_down(number)) == (up, down)


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 3 * 2**20 + 1])
def test_a_buffer_is_whole_pages_at_a_page(nbytes: int) -> None:
    buffer = Buffer(nbytes)
    assert buffer.nbytes == len(buffer.view) == align_up(nbytes)
    assert buffer.tensor(0, torch.uint8, (1,)).data_ptr() % ALIGNMENT == 0
    assert not buffer.view.readonly


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux")
def test_a_large_buffer_begins_at_a_huge_page_and_takes_no_more_memory_than_it_has() -> None:
    buffer = Buffer(5 * 2**20 + 4096)
    start, end = _mapped_addresses(buffer)
    assert buffer.tensor(0, torch.uint8, (1,)).data_ptr() % 2**21 == 0
    buffer.tensor(0, torch.uint8, (buffer.nbytes,)).fill_(1)
    assert _resident_bytes(start, end) == buffer.nbytes
    buffer.close()
    assert _resident_bytes(start, end) == 0


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux")
def test_buffers_side_by_side_take_no_more_memory_than_they_have_and_give_it_back_one_by_one() -> None:
    nbytes = 3 * 2**20 + 4096
    buffers = Buffer.side_by_side([nbytes] * 3)
    start, end = _mapped_addresses(buffers[0])
    for idx, buffer in enumerate(buffers):
        buffer.tensor(0, torch.uint8, (nbytes,)).fill_(idx + 1)
    assert _resident_bytes(start, end) == 3 * nbytes
    buffers[1].close()
    assert _resident_bytes(start, end) == 2 * nbytes
    assert [set(bytes(buffer.view)) for buffer in buffers] == [{1}, {0}, {3}]


@pytest.mark.parametrize("sizes", [[], [1], [5000] * 3, [3 * 2**20] * 2, [3 * 2**20, 100, 8192]])
def test_buffers_side_by_side_do_not_overlap(sizes: list[int]) -> None:
    buffers = Buffer.side_by_side(sizes)
    assert [buffer.nbytes for buffer in buffers] == [align_up(size) for size in sizes]
    starts = [buffer.tensor(0, torch.uint8, (1,)).data_ptr() for buffer in buffers]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert [second - first for first, second in pairwise(starts)] == [align_up(size) for size in sizes[:-1]]


def _mapped_addresses(buffer: Buffer) -> tuple[int, int]:
    """Of all the memory that it is a part of."""
    mapped = torch.frombuffer(buffer._within[0]._map, dtype=torch.uint8)
    return mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes


def _resident_bytes(start: int, end: int) -> int:
    """Of this process's pages, by the kernel's page map: a bit says that one is in memory."""
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(start // mmap.PAGESIZE * 8)
        entries = file.read((end - start) // mmap.PAGESIZE * 8)
    return sum(entries[idx] >> 7 for idx in range(7, len(entries), 8)) * mmap.PAGESIZE


def test_a_tensor_is_a_view_and_no_copy() -> None:
    buffer = Buffer(8192)
    tensor = buffer.tensor(4096 - 8, torch.float32, (2, 3))
    tensor.copy_(torch.arange(6).view(2, 3))
    assert bytes(buffer.view[4088 : 4088 + 24]) == torch.arange(6, dtype=torch.float32).numpy().tobytes()
    assert tensor.data_ptr() == buffer.tensor(0, torch.uint8, (1,)).data_ptr() + 4088
    buffer.view[4088:4092] = torch.tensor([7.0]).numpy().tobytes()
    assert tensor[0, 0] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = Buffer(100).tensor(16, dtype, (3,))
    assert (tensor.dtype, tensor.shape) == (dtype, (3,))


def test_scalars_and_tensors_without_elements() -> None:
    buffer = Buffer(4096)
    assert buffer.tensor(8, torch.float32, ()).shape == ()
    assert buffer.tensor(4096, torch.float32, (0, 5)).shape == (0, 5)


def test_a_tensor_past_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer"):
        Buffer(4096).tensor(4090, torch.float32, (2,))


def test_a_view_outlives_its_buffer() -> None:
    tensor = Buffer(4096).tensor(0, torch.int64, (512,))
    tensor.fill_(5)
    assert tensor.sum() == 5 * 512


def test_close_gives_the_pages_back_under_a_living_view() -> None:
    buffer = Buffer(2 * 4096)
    tensor = buffer.tensor(0, torch.uint8, (8192,))
    tensor.fill_(1)
    buffer.close()
    assert tensor.sum() == 0  # the memory is private and anonymous: what was given back reads as zeros
    buffer.close()


def test_the_pool_gives_every_buffer_once() -> None:
    pool = BufferPool(3, 5000)
    buffers = [pool.acquire_nowait() for _ in range(3)]
    assert len({id(buffer) for buffer in buffers}) == 3
    assert all(buffer.nbytes == 8192 for buffer in buffers)
    statistics = pool.statistics()
    assert (statistics.num_buffers, statistics.num_free) == (3, 0)
    with pytest.raises(anyio.WouldBlock):
        pool.acquire_nowait()
    for buffer in buffers:
        pool.release(buffer)
    assert pool.statistics().num_free == 3


async def test_one_buffer_too_many_is_refused() -> None:
    pool = BufferPool(1, 4096)
    with pytest.raises(ValueError, match="released"):
        pool.release(Buffer(4096))


async def test_close_frees_what_is_there() -> None:
    pool = BufferPool(2, 4096)
    out = pool.acquire_nowait()
    out.view[0] = 1
    pool.close()
    assert pool.statistics().num_free == 0
    assert out.view[0] == 1


@pytest.mark.skipif(not has_locked_pages(), reason="needs Linux")
def test_a_locked_buffer_takes_no_memory_before_its_first_use_and_gives_it_back() -> None:
    nbytes, before = 3 * 2**20, _locked_bytes()
    first, second = Buffer.side_by_side([nbytes] * 2)
    start, end = _mapped_addresses(first)
    for _ in range(2):
        first.lock()
    assert _locked_bytes() == before + nbytes
    assert _resident_bytes(start, end) == 0
    for buffer in (first, second):
        buffer.tensor(0, torch.uint8, (nbytes,)).fill_(1)
    first.close()
    assert _locked_bytes() == before
    assert _resident_bytes(start, end) == nbytes
    second.lock()
    second.unlock()
    assert (_locked_bytes(), set(bytes(second.view))) == (before, {1})


@pytest.mark.skipif(not has_locked_pages(), reason="needs Linux")
def test_a_lock_holds_all_buffers_or_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before, lock = _locked_bytes(), BufferLock(is_on=True)
    kept = Buffer.side_by_side([4096] * 3)
    lock.add(kept)
    lock.add([Buffer(4096)])  # nobody keeps it
    assert (lock.is_on, _locked_bytes()) == (True, before + 3 * 4096)

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("hermes_async.storage.buffers.lock_pages", refuse)
    lock.add([Buffer(4096)])
    assert (lock.is_on, _locked_bytes()) == (False, before)
    assert "no longer locked" in caplog.text
    monkeypatch.undo()
    lock.add(kept)
    assert _locked_bytes() == before


@pytest.mark.skipif(not has_locked_pages(), reason="needs Linux")
def test_a_question_of_what_can_be_locked_leaves_nothing_locked() -> None:
    before = _locked_bytes()
    assert can_lock(4096)
    assert not can_lock(1 << 62)
    assert _locked_bytes() == before == lock_limit().locked


def _locked_bytes() -> int:
    """The kernel's count of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmLck:"))
