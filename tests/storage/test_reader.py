"""Ranges of files into buffers: where they lie, what goes wrong, and no thread left writing behind a cancelled call."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from hermes_async.errors import ReadError, ReadTimeoutError, ShortReadError
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_up
from hermes_async.storage.file_state import FileState
from hermes_async.storage.read_watch import ReadWatch
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.shard import ReadRange
from hermes_async.storage.threads import DaemonExecutor
from tests.disks import Disk, Read
from tests.engines import both_loops, until

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()

SIZE = 3 * ALIGNMENT + 1234
DATA = random.Random(0).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other"
    path.write_bytes(DATA[::-1])
    return path


class Reading:
    """A reader with its statistics, and where ranges are put."""

    def __init__(self, files: Sequence[Path], executor: ThreadPoolExecutor, *, direct: bool) -> None:
        self.statistics = ReadStatistics()
        self.reader = Reader(files, executor, self.statistics, direct=direct)
        self.buffer = Buffer(16 * ALIGNMENT)

    async def read(self, *spans: tuple[Path, int, int]) -> list[bytes]:
        ranges = place(spans)
        await self.reader.read(ranges, self.buffer.view)
        return [bytes(self.buffer.view[item.position : item.position + item.nbytes]) for item in ranges]


def place(spans: Sequence[tuple[Path, int, int]]) -> list[ReadRange]:
    ranges, end = [], 0
    for path, offset, nbytes in spans:
        position = end + offset % ALIGNMENT
        ranges.append(ReadRange(path, offset, nbytes, position))
        end = align_up(position + nbytes)
    return ranges


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
async def reading(request: pytest.FixtureRequest, disk: Disk, file: Path, other: Path) -> AsyncIterator[Reading]:
    with ThreadPoolExecutor(2, "test-reader") as executor:
        reading = Reading([file, other], executor, direct=request.param)
        async with reading.reader:
            yield reading
        assert disk.num_open == 0


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, SIZE), (0, 1), (0, ALIGNMENT), (1, 1), (ALIGNMENT - 1, 2), (5, ALIGNMENT), (ALIGNMENT, ALIGNMENT),
        (77, SIZE - 77), (SIZE - 1, 1), (3 * ALIGNMENT, 1234), (3 * ALIGNMENT + 1000, 234), (100, 0),
    ],
)  # fmt: skip
async def test_any_range(reading: Reading, file: Path, offset: int, nbytes: int) -> None:
    assert await reading.read((file, offset, nbytes)) == [DATA[offset : offset + nbytes]]
    assert (reading.statistics.bytes_read, reading.statistics.num_reads) == (nbytes, 1)
    assert reading.statistics.seconds > 0


async def test_many_ranges_of_many_files_in_any_order(reading: Reading, file: Path, other: Path) -> None:
    spans = [(file, 5000, 100), (other, 3, 4096), (file, 0, 10), (file, 5000, 5000), (other, SIZE - 5, 5)]
    contents = {file: DATA, other: DATA[::-1]}
    assert await reading.read(*spans) == [contents[path][start : start + length] for path, start, length in spans]
    assert reading.statistics.num_reads == 5


async def test_each_file_is_opened_once(reading: Reading, disk: Disk, file: Path) -> None:
    for _ in range(3):
        await reading.read((file, 0, 100), (file, 9000, 100))
    assert len(disk.opened_directly) == 2  # and the other one


async def test_several_calls_at_once(reading: Reading, disk: Disk, file: Path, other: Path) -> None:
    both = threading.Barrier(2)

    def together(path: Path, offset: int, read: Read) -> int:
        both.wait(30)
        return read()

    disk.on_read = together
    buffers = [Buffer(16 * ALIGNMENT) for _ in range(2)]
    async with anyio.create_task_group() as group:
        for buffer, offset in zip(buffers, (77, 5000), strict=True):
            group.start_soon(reading.reader.read, place([(file, offset, 1000)]), buffer.view)
    assert [bytes(buffer.view[offset % 4096 :][:1000]) for buffer, offset in zip(buffers, (77, 5000), strict=True)] == [
        DATA[77:1077],
        DATA[5000:6000],
    ]


async def test_direct_reads_are_direct_and_the_others_are_not(disk: Disk, file: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        for direct in (True, False):
            reading = Reading([file], executor, direct=direct)
            async with reading.reader:
                await reading.read((file, 0, 100))
    assert disk.opened_directly == [hasattr(os, "O_DIRECT"), False]


@pytest.mark.parametrize("most", [ALIGNMENT, ALIGNMENT + 100, 2 * ALIGNMENT + 1])
async def test_short_reads_go_on(reading: Reading, disk: Disk, file: Path, most: int) -> None:
    if any(disk.opened_directly):
        most -= most % ALIGNMENT
    disk.on_read = lambda path, offset, read: read(most)
    assert await reading.read((file, 77, SIZE - 77)) == [DATA[77:]]


@pytest.mark.parametrize(
    ("length", "offset", "nbytes", "actual"),
    [
        (SIZE - 1, 0, SIZE, SIZE - 1), (SIZE - 1, SIZE - 1, 1, 0), (5000, 4999, 100, 1), (5000, 5000, 100, 0),
        (5000, 6000, 100, 0), (4096, 4000, 200, 96), (4096, 5000, 100, 0), (0, 0, 10, 0), (8192, 100, SIZE - 100, 8092),
    ],
)  # fmt: skip
async def test_a_file_that_ends_early(
    reading: Reading, file: Path, length: int, offset: int, nbytes: int, actual: int
) -> None:
    with file.open("r+b") as shard:
        shard.truncate(length)
    with pytest.raises(ShortReadError) as caught:
        await reading.read((file, offset, nbytes))
    error = caught.value
    assert (error.path, error.offset, error.expected, error.actual) == (file, offset, nbytes, actual)
    assert all(str(number) in str(error) for number in (file, offset, nbytes, actual))
    file.write_bytes(DATA)  # noqa: ASYNC240
    assert await reading.read((file, offset, nbytes)) == [DATA[offset : offset + nbytes]]


# Nothing beside a range is written


SCRATCH_AT = 10 * ALIGNMENT
SPANS = [(0, SIZE), (0, 1), (ALIGNMENT - 1, 2), (5, ALIGNMENT), (ALIGNMENT, ALIGNMENT), (77, SIZE - 77), (100, 0)]


async def read_alone(
    reading: Reading, file: Path, offset: int, nbytes: int, position: int, scratch_blocks: int
) -> None:
    """Reads a range with scratch memory, and looks at all of the buffer."""
    view = reading.buffer.view
    view[:] = before = b"\xa5" * len(view)
    scratch_end = SCRATCH_AT + scratch_blocks * ALIGNMENT
    await reading.reader.read([ReadRange(file, offset, nbytes, position, (SCRATCH_AT, scratch_end))], view)
    assert bytes(view[position : position + nbytes]) == DATA[offset : offset + nbytes]
    assert bytes(view[:position]) == before[:position]
    assert bytes(view[position + nbytes : SCRATCH_AT]) == before[position + nbytes : SCRATCH_AT]
    assert bytes(view[scratch_end:]) == before[scratch_end:]


@pytest.mark.parametrize("scratch_blocks", [2, 3])
@pytest.mark.parametrize("position", [0, 5, 77, ALIGNMENT - 1, ALIGNMENT + 5])
@pytest.mark.parametrize(("offset", "nbytes"), SPANS)
async def test_with_scratch_memory_nothing_else_is_written(
    reading: Reading, file: Path, offset: int, nbytes: int, position: int, scratch_blocks: int
) -> None:
    await read_alone(reading, file, offset, nbytes, position, scratch_blocks)


@pytest.mark.parametrize("most", [ALIGNMENT, 2 * ALIGNMENT])
@pytest.mark.parametrize("position", [77, 78])
async def test_with_scratch_memory_short_reads_go_on(
    reading: Reading, disk: Disk, file: Path, position: int, most: int
) -> None:
    disk.on_read = lambda path, offset, read: read(most)
    await read_alone(reading, file, 77, SIZE - 77, position, 2)


@pytest.mark.parametrize(("length", "actual"), [(ALIGNMENT, ALIGNMENT - 77), (SIZE - 1, SIZE - 78), (50, 0)])
@pytest.mark.parametrize("position", [77, 78])
async def test_with_scratch_memory_a_file_that_ends_early(
    reading: Reading, file: Path, position: int, length: int, actual: int
) -> None:
    with file.open("r+b") as shard:
        shard.truncate(length)
    with pytest.raises(ShortReadError) as caught:
        await read_alone(reading, file, 77, SIZE - 77, position, 2)
    assert (caught.value.offset, caught.value.expected, caught.value.actual) == (77, SIZE - 77, actual)


async def test_a_missing_file(disk: Disk, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    with ThreadPoolExecutor(1) as executor, pytest.raises(ReadError, match="No such file") as caught:
        async with Reader([file, path], executor, ReadStatistics()):
            pytest.fail("entered")
    assert (caught.value.path, caught.value.offset, caught.value.errno) == (path, 0, errno.ENOENT)
    assert (len(disk.opened_directly), disk.num_open) == (1, 0)


async def test_a_file_removed_after_it_was_opened(reading: Reading, file: Path) -> None:
    file.unlink()  # noqa: ASYNC240
    assert await reading.read((file, 77, 1000)) == [DATA[77:1077]]


async def test_an_io_error_has_path_and_offset_and_the_next_read_works(
    reading: Reading, disk: Disk, file: Path
) -> None:
    await reading.read((file, 0, 10))

    def fail(path: Path, offset: int, read: Read) -> int:
        raise OSError(errno.EIO, "Input/output error")

    disk.on_read = fail
    with pytest.raises(ReadError, match="Input/output error") as caught:
        await reading.read((file, 5001, 10))
    assert not isinstance(caught.value, ShortReadError)
    assert (caught.value.path, caught.value.offset, caught.value.errno) == (file, 5001, errno.EIO)
    assert isinstance(caught.value.__cause__, OSError)
    disk.on_read = lambda path, offset, read: read()
    assert await reading.read((file, 5001, 10)) == [DATA[5001:5011]]
    assert reading.statistics.num_reads == 2


@pytest.mark.parametrize("removed", [False, True])
async def test_where_direct_reads_are_refused_they_are_buffered(
    reading: Reading, disk: Disk, file: Path, removed: bool
) -> None:
    num_refused = 0

    def refuse(path: Path, offset: int, read: Read) -> int:
        nonlocal num_refused
        if read.direct:
            num_refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return read()

    disk.on_read = refuse
    if removed:
        file.unlink()  # noqa: ASYNC240
    for _ in range(2):
        assert await reading.read((file, 77, 9000), (file, 5, 10)) == [DATA[77:9077], DATA[5:15]]
    assert num_refused == disk.opened_directly[0]


async def test_a_buffered_read_that_is_refused_is_an_error(reading: Reading, disk: Disk, file: Path) -> None:
    def refuse(path: Path, offset: int, read: Read) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    disk.on_read = refuse
    for _ in range(2):
        with pytest.raises(ReadError) as caught:
            await reading.read((file, 0, 10))
        assert caught.value.errno == errno.EINVAL


async def test_direct_opening_refused(disk: Disk, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr("hermes_async.storage.shard.os.open", refuse)
    with ThreadPoolExecutor(1) as executor:
        reading = Reading([file], executor, direct=True)
        async with reading.reader:
            assert await reading.read((file, 77, 9000)) == [DATA[77:9077]]
    assert disk.opened_directly == [False]


async def test_a_cancelled_call_returns_when_its_thread_has_written(reading: Reading, disk: Disk, file: Path) -> None:
    entered, may_pass, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(path: Path, offset: int, read: Read) -> int:
        entered.set()
        assert may_pass.wait(30)
        count = read()
        if offset:
            ended.set()
        return count

    disk.on_read = slow
    returned = []

    async def read() -> None:
        with scope:
            await reading.read((file, 77, 1000), (file, 5000, 1000))
        returned.append(ended.is_set())

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        assert await anyio.to_thread.run_sync(entered.wait, 30)
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert returned == []  # the thread is still at it
        may_pass.set()
    assert returned == [True]
    assert scope.cancelled_caught
    disk.on_read = lambda path, offset, read: read()
    assert await reading.read((file, 5000, 1000)) == [DATA[5000:6000]]


async def test_leaving_closes_files_even_when_cancelled(disk: Disk, file: Path) -> None:
    with ThreadPoolExecutor(1) as executor, anyio.CancelScope() as scope:
        reading = Reading([file], executor, direct=True)
        async with reading.reader:
            await reading.read((file, 0, 10))
            scope.cancel()
    assert disk.num_open == 0


async def test_many_at_once(reading: Reading, disk: Disk, file: Path) -> None:
    both = threading.Barrier(2)

    def together(path: Path, offset: int, read: Read) -> int:
        both.wait(30)
        return read()

    disk.on_read = together
    ranges = place([(file, offset, 100) for offset in (7, 4000, 5000, 9000)])
    await reading.reader.read_many(ranges, reading.buffer.view, at_once=2)
    for item in ranges:
        assert bytes(reading.buffer.view[item.position :][:100]) == DATA[item.offset :][:100]
    assert (reading.statistics.num_reads, reading.statistics.bytes_read) == (4, 400)


async def test_one_of_many_fails_and_no_other_is_left_writing(reading: Reading, disk: Disk, file: Path) -> None:
    failed, ended = threading.Event(), threading.Event()

    def fail(path: Path, offset: int, read: Read) -> int:
        if offset == 0:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        assert failed.wait(30)
        count = read()
        ended.set()
        return count

    disk.on_read = fail
    with pytest.raises(ReadError, match="Input/output error"):
        await reading.reader.read_many(place([(file, 0, 100), (file, 5000, 100)]), reading.buffer.view, at_once=2)
    assert ended.is_set()


# More shards than open files are allowed


async def read_each_twice(reader: Reader, files: Sequence[Path]) -> None:
    buffer = Buffer(ALIGNMENT * 16)
    for idx, path in enumerate([*files, *files]):
        await reader.read([ReadRange(path, 0, 100, 0)], buffer.view)
        assert bytes(buffer.view[:100]) == bytes([idx % len(files)] * 100)
    places = place([(path, 0, 10) for path in files[:10]])
    await reader.read(places, buffer.view)
    assert [buffer.view[item.position] for item in places] == list(range(10))
    buffer.close()


@pytest.fixture
def many_files(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{idx:02}" for idx in range(40)]
    for idx, path in enumerate(files):
        path.write_bytes(bytes([idx] * 1000))
    return files


async def test_of_many_shards_only_some_are_open_at_once(
    disk: Disk, many_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_async.storage.reader.resource.getrlimit", lambda which: (32, 32))
    most = 0

    def on_read(path: Path, offset: int, read: Any) -> int:
        nonlocal most
        most = max(most, disk.num_open)
        return int(read())

    disk.on_read = on_read
    with ThreadPoolExecutor(2) as executor:
        async with Reader(many_files, executor, ReadStatistics()) as reader:
            assert disk.num_open == 8
            await read_each_twice(reader, many_files)
    assert most == 10  # of one read that needs as many
    assert disk.num_open == 0


async def test_a_process_that_has_too_many_files_open(disk: Disk, many_files: list[Path]) -> None:
    def on_open(path: Path) -> None:
        if disk.num_open >= 12:
            raise OSError(errno.EMFILE, "Too many open files")

    disk.on_open = on_open
    with ThreadPoolExecutor(2) as executor:
        async with Reader(many_files, executor, ReadStatistics()) as reader:
            await read_each_twice(reader, many_files)
    assert disk.num_open == 0


async def test_a_process_that_can_open_none(disk: Disk, many_files: list[Path]) -> None:
    def on_open(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    disk.on_open = on_open
    with ThreadPoolExecutor(1) as executor, pytest.raises(ReadError, match="Too many open files"):
        async with Reader(many_files, executor, ReadStatistics()):
            pytest.fail("entered")


async def test_a_shard_changed_while_it_was_closed(
    disk: Disk, many_files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hermes_async.storage.reader.resource.getrlimit", lambda which: (4, 4))
    states = {path: FileState.of(path.stat()) for path in many_files}
    with ThreadPoolExecutor(1) as executor:
        async with Reader(many_files, executor, ReadStatistics(), states=states) as reader:
            buffer = Buffer(ALIGNMENT)
            await reader.read([ReadRange(many_files[1], 0, 100, 0)], buffer.view)
            (tmp_path / "new").write_bytes(bytes(1000))
            (tmp_path / "new").replace(many_files[0])
            with pytest.raises(ReadError, match="another file is there now"):
                await reader.read([ReadRange(many_files[0], 0, 100, 0)], buffer.view)
            buffer.close()
    assert disk.num_open == 0


# --- closes that hang, as on a network file system whose server is gone ---


@pytest.fixture
def closes(disk: Disk) -> Iterator[threading.Event]:
    """Closes hang until it is set."""
    let_go = threading.Event()

    def on_close(path: Path) -> None:
        if not let_go.wait(60):
            raise TimeoutError("the test did not let the close go")

    disk.on_close = on_close
    yield let_go
    let_go.set()


async def test_leaving_gives_up_a_close_that_hangs(disk: Disk, many_files: list[Path], closes: threading.Event) -> None:
    """The thread closes the other shards, too, when it comes back."""
    executor = DaemonExecutor(2, "test-reader")
    async with Reader(many_files, executor, ReadStatistics()) as reader:
        pass
    executor.shutdown()
    assert disk.num_open == len(many_files)
    assert [place.doing for read in reader.watch.under_way if (place := read.place) is not None] == ["closing the file"]
    closes.set()
    await until(lambda: disk.num_open == 0 and not reader.watch.under_way)


async def test_a_close_that_hangs_is_overdue(
    disk: Disk, many_files: list[Path], closes: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_async.storage.reader.resource.getrlimit", lambda which: (4, 4))
    executor, watch, buffer = DaemonExecutor(2, "test-reader"), ReadWatch(0.1), Buffer(ALIGNMENT)
    ranges = [ReadRange(many_files[1], 0, 100, 0)]
    async with Reader(many_files, executor, ReadStatistics(), watch=watch) as reader:
        with pytest.raises(ReadTimeoutError, match=r"closing the file at offset 0 of .* has not come back") as caught:
            await watch.in_time(reader.read(ranges, buffer.view))
        assert caught.value.path == many_files[0]
        closes.set()
        await until(lambda: not watch.under_way)
        await reader.read(ranges, buffer.view)
    executor.shutdown()
    assert bytes(buffer.view[:100]) == bytes([1] * 100)
    buffer.close()


async def test_a_close_that_fails(disk: Disk, many_files: list[Path]) -> None:
    """Nothing was written, so nothing is lost."""
    failed: list[Path] = []

    def on_close(path: Path) -> None:
        if path not in failed:
            failed.append(path)
            raise OSError(errno.EIO, "made to fail")

    disk.on_close = on_close
    with ThreadPoolExecutor(1) as executor:
        async with Reader(many_files, executor, ReadStatistics()):
            pass
    assert sorted(failed) == many_files
    for fd in disk.paths:
        os.close(fd)
