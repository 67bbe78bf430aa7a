"""A stage: what is loaded, computed and freed as one, by default one transformer layer."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import torch

from hermes_async.errors import HermesError
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_up
from hermes_async.storage.reader import ReadRange
from hermes_async.storage.tensor_spec import Extent, TensorSpec, merge_extents

_SCRATCH_BYTES = 256 * 1024  # that pieces go through which cannot be read to where they belong


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one parameter lies in its stage's buffer: a byte `position`, in the dtype and shape it is stored in."""

    name: str
    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageLayout:
    """What a stage reads, and where in a buffer its parameters then lie.

    Attributes:
        name: The module's name in the model.
        placements: One for each parameter.
        ranges: What is read; neighbours in a file are read together. Of a parameter that is made of several tensors
            each is a range, read to where it belongs.
        read_bytes: Of all the ranges.
        slot_bytes: The buffer it needs.
        weight_bytes: Its parameters alone, without alignment and gaps.
    """

    name: str
    placements: tuple[Placement, ...]
    ranges: tuple[ReadRange, ...]
    read_bytes: int
    slot_bytes: int
    weight_bytes: int

    @property
    def is_shared(self) -> bool:
        """Whether other modules' parameters lie in it too (tied weights): it cannot be freed behind its own module."""
        return any(not placement.name.startswith(f"{self.name}.") for placement in self.placements)

    @classmethod
    def of(cls, name: str, tensors: Iterable[tuple[str, TensorSpec]]) -> StageLayout:
        """Lays out the tensors, each under the parameter name it is for. Two names may share one tensor."""
        tensors = list(tensors)
        distinct = {(spec.file, spec.offset, spec.nbytes): spec for _, spec in tensors}
        ranges, end = _plain_ranges(spec for spec in distinct.values() if not spec.pieces)
        starts, joined, end = _joined_ranges([spec for spec in distinct.values() if spec.pieces], end)

        def position_of(spec: TensorSpec) -> int:
            if spec.pieces:
                return starts[spec.file, spec.offset]
            within = (
                item.position + spec.offset - item.offset
                for item in ranges
                if item.offset <= spec.offset
                and spec.offset + spec.nbytes <= item.offset + item.nbytes
                and item.file == spec.file
            )
            return next(within) if spec.nbytes else 0

        placements = tuple(Placement(name, position_of(spec), spec.dtype, spec.shape) for name, spec in tensors)
        weight_bytes = sum(spec.nbytes for spec in distinct.values())
        read_bytes = sum(item.nbytes for item in (*ranges, *joined))
        return cls(name, placements, (*ranges, *joined), read_bytes, end, weight_bytes)


def _plain_ranges(specs: Iterable[TensorSpec]) -> tuple[list[ReadRange], int]:
    """Of tensors as the files have them; and where they end."""
    ranges = []
    end = 0
    for extent in merge_extents(specs):
        position = end + extent.offset % ALIGNMENT
        ranges.append(ReadRange(extent.file, extent.offset, extent.nbytes, position))
        end = align_up(position + extent.nbytes)
    return ranges, end


def _joined_ranges(specs: Sequence[TensorSpec], end: int) -> tuple[dict[tuple[Path, int], int], list[ReadRange], int]:
    """Of tensors that are made of several, from `end` on: where each begins, its pieces, and where all of it ends.

    Behind them is memory for the blocks that a piece shares with others in its file; more of it where one lies
    differently to blocks there and here, and all of it must go that way.
    """
    if not specs:
        return {}, [], end
    starts: dict[tuple[Path, int], int] = {}
    pieces: list[tuple[Extent, int]] = []
    for spec in specs:
        position = starts[spec.file, spec.offset] = end + spec.offset % ALIGNMENT
        for piece in spec.pieces:
            pieces.append((piece, position))
            position += piece.nbytes
        end = align_up(position)
    in_place = all(piece.offset % ALIGNMENT == position % ALIGNMENT for piece, position in pieces)
    scratch = end, end + (2 * ALIGNMENT if in_place else _SCRATCH_BYTES)
    ranges = [ReadRange(piece.file, piece.offset, piece.nbytes, position, scratch) for piece, position in pieces]
    return starts, ranges, scratch[1]


class StageState(enum.Enum):
    """EMPTY -> LOADING -> READY -> SPENT -> EMPTY; a failed read is READY too, with `error` set."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    SPENT = "spent"


@dataclass(eq=False, slots=True)
class Stage:
    """One stage at run time.

    Event-loop side only, but the compute thread reads `state`, `buffer` and `error`, and makes a READY stage SPENT.

    Attributes:
        idx: Its place in the model's list of stages.
        resident: Stays in memory; set between sweeps only.
        ready: Set when a load has ended; new for each load.
        emptied: Set when the buffer was given back; new for each load.
        error: Why the last load failed.
        stale: Set while loading when its bytes are no longer wanted.
    """

    idx: int
    layout: StageLayout
    resident: bool
    state: StageState = StageState.EMPTY
    buffer: Buffer | None = None
    ready: anyio.Event = field(default_factory=anyio.Event)
    emptied: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | None = None
    stale: bool = False

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def loaded(self) -> Buffer:
        """The buffer of a stage that is READY without an error."""
        assert self.buffer is not None
        return self.buffer

    def start_loading(self) -> None:
        self.state = StageState.LOADING
        self.emptied = anyio.Event()

    def set_ready(self, buffer: Buffer, error: HermesError | None) -> None:
        self.buffer, self.error = buffer, error
        self.state = StageState.READY
        self.ready.set()

    def drop(self) -> None:
        """Makes a LOADING stage EMPTY again, because its bytes are no longer wanted or its load was cancelled."""
        ready, self.ready = self.ready, anyio.Event()
        self.error, self.stale = None, False
        self.state = StageState.EMPTY
        self.emptied.set()
        ready.set()  # whoever waits looks again

    def clear(self) -> Buffer:
        """Makes the stage EMPTY and returns the buffer that must be given back."""
        buffer, self.buffer = self.buffer, None
        assert buffer is not None
        self.error, self.stale = None, False
        self.state = StageState.EMPTY
        self.ready = anyio.Event()
        self.emptied.set()
        return buffer
