"""A stage: what is loaded, computed and freed as one, by default one transformer layer."""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import torch

from hermes_async.errors import HermesError
from hermes_async.pipeload.governor import Lease
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_up
from hermes_async.storage.reader import ReadKind
from hermes_async.storage.shard import ReadRange
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
        group: Of an optional stage, the name of the group that it belongs to, such as "vision". Only a sweep that asks
            for the group computes it. None where every sweep does.
    """

    name: str
    placements: tuple[Placement, ...]
    ranges: tuple[ReadRange, ...]
    read_bytes: int
    slot_bytes: int
    weight_bytes: int
    group: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other modules' parameters lie in it too (tied weights): it cannot be freed behind its own module."""
        return any(not placement.name.startswith(f"{self.name}.") for placement in self.placements)

    @classmethod
    def of(cls, name: str, tensors: Iterable[tuple[str, TensorSpec]], group: str | None = None) -> StageLayout:
        """Lays out the tensors, each under the parameter name it is for. Two names may share one tensor."""
        tensors = list(tensors)
        distinct = {(spec.file, spec.offset, spec.nbytes): spec for _, spec in tensors}
        ranges, end = _plain_ranges(spec for spec in distinct.values() if not spec.pieces)
        starts, joined, end = _joined_ranges([spec for spec in distinct.values() if spec.pieces], end)
        ranges_of: dict[Path, list[ReadRange]] = {}
        for item in ranges:
            ranges_of.setdefault(item.file, []).append(item)  # ascending by offset

        def position_of(spec: TensorSpec) -> int:
            if spec.pieces:
                return starts[spec.file, spec.offset]
            if not spec.nbytes:
                return 0
            of_file = ranges_of[spec.file]
            item = of_file[bisect_right(of_file, spec.offset, key=lambda item: item.offset) - 1]
            return item.position + spec.offset - item.offset

        placements = tuple(Placement(name, position_of(spec), spec.dtype, spec.shape) for name, spec in tensors)
        weight_bytes = sum(spec.nbytes for spec in distinct.values())
        read_bytes = sum(item.nbytes for item in (*ranges, *joined))
        return cls(
            name=name,
            placements=placements,
            ranges=(*ranges, *joined),
            read_bytes=read_bytes,
            slot_bytes=end,
            weight_bytes=weight_bytes,
            group=group,
        )


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
    """Where a stage is on its way through memory, and who may take it to the next state.

    EMPTY   -> LOADING   a loading agent, which has a buffer for it
    LOADING -> READY     the same agent, when the read has ended; a failed read is READY too, with an `error`
    LOADING -> EMPTY     the same agent, when the bytes are stale or the read was cancelled
    READY   -> SPENT     the inference agent, when a streamed stage is computed
    SPENT   -> EMPTY     the daemon agent
    READY   -> EMPTY     the daemon agent, when the ring starts over, a resident stage leaves, or another expert needs
                         the place of this one
    """

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    SPENT = "spent"


@dataclass(eq=False, slots=True)
class Stage:
    """One stage at run time; its methods are all the transitions of its state.

    Belongs to the event loop, but for the compute thread, which reads `state`, `buffer` and `error`, and calls `spend`.

    Attributes:
        idx: Its place in the model's list of stages. An expert has that of the stage that is entered before it.
        resident: Stays in memory; set between sweeps only.
        is_expert: An expert of a layer: read when a sweep asks for it, and kept as long as there is room.
        buffer: Where its bytes are or come to; None while it is EMPTY.
        lease: Its place in the ring; None for a resident stage, whose buffer is its own.
        ready: Set when a load has ended, or was given up; new for each load.
        emptied: Set when the buffer was given back; new for each load.
        error: Why the last load failed.
        stale: Set while loading when its bytes are no longer wanted.
    """

    idx: int
    layout: StageLayout
    resident: bool
    is_expert: bool = False
    state: StageState = StageState.EMPTY
    buffer: Buffer | None = None
    lease: Lease | None = None
    ready: anyio.Event = field(default_factory=anyio.Event)
    emptied: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | None = None
    stale: bool = False

    @property
    def name(self) -> str:
        """The module's name in the model; empty for the base."""
        return self.layout.name

    @property
    def group(self) -> str | None:
        """See `StageLayout.group`."""
        return self.layout.group

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name or "base"

    @property
    def read_kind(self) -> ReadKind:
        """As what its bytes are counted when they are read."""
        if self.is_expert:
            return "experts"
        return "resident weights" if self.resident else "streamed weights"

    @property
    def loaded(self) -> Buffer:
        """The buffer of a stage that is not EMPTY."""
        assert self.buffer is not None
        return self.buffer

    def start_loading(self, buffer: Buffer, lease: Lease | None) -> None:
        """EMPTY -> LOADING."""
        assert self.state is StageState.EMPTY
        self.state = StageState.LOADING
        self.buffer, self.lease = buffer, lease
        self.emptied = anyio.Event()

    def set_ready(self, error: HermesError | None) -> None:
        """LOADING -> READY."""
        assert self.state is StageState.LOADING
        self.error = error
        self.state = StageState.READY
        self.ready.set()

    def spend(self) -> None:
        """READY -> SPENT; called by the compute thread."""
        assert self.state is StageState.READY
        self.state = StageState.SPENT

    def clear(self) -> tuple[Buffer, Lease | None]:
        """Makes the stage EMPTY, and returns the buffer and the lease that must be given back."""
        buffer, lease = self.loaded, self.lease
        self.buffer = self.lease = self.error = None
        self.stale = False
        self.state = StageState.EMPTY
        ready, self.ready = self.ready, anyio.Event()
        self.emptied.set()
        ready.set()  # whoever waited for a load that was given up looks again
        return buffer, lease
