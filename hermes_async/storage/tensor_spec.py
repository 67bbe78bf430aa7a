"""Where tensors lie in files, and which reads fetch them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from hermes_async.storage.file_state import FileState


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies.

    Attributes:
        name: Its name in the file.
        offset: Its first byte, from the start of the file.
        pieces: The extents that make up the tensor, in order, if it is joined from several tensors of the checkpoint.
            `file` and `offset` are then those of the first extent.
        packed: The format's name of its dtype or type, if its numbers are packed into bytes. `dtype` and `shape` are
            then those of the bytes, and no model can use the tensor as it is.
        file_states: Its files, as they were when their headers were read.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Extent, ...] = ()
    packed: str | None = None
    file_states: Mapping[Path, FileState] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dtype_name(self) -> str:
        """The dtype as torch names it, or the format if a number takes less than a byte; for messages."""
        return self.packed or str(self.dtype).removeprefix("torch.")

    @classmethod
    def joined(cls, specs: Sequence[TensorSpec], shape: tuple[int, ...]) -> TensorSpec:
        """One tensor of `shape`, made of the bytes of `specs` in this order. All `specs` must have one dtype."""
        first, nbytes = specs[0], sum(spec.nbytes for spec in specs)
        name = f"{first.name} and {len(specs) - 1} more"
        pieces: list[Extent] = []
        for spec in specs:
            last = pieces[-1] if pieces else None
            if last and last.file == spec.file and last.offset + last.nbytes == spec.offset:
                pieces[-1] = Extent(last.file, last.offset, last.nbytes + spec.nbytes)
            else:
                pieces.append(Extent(spec.file, spec.offset, spec.nbytes))
        return cls(
            name=name,
            file=first.file,
            offset=first.offset,
            nbytes=nbytes,
            dtype=first.dtype,
            shape=shape,
            pieces=tuple(pieces),
            file_states=file_states(specs),
        )

    def rows(self, start: int, stop: int) -> TensorSpec:
        """The spec of the rows `start` to `stop` (exclusive) of the first dimension.

        Raises:
            ValueError: The tensor has no such rows.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"tensor {self.name!r} of shape {self.shape} has no rows {start}:{stop}")
        row_bytes = self.dtype.itemsize * prod(self.shape[1:])
        pieces = tuple(_within(self.pieces, start * row_bytes, stop * row_bytes))
        return replace(
            self,
            name=f"{self.name}[{start}:{stop}]",
            file=pieces[0].file if pieces else self.file,
            offset=pieces[0].offset if pieces else self.offset + start * row_bytes,
            nbytes=(stop - start) * row_bytes,
            shape=(stop - start, *self.shape[1:]),
            pieces=pieces,
        )

    def divided(self) -> list[TensorSpec]:
        """The specs of all rows of the first dimension, without that dimension."""
        num_rows = self.shape[0]
        row_bytes = self.nbytes // max(1, num_rows)
        pieces = _divided(self.pieces, row_bytes) if self.pieces else [()] * num_rows
        return [
            replace(
                self,
                name=f"{self.name}[{row}]",
                file=own[0].file if own else self.file,
                offset=own[0].offset if own else self.offset + row * row_bytes,
                nbytes=row_bytes,
                shape=self.shape[1:],
                pieces=own if len(own) > 1 else (),
            )
            for row, own in enumerate(pieces)
        ]


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of one file that is read at once."""

    file: Path
    offset: int
    nbytes: int


def file_states(specs: Iterable[TensorSpec]) -> dict[Path, FileState]:
    """All files of `specs`, as they were when their headers were read."""
    states: dict[Path, FileState] = {}
    for spec in specs:
        states.update(spec.file_states)
    return states


def _within(pieces: Iterable[Extent], start: int, stop: int) -> Iterator[Extent]:
    """The bytes `start` to `stop` of the concatenation of `pieces`."""
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.nbytes
        first, last = max(begin, start), min(end, stop)
        if first < last:
            yield Extent(piece.file, piece.offset + first - begin, last - first)


def _divided(pieces: Iterable[Extent], part_bytes: int) -> list[tuple[Extent, ...]]:
    """The concatenation of `pieces`, cut into parts of equal size; the pieces of each part."""
    parts: list[tuple[Extent, ...]] = []
    own: list[Extent] = []
    missing = part_bytes
    for piece in pieces:
        done = 0
        while done < piece.nbytes:
            nbytes = min(missing, piece.nbytes - done)
            own.append(Extent(piece.file, piece.offset + done, nbytes))
            done, missing = done + nbytes, missing - nbytes
            if not missing:
                parts.append(tuple(own))
                own, missing = [], part_bytes
    return parts


def merge_extents(specs: Iterable[TensorSpec], *, max_gap: int = 65536) -> list[Extent]:
    """Merges the bytes of `specs` into few reads, sorted by file and offset.

    Tensors of one file that are at most `max_gap` bytes apart are read together, with the gap. A tensor without
    elements adds no extent.
    """
    extents: list[Extent] = []
    # Comparing texts takes a fraction of the time of comparing paths.
    for spec in sorted((spec for spec in specs if spec.nbytes), key=lambda spec: (str(spec.file), spec.offset)):
        last = extents[-1] if extents else None
        if last and spec.offset - (last.offset + last.nbytes) <= max_gap and last.file == spec.file:
            end = max(last.offset + last.nbytes, spec.offset + spec.nbytes)
            extents[-1] = Extent(last.file, last.offset, end - last.offset)
        else:
            extents.append(Extent(spec.file, spec.offset, spec.nbytes))
    return extents
