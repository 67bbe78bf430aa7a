"""Blocks out to disk and back: the same bytes, nothing left behind, and no thread left at work by a cancelled call."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from hermes_async.errors import ParkingError
from hermes_async.storage.buffers import ALIGNMENT, Buffer
from hermes_async.storage.parking import ParkingFile

pytestmark = pytest.mark.anyio

SLOT = 2 * ALIGNMENT
MODULE = "hermes_async.storage.parking"
SHARED_MEMORY = Path("/dev/shm")


Call = Callable[[Sequence[memoryview]], int]


class Disk:
    """What lies between the parking file and the system: `on_write` and `on_read` run in its thread, and may wait."""

    def __init__(self) -> None:
        self.on_write: Callable[[int, Sequence[memoryview], Call], int] = lambda fd, views, call: call(views)
        self.on_read = self.on_write
        self.calls: list[tuple[str, int, int]] = []  # what, offset, views


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    real_write, real_read = os.pwritev, os.preadv

    def write(fd: int, views: Sequence[memoryview], offset: int) -> int:
        disk.calls.append(("write", offset, len(views)))
        return disk.on_write(fd, views, lambda views: real_write(fd, views, offset))

    def read(fd: int, views: Sequence[memoryview], offset: int) -> int:
        disk.calls.append(("read", offset, len(views)))
        return disk.on_read(fd, views, lambda views: real_read(fd, views, offset))

    monkeypatch.setattr(f"{MODULE}.os.pwritev", write)
    monkeypatch.setattr(f"{MODULE}.os.preadv", read)
    return disk


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
async def parking(request: pytest.FixtureRequest, disk: Disk, tmp_path: Path) -> AsyncIterator[ParkingFile]:
    async with ParkingFile(tmp_path, SLOT, direct=request.param) as parking:
        yield parking


def blocks(*contents: bytes) -> list[memoryview]:
    """A page-aligned view for each, holding it."""
    view = Buffer(SLOT * max(1, len(contents))).view
    views = [view[idx * SLOT : (idx + 1) * SLOT] for idx in range(len(contents))]
    for block, content in zip(views, contents, strict=True):
        block[:] = content
    return views


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(SLOT)


async def bring_back(parking: ParkingFile, slots: Sequence[int]) -> list[bytes]:
    views = blocks(*[bytes(SLOT) for _ in slots])
    await parking.read(slots, views)
    return [bytes(view) for view in views]


def fd_of(parking: ParkingFile) -> int:
    assert parking._fd is not None
    return parking._fd


def is_direct(parking: ParkingFile) -> bool:
    return bool(fcntl.fcntl(fd_of(parking), fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def size_of(parking: ParkingFile) -> int:
    return os.fstat(fd_of(parking)).st_size


def open_files() -> set[str]:
    return {entry.name for entry in Path("/dev/fd").iterdir()}


def at_most(most: int, views: Sequence[memoryview], call: Call) -> int:
    """Does what the system may do: less than it was asked for."""
    kept = []
    for view in views:
        kept.append(view[:most])
        most -= len(kept[-1])
    return call([view for view in kept if view])


def refusing(code: int) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


# Round trips


@pytest.mark.parametrize("seed", range(3))
async def test_everything_comes_back_bit_for_bit(parking: ParkingFile, seed: int) -> None:
    rng = random.Random(seed)
    parked: dict[int, bytes] = {}
    for _ in range(60):
        action = rng.choice(["write", "write", "read", "free", "free all"] if rng.random() < 0.3 else ["write", "read"])
        some = rng.sample(sorted(parked), rng.randint(0, len(parked)))
        if action == "write":
            contents = [rng.randbytes(SLOT) for _ in range(rng.randint(0, 5))]
            slots = await parking.write(blocks(*contents))
            assert len(set(slots)) == len(contents)
            assert not parked.keys() & set(slots)
            parked.update(zip(slots, contents, strict=True))
        elif action == "read" and some:
            assert await bring_back(parking, some) == [parked[slot] for slot in some]
        else:
            freed = list(parked) if action == "free all" else some
            parking.free(freed)
            for slot in freed:
                del parked[slot]
        assert parking.num_slots_used == len(parked)
        assert parking.bytes_used == len(parked) * SLOT
    assert await bring_back(parking, sorted(parked)) == [parked[slot] for slot in sorted(parked)]


async def test_many_tasks_at_once(parking: ParkingFile) -> None:
    async def chat(seed: int) -> None:
        for turn in range(5):
            contents = [content(1000 * seed + 10 * turn + block) for block in range(3)]
            slots = await parking.write(blocks(*contents))
            assert await bring_back(parking, slots[::-1]) == contents[::-1]
            parking.free(slots[:2])
            assert await bring_back(parking, slots[2:]) == contents[2:]
            parking.free(slots[2:])

    async with anyio.create_task_group() as group:
        for seed in range(6):
            group.start_soon(chat, seed)
    assert parking.num_slots_used == 0


async def test_the_lowest_free_slots_are_used_first_and_runs_go_in_one_call(parking: ParkingFile, disk: Disk) -> None:
    assert await parking.write(blocks(*map(content, range(6)))) == [0, 1, 2, 3, 4, 5]
    parking.free([4, 1, 2])
    assert await parking.write(blocks(*map(content, range(10, 15)))) == [1, 2, 4, 6, 7]
    expected = [content(seed) for seed in (0, 10, 11, 3, 12, 5, 13, 14)]
    assert await bring_back(parking, range(8)) == expected
    assert disk.calls == [
        ("write", 0, 6),
        ("write", SLOT, 2), ("write", 4 * SLOT, 1), ("write", 6 * SLOT, 2),
        ("read", 0, 8),
    ]  # fmt: skip


async def test_no_call_takes_too_many_views_or_bytes(
    parking: ParkingFile, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = blocks(content(0))[0]
    slots = await parking.write([view] * 2500)
    assert disk.calls == [("write", 0, 1024), ("write", 1024 * SLOT, 1024), ("write", 2048 * SLOT, 452)]
    assert await bring_back(parking, slots[-2:]) == [content(0)] * 2
    parking.free(slots)
    disk.calls.clear()
    monkeypatch.setattr(f"{MODULE}._MAX_BYTES_PER_CALL", 3 * SLOT - 1)
    await parking.write([view] * 5)
    assert disk.calls == [("write", 0, 2), ("write", 2 * SLOT, 2), ("write", 4 * SLOT, 1)]
    disk.calls.clear()
    monkeypatch.setattr(f"{MODULE}._MAX_BYTES_PER_CALL", 1)
    await parking.write([view] * 2)
    assert disk.calls == [("write", 5 * SLOT, 1), ("write", 6 * SLOT, 1)]


@pytest.mark.parametrize("most", [1000, ALIGNMENT, ALIGNMENT + 1, SLOT, SLOT + ALIGNMENT, 2 * SLOT + 77])
async def test_short_writes_and_short_reads_go_on(parking: ParkingFile, disk: Disk, most: int) -> None:
    disk.on_write = disk.on_read = lambda fd, views, call: at_most(most, views, call)
    contents = [content(seed) for seed in range(4)]
    assert await bring_back(parking, await parking.write(blocks(*contents))) == contents


async def test_space_is_given_back_by_the_first_write_after_all_slots_are_free(parking: ParkingFile) -> None:
    slots = await parking.write(blocks(*map(content, range(8))))
    parking.free(slots[:7])
    await parking.write(blocks(content(8)))
    assert size_of(parking) == 8 * SLOT
    parking.free([0, 7])
    assert (parking.num_slots_used, parking.bytes_used) == (0, 0)
    assert await parking.write(blocks(content(9), content(10))) == [0, 1]
    assert size_of(parking) == 2 * SLOT
    assert await bring_back(parking, [1, 0]) == [content(10), content(9)]
    await parking.write(blocks(content(11)))
    assert size_of(parking) == 3 * SLOT  # only the first write


# The file


@pytest.mark.parametrize("named_at_first", [False, True])
async def test_the_file_is_private_without_a_name_and_made_with_the_first_write(
    parking: ParkingFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_at_first: bool
) -> None:
    named: list[Any] = []
    real = tempfile.mkstemp
    monkeypatch.setattr(f"{MODULE}.tempfile.mkstemp", lambda **kwargs: named.append(kwargs["dir"]) or real(**kwargs))
    if named_at_first:
        monkeypatch.setattr(f"{MODULE}._O_TMPFILE", 0)
    await parking.write([])
    assert parking._fd is None
    slots = await parking.write(blocks(content(0)))
    status = os.fstat(fd_of(parking))
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    assert status.st_nlink == 0
    assert status.st_dev == tmp_path.stat().st_dev  # noqa: ASYNC240
    assert not os.get_inheritable(fd_of(parking))
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
    if named_at_first:
        assert named == [tmp_path]
    assert await bring_back(parking, slots) == [content(0)]


async def test_names_that_killed_processes_have_left_are_taken_away(
    parking: ParkingFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two calls that make a file without a name where the system has no such files."""
    monkeypatch.setattr(f"{MODULE}._O_TMPFILE", 0)
    (tmp_path / "hermes-async-parked-left").touch()
    (tmp_path / "other").touch()
    slots = await parking.write(blocks(content(0)))
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]  # noqa: ASYNC240
    assert await bring_back(parking, slots) == [content(0)]


