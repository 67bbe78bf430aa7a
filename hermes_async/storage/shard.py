"""An open file of a checkpoint, and the reads of ranges of it, past the page cache where that is possible."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hermes_async.errors import ShortReadError
from hermes_async.storage.buffers import ALIGNMENT, align_down, align_up
from hermes_async.storage.direct_io import O_DIRECT, drop_cache, set_direct
from hermes_async.storage.file_state import FileState
from hermes_async.storage.read_watch import ReadUnderWay


@dataclass(frozen=True, slots=True)
class ReadRange:
    """A read of `nbytes` bytes of `file` from `offset` on, to `position` in a buffer.

    Attributes:
        scratch: None if the read may also write the rest of the blocks around the range. `offset` and `position` must
            then be equal modulo 4096 (`ALIGNMENT`), so that a direct read can begin at the block's beginning.
            Otherwise, the start and end of two or more whole blocks of the buffer; beside the range, the read writes
            only there. If `offset` and `position` are not equal modulo 4096, all bytes pass through the scratch
            blocks, in many small reads if there are few of them.
    """

    file: Path
    offset: int
    nbytes: int
    position: int
    scratch: tuple[int, int] | None = None


class Shard:
    """An open file, which several threads read at once. All methods block.

    Attributes:
        fd: Its file descriptor.
        num_users: Calls that read it.
        is_left: It is closed by the last of them.
    """

    def __init__(self, fd: int, *, direct: bool) -> None:
        self.num_users = 0
        self.is_left = False
        self.fd = fd
        self._direct = direct

    @classmethod
    def open(cls, path: Path, *, direct: bool) -> Self:
        """Opens a file.

        Args:
            direct: Reads bypass the page cache.

        Raises:
            OSError: It cannot be opened; with `EINVAL` if only direct reads cannot be.
        """
        return cls(os.open(path, os.O_RDONLY | (O_DIRECT if direct else 0)), direct=direct)

    def close(self) -> None:
        """Closes the file. No thread may read it."""
        os.close(self.fd)

    @property
    def state(self) -> FileState:
        """As the file is now."""
        return FileState.of(os.fstat(self.fd))

    def read(self, item: ReadRange, view: memoryview, under_way: ReadUnderWay) -> None:
        """Reads a range into `view`.

        Args:
            under_way: Told of each system call.

        Raises:
            ShortReadError: The file ends before the range does.
            OSError: A read failed.
        """
        before = item.offset % ALIGNMENT
        if item.scratch is None:
            start = item.position - before
            targets = [view[start : start + align_up(before + item.nbytes)]]
            self._fill(item, item.offset, item.nbytes, targets, under_way)
            return
        scratch = view[slice(*item.scratch)]
        first, last = align_up(item.position), align_down(item.position + item.nbytes)
        if item.position % ALIGNMENT == before and first < last:
            self._read_blocks(item, view, first, last, scratch=scratch, under_way=under_way)
        else:
            self._read_through(item, view, scratch, under_way)

    def _read_blocks(
        self,
        item: ReadRange,
        view: memoryview,
        first: int,
        last: int,
        *,
        scratch: memoryview,
        under_way: ReadUnderWay,
    ) -> None:
        """Reads the whole blocks `first` to `last` to their place, and the parts around them through `scratch`."""
        head, tail = scratch[:ALIGNMENT], scratch[ALIGNMENT : 2 * ALIGNMENT]
        num_before, num_after = first - item.position, item.position + item.nbytes - last
        before, after = [head] if num_before else [], [tail] if num_after else []
        self._fill(item, item.offset, item.nbytes, [*before, view[first:last], *after], under_way)
        view[item.position : first] = head[ALIGNMENT - num_before :]
        view[last : last + num_after] = tail[:num_after]

    def _read_through(self, item: ReadRange, view: memoryview, scratch: memoryview, under_way: ReadUnderWay) -> None:
        """Reads all bytes through `scratch`, as many at once as it holds."""
        done = 0
        while done < item.nbytes:
            offset = item.offset + done
            before = offset % ALIGNMENT
            count = min(item.nbytes - done, len(scratch) - before)
            self._fill(item, offset, count, [scratch[: align_up(before + count)]], under_way)
            view[item.position + done : item.position + done + count] = scratch[before : before + count]
            done += count

    def _fill(
        self, item: ReadRange, offset: int, nbytes: int, targets: Sequence[memoryview], under_way: ReadUnderWay
    ) -> None:
        """Reads the blocks with `nbytes` bytes from `offset` on into `targets`, one after another.

        Raises:
            ShortReadError: The file ends before that; the error names the whole of `item`.
        """
        base = align_down(offset)
        wanted = offset - base + nbytes
        done = 0
        while True:
            with under_way.at(item.file, base + done):
                done_now = done + self._read_once(base + done, _rest(targets, done))
            if done_now >= wanted:
                return
            if align_down(done_now) == done:
                actual = max(0, base + done_now - item.offset)
                raise ShortReadError(
                    f"{item.file} ended early: {item.nbytes} bytes were expected at offset {item.offset}, {actual} "
                    "came; the file was truncated after it was opened",
                    path=item.file,
                    offset=item.offset,
                    expected=item.nbytes,
                    actual=actual,
                )
            done = align_down(done_now)

    def _read_once(self, offset: int, targets: Sequence[memoryview]) -> int:
        """Makes one system call at `offset`. If the file system refuses direct I/O, all further reads are buffered."""
        fd, direct = self.fd, self._direct
        try:
            count = os.preadv(fd, targets, offset)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            set_direct(fd, False)
            self._direct = False
            return self._read_once(offset, targets)
        if not direct:
            drop_cache(fd, offset, count)
        return count


def _rest(targets: Sequence[memoryview], done: int) -> list[memoryview]:
    """`targets` without their first `done` bytes."""
    left = []
    for target in targets:
        if done < len(target):
            left.append(target[done:])
        done = max(0, done - len(target))
    return left
