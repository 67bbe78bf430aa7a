"""What admission and the loop need of a sequence's cache, whatever its form: KV blocks, or transformers' own cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hermes_async.pipeload.governor import Lease
from hermes_async.storage.parking import ParkingFile

if TYPE_CHECKING:  # imports torch, which only an open engine needs
    from hermes_async.modeling.turns import TurnCache


@dataclass(eq=False, slots=True)
class ParkedKV:
    """A session's cache on disk.

    Attributes:
        slots: Of the parking file.
        turn: For a cache of transformers: what it looks like, with tensors without memory.
    """

    slots: list[int] = field(default_factory=list)
    turn: TurnCache | None = None


class Reservation(ABC):
    """The memory of one sequence's cache. Event-loop side only.

    Attributes:
        lease: Of the memory that it does not share.
        num_reused: Tokens that were complete before the request began.
    """

    lease: Lease
    num_reused: int

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of the sequence that are complete."""

    @abstractmethod
    def advance(self, length: int, token_ids: Sequence[int]) -> None:
        """The first `length` tokens are complete; `token_ids` are at least so many of the sequence."""

    @abstractmethod
    def refresh(self, most: int) -> None:
        """Called before each sweep: `length` becomes what is complete now, at most `most` tokens."""

    @abstractmethod
    def can_extend(self, length: int, token_ids: Sequence[int]) -> bool:
        """Whether a sequence that begins with `token_ids` should go on after the first `length` tokens of this one."""

    @abstractmethod
    def extend(self, holder: str, length: int, capacity: int) -> bool:
        """Keeps the first `length` tokens, with room for `capacity` in all. False if that does not fit now."""

    @abstractmethod
    def trim(self, holder: str) -> bool:
        """Frees what the complete tokens do not need. False if nothing can go on after them: then `release` it."""

    @abstractmethod
    def fork(self, holder: str) -> Reservation | None:
        """A reservation for another sequence with the same tokens so far; None if there is no room for it."""

    @abstractmethod
    def release(self) -> None:
        """Gives everything back. No sweep may still use it."""

    @abstractmethod
    async def park(self, parking: ParkingFile) -> ParkedKV:
        """Writes what is complete to disk. It still has its memory afterwards.

        Raises:
            ParkingError: It could not be written.

        Cancellation: nothing of it is on disk.
        """

    @abstractmethod
    async def unpark(self, parked: ParkedKV, length: int, token_ids: Sequence[int], parking: ParkingFile) -> None:
        """Reads the first `length` tokens back from disk. They are complete then, and reused.

        Raises:
            ParkingError: It could not be read.
        """


class SequenceCaches(ABC):
    """Gives out the memory of caches. Event-loop side only."""

    @abstractmethod
    def nbytes(self, capacity: int) -> int:
        """Bytes of a sequence of `capacity` tokens."""

    @abstractmethod
    def reserve(
        self,
        holder: str,
        token_ids: Sequence[int],
        capacity: int,
        parked: ParkedKV | None = None,
        *,
        input_bytes: int = 0,
    ) -> Reservation | None:
        """Reserves memory for a sequence that begins with `token_ids` and grows to `capacity` tokens.

        Args:
            parked: Its cache on disk; `Reservation.unpark` must follow.
            input_bytes: Further bytes, for an encoder's input.

        Returns:
            None if it does not fit now.
        """

    @abstractmethod
    def missing_bytes(
        self, token_ids: Sequence[int], capacity: int, kept: Reservation | None, parked: ParkedKV | None
    ) -> int:
        """What `reserve`, or `extend` of the reservation `kept`, found no room for."""