async def test_a_name_that_cannot_be_taken_away_is_an_error(
    parking: ParkingFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._O_TMPFILE", 0)
    monkeypatch.setattr(f"{MODULE}.Path.unlink", refusing(errno.EIO))
    before = open_files()
    with pytest.raises(ParkingError):
        await parking.write(blocks(content(0)))
    assert open_files() <= before


async def test_direct_or_not(disk: Disk, tmp_path: Path) -> None:
    for direct in (True, False):
        async with ParkingFile(tmp_path, SLOT, direct=direct) as parking:
            await parking.write(blocks(content(0)))
            assert is_direct(parking) == (direct and hasattr(os, "O_DIRECT"))


async def test_where_nothing_is_said_it_lies_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fallback, on_disk = tmp_path / "fallback", tmp_path / "disk"
    fallback.mkdir()
    monkeypatch.setattr(f"{MODULE}._DEFAULT_FOLDER", on_disk)
    monkeypatch.setattr(f"{MODULE}._O_TMPFILE", 0)
    monkeypatch.setattr(f"{MODULE}.tempfile.gettempdir", lambda: str(fallback))
    folders = []
    real = tempfile.mkstemp
    monkeypatch.setattr(f"{MODULE}.tempfile.mkstemp", lambda **kwargs: folders.append(kwargs["dir"]) or real(**kwargs))
    for _ in range(2):
        async with ParkingFile(None, SLOT) as parking:
            assert await bring_back(parking, await parking.write(blocks(content(0)))) == [content(0)]
        on_disk.mkdir(exist_ok=True)
    assert folders == [fallback, on_disk]


async def test_no_file_is_touched_on_the_event_loop(
    parking: ParkingFile, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[int]] = {}

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            return real(*args, **kwargs)

        monkeypatch.setattr(f"{MODULE}.os.{name}", call)

    for name in ("open", "pwritev", "preadv", "fstat", "ftruncate", "fdatasync", "posix_fadvise", "access", "close"):
        spy(name)
    slots = await parking.write(blocks(content(0)))
    await bring_back(parking, slots)
    parking.free(slots)
    await parking.write(blocks(content(1)))
    await parking.aclose()
    assert {"open", "pwritev", "preadv", "ftruncate", "close"} <= threads.keys()
    assert not any(threading.get_ident() in idents for idents in threads.values())


# Where direct I/O is refused


@pytest.mark.parametrize("first", ["open", "write", "read"])
async def test_where_direct_io_is_refused_it_is_buffered(
    parking: ParkingFile, disk: Disk, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    real = fcntl.fcntl

    def control(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, argument)

    def refuse(fd: int, views: Sequence[memoryview], call: Call) -> int:
        if real(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(views)

    if first == "open":
        monkeypatch.setattr("hermes_async.storage.direct_io.fcntl.fcntl", control)
    elif first == "write":
        disk.on_write = refuse
    else:
        disk.on_read = refuse
    contents = [content(seed) for seed in range(3)]
    slots = await parking.write(blocks(*contents))
    assert await bring_back(parking, slots) == contents
    assert not is_direct(parking)
    num_calls = len(disk.calls)
    assert await bring_back(parking, await parking.write(blocks(*contents))) == contents
    assert len(disk.calls) == num_calls + 2  # it is not tried again


async def test_a_buffered_write_or_read_that_is_refused_is_an_error(parking: ParkingFile, disk: Disk) -> None:
    slots = await parking.write(blocks(content(0)))
    disk.on_write = disk.on_read = refusing(errno.EINVAL)
    for call in (parking.write(blocks(content(1))), parking.read(slots, blocks(content(0)))):
        with pytest.raises(ParkingError) as caught:
            await call
        assert caught.value.errno == errno.EINVAL
    assert parking.num_slots_used == 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no advice to give")
async def test_buffered_the_page_cache_is_dropped_behind(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real_sync, real_advise = os.fdatasync, os.posix_fadvise
    monkeypatch.setattr(f"{MODULE}.os.fdatasync", lambda fd: calls.append("sync") or real_sync(fd))
    monkeypatch.setattr(f"{MODULE}.os.posix_fadvise", lambda fd, *args: calls.append(args) or real_advise(fd, *args))
    for direct in (False, True):
        async with ParkingFile(tmp_path, SLOT, direct=direct) as parking:
            await bring_back(parking, (await parking.write(blocks(content(0), content(1))))[1:])
    drop = os.POSIX_FADV_DONTNEED
    assert calls == ["sync", (0, 2 * SLOT, drop), (SLOT, SLOT, drop)]


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no memory file system")
@pytest.mark.parametrize("direct", [True, False])
async def test_in_memory_too(direct: bool) -> None:
    contents = [content(seed) for seed in range(3)]
    before = set(SHARED_MEMORY.iterdir())  # noqa: ASYNC240
    async with ParkingFile(SHARED_MEMORY, SLOT, direct=direct) as parking:
        slots = await parking.write(blocks(*contents))
        assert set(SHARED_MEMORY.iterdir()) <= before  # noqa: ASYNC240
        assert await bring_back(parking, slots[::-1]) == contents[::-1]


# Errors


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota")])
async def test_a_full_disk(parking: ParkingFile, disk: Disk, tmp_path: Path, code: int, words: str) -> None:
    earlier = await parking.write(blocks(content(0), content(1)))
    room = 2 * SLOT + ALIGNMENT

    def fill(fd: int, views: Sequence[memoryview], call: Call) -> int:
        nonlocal room
        if room == 0:
            raise OSError(code, os.strerror(code))
        count = at_most(room, views, call)
        room -= count
        return count

    disk.on_write = fill
    with pytest.raises(ParkingError, match=words) as caught:
        await parking.write(blocks(*map(content, range(10, 15))))
    assert (caught.value.path, caught.value.errno) == (tmp_path, code)
    assert str(5 * SLOT) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert parking.num_slots_used == 2
    assert size_of(parking) == 2 * SLOT  # what was written of it is given back to the disk
    assert await bring_back(parking, earlier) == [content(0), content(1)]
    disk.on_write = lambda fd, views, call: call(views)
    assert await parking.write(blocks(content(2), content(3))) == [2, 3]
    assert await bring_back(parking, range(4)) == [content(seed) for seed in range(4)]


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="nothing waits to be written")
async def test_a_disk_that_is_full_only_when_the_cache_is_written(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ParkingFile(tmp_path, SLOT, direct=False) as parking:
        monkeypatch.setattr(f"{MODULE}.os.fdatasync", refusing(errno.ENOSPC))
        with pytest.raises(ParkingError, match="the disk is full"):
            await parking.write(blocks(content(0)))
        assert parking.num_slots_used == 0


async def test_a_read_that_fails(parking: ParkingFile, disk: Disk, tmp_path: Path) -> None:
    slots = await parking.write(blocks(content(0)))
    disk.on_read = refusing(errno.EIO)
    with pytest.raises(ParkingError, match=f"bringing back {SLOT} bytes .*{os.strerror(errno.EIO)}") as caught:
        await bring_back(parking, slots)
    assert (caught.value.path, caught.value.errno) == (tmp_path, errno.EIO)
    disk.on_read = disk.on_write
    assert await bring_back(parking, slots) == [content(0)]


async def test_a_file_that_ends_early(parking: ParkingFile) -> None:
    slots = await parking.write(blocks(content(0), content(1)))
    os.ftruncate(fd_of(parking), SLOT + ALIGNMENT)
    with pytest.raises(ParkingError, match="ended early"):
        await bring_back(parking, slots)
    assert await bring_back(parking, slots[:1]) == [content(0)]


async def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, file, closed = tmp_path / "missing", tmp_path / "file", tmp_path / "closed"
    file.write_bytes(b"")
    closed.mkdir()
    cases = [(missing, errno.ENOENT, "no such folder"), (file, errno.ENOTDIR, "no folder")]
    cases += [(closed, errno.EACCES, "may not be written to"), (closed, errno.EROFS, "may not be written to")]
    for folder, code, words in cases:
        with monkeypatch.context() as patch:
            if folder == closed:
                patch.setattr(f"{MODULE}.os.open", refusing(code))
            async with ParkingFile(folder, SLOT) as parking:
                with pytest.raises(ParkingError, match=words) as caught:
                    await parking.write(blocks(content(0)))
                assert (caught.value.path, caught.value.errno) == (folder, code)
                assert str(folder) in str(caught.value)
                assert parking.num_slots_used == 0
    missing.mkdir()
    async with ParkingFile(missing, SLOT) as parking:
        assert await parking.write(blocks(content(0))) == [0]


@pytest.mark.parametrize("slot_bytes", [0, -ALIGNMENT, 1, ALIGNMENT + 1])
def test_a_slot_is_whole_blocks(slot_bytes: int) -> None:
    with pytest.raises(ValueError, match=str(ALIGNMENT)):
        ParkingFile(None, slot_bytes)


async def test_what_makes_no_sense_changes_nothing(parking: ParkingFile, disk: Disk) -> None:
    slots = await parking.write(blocks(content(0), content(1)))
    views = blocks(content(2), content(3))
    for call in (
        parking.write([views[0], views[1][:-1]]),
        parking.read(slots, views[:1]),
        parking.read([0, 2], views),
        parking.read(slots, [views[0], views[1][:ALIGNMENT]]),
    ):
        with pytest.raises(ValueError, match=r"bytes|in use"):
            await call
    for wrong in ([0, 0], [0, 2], [-1]):
        with pytest.raises(ValueError, match="in use"):
            parking.free(wrong)
    assert len(disk.calls) == 1
    assert parking.num_slots_used == 2
    assert await bring_back(parking, slots) == [content(0), content(1)]


# Cancellation


class Gate:
    """Stops the thread in its first system call until the test lets it through."""

    def __init__(self, disk: Disk) -> None:
        self.entered, self.may_pass, self.ended = threading.Event(), threading.Event(), threading.Event()
        disk.on_write = disk.on_read = self.slow

    def slow(self, fd: int, views: Sequence[memoryview], call: Call) -> int:
        self.entered.set()
        assert self.may_pass.wait(30)
        count = call(views)
        self.ended.set()
        return count

    async def until_entered(self) -> None:
        assert await anyio.to_thread.run_sync(self.entered.wait, 30)


async def cancelled_in_its_first_call(native: bool, gate: Gate, call: Callable[[], Awaitable[Any]]) -> None:
    """Checks that `call`, cancelled while its thread is at work, does not return before the thread is done."""
    returned = []

    async def run() -> None:
        try:
            await call()
        except BaseException as error:
            returned.append((gate.ended.is_set(), type(error)))
            raise

    task = asyncio.create_task(run()) if native else None
    scope = anyio.CancelScope()

    async def run_scoped() -> None:
        with scope:
            await run()

    async with anyio.create_task_group() as group:
        if task is None:
            group.start_soon(run_scoped)
        await gate.until_entered()
        for _ in range(2):  # impatience does not help
            task.cancel() if task is not None else scope.cancel()
            await anyio.wait_all_tasks_blocked()
        assert returned == []
        gate.may_pass.set()
    if task is not None:
        with pytest.raises(asyncio.CancelledError):
            await task
    assert returned == [(True, asyncio.CancelledError)]


@pytest.mark.parametrize("native", [False, True], ids=["scope", "native"])
async def test_a_cancelled_write_waits_for_its_thread_and_gives_its_slots_back(
    parking: ParkingFile, disk: Disk, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(f"{MODULE}._MAX_BYTES_PER_CALL", SLOT)
    await parking.write(blocks(content(0)))
    disk.calls.clear()
    gate = Gate(disk)
    views = blocks(content(1), content(2), content(3))
    await cancelled_in_its_first_call(native, gate, lambda: parking.write(views))
    assert disk.calls == [("write", SLOT, 1)]  # the next one was not begun
    assert parking.num_slots_used == 1
    assert size_of(parking) == SLOT
    assert await parking.write(blocks(content(4))) == [1]
    assert await bring_back(parking, [0, 1]) == [content(0), content(4)]


@pytest.mark.parametrize("native", [False, True], ids=["scope", "native"])
async def test_cancelled_in_its_last_call_a_write_still_gives_its_slots_back(
    parking: ParkingFile, disk: Disk, native: bool
) -> None:
    gate = Gate(disk)
    await cancelled_in_its_first_call(native, gate, lambda: parking.write(blocks(content(0))))
    assert gate.ended.is_set()
    assert parking.num_slots_used == 0
    assert await parking.write(blocks(content(1), content(2))) == [0, 1]
    assert size_of(parking) == 2 * SLOT


@pytest.mark.parametrize("native", [False, True], ids=["scope", "native"])
async def test_a_cancelled_read_waits_for_its_thread_and_the_slots_keep_what_they_hold(
    parking: ParkingFile, disk: Disk, native: bool
) -> None:
    slots = await parking.write(blocks(content(0), content(1), content(2)))
    disk.calls.clear()
    gate = Gate(disk)
    views = blocks(*[bytes(SLOT)] * 3)
    await cancelled_in_its_first_call(native, gate, lambda: parking.read([0, 2, 1], views))
    assert disk.calls == [("read", 0, 1)]
    assert parking.num_slots_used == 3
    assert await bring_back(parking, slots) == [content(0), content(1), content(2)]


async def test_cancelled_before_its_turn(parking: ParkingFile, disk: Disk) -> None:
    gate = Gate(disk)
    scope, left = anyio.CancelScope(), anyio.Event()
    got: list[list[int]] = []

    async def write(*contents: bytes) -> None:
        got.append(await parking.write(blocks(*contents)))

    async def write_scoped() -> None:
        with scope:
            await write(content(1))
        left.set()

    async with anyio.create_task_group() as group:
        group.start_soon(write, content(0))
        await gate.until_entered()
        group.start_soon(write_scoped)
        await anyio.wait_all_tasks_blocked()
        assert parking.num_slots_used == 2
        scope.cancel()
        await left.wait()
        assert parking.num_slots_used == 1
        gate.may_pass.set()
    assert got == [[0]]
    assert len(disk.calls) == 1
    assert await bring_back(parking, [0]) == [content(0)]


# The end


async def test_closed_twice_and_used_afterwards(parking: ParkingFile, disk: Disk, tmp_path: Path) -> None:
    slots = await parking.write(blocks(content(0)))
    fd = fd_of(parking)
    for _ in range(2):
        await parking.aclose()
        assert (parking.num_slots_used, parking.bytes_used) == (0, 0)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)
    num_calls = len(disk.calls)
    for call in (parking.write(blocks(content(0))), parking.write([]), parking.read(slots, blocks(content(0)))):
        with pytest.raises(ParkingError, match="closed") as caught:
            await call
        assert (caught.value.path, caught.value.errno) == (tmp_path, None)
    parking.free(slots)
    assert len(disk.calls) == num_calls
    assert parking.num_slots_used == 0
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


async def test_closed_without_a_write(tmp_path: Path) -> None:
    async with ParkingFile(tmp_path / "missing", SLOT) as parking:
        pass
    with pytest.raises(ParkingError, match="closed"):
        await parking.read([], [])


@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_waits_for_the_thread_and_turns_away_who_comes_after(
    parking: ParkingFile, disk: Disk, cancelled: bool
) -> None:
    gate = Gate(disk)
    ends: list[Any] = []

    async def write(name: str) -> None:
        try:
            await parking.write(blocks(content(0)))
            ends.append((name, "written"))
        except ParkingError as error:
            ends.append((name, str(error)))

    async def close() -> None:
        with anyio.CancelScope() as scope:
            if cancelled:
                scope.cancel()
            try:
                await parking.aclose()
            finally:
                ends.append(("close", parking._fd))

    async with anyio.create_task_group() as group:
        group.start_soon(write, "first")
        await gate.until_entered()
        fd = fd_of(parking)
        group.start_soon(write, "second")
        await anyio.wait_all_tasks_blocked()
        group.start_soon(close)
        await anyio.wait_all_tasks_blocked()
        assert ends == []
        os.fstat(fd)
        gate.may_pass.set()
    assert ends[0] == ("first", "written")
    assert ("close", None) in ends
    assert "closed" in dict(ends)["second"]
    assert len(disk.calls) == 1
    assert parking.num_slots_used == 0
