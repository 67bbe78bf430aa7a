"""Lets requests in when their KV fits, first come, first served; parks idle sessions on disk when KV is short."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import count

import anyio
import anyio.abc

from hermes_async.config import format_bytes
from hermes_async.errors import HermesError, MemoryBudgetError, ParkingError, QueueFullError
from hermes_async.modeling.kv_cache import BLOCK_TOKENS, num_blocks, num_kept
from hermes_async.serving.kv_blocks import KVBlocks, Reservation
from hermes_async.serving.request import Request
from hermes_async.serving.session_kv import SessionKV
from hermes_async.storage.parking import ParkingFile

logger = logging.getLogger(__name__)


class Admission:
    """The queue before the sweeps, and the KV of sessions between their turns.

    A request waits at most behind those that came before it, even where a smaller one would fit. When the first one
    does not fit, prefixes that nobody uses are dropped, and then the longest idle session is parked. It is refused
    where the budget has shrunk so far that it never can fit.

    Args:
        tasks: Owns the tasks that write to the parking file and read from it.
        max_sequences: Most requests that are let in at once, paused ones not counted.
        max_waiting: Most requests that may wait.
        num_active: Counts the requests that were let in and are not paused.
        admitted: Told of each request that was let in; its reservation is there.
        ended: Told of a request that was aborted while its session came back from disk, and of one that is refused,
            with the error.
    """

    def __init__(
        self,
        blocks: KVBlocks,
        parking: ParkingFile,
        tasks: anyio.abc.TaskGroup,
        *,
        max_sequences: int,
        max_waiting: int | None,
        num_active: Callable[[], int],
        admitted: Callable[[Request], None],
        ended: Callable[[Request, HermesError | None], None],
    ) -> None:
        self.blocks = blocks
        self._parking = parking
        self._tasks = tasks
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._num_active = num_active
        self._admitted = admitted
        self._ended = ended
        # All mutable state: who waits, in order; let in, but their session's KV is still being read from disk;
        # open sessions, longest idle first; a session is being written to disk; counts.
        self._waiting: deque[Request] = deque()
        self._loading: set[Request] = set()
        self._sessions: dict[SessionKV, None] = {}
        self._is_parking = False
        self._is_pumping = False
        self._stopped = False
        self._numbers = count(1)
        self.num_parkings = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_parked(self) -> int:
        return sum(session.slots is not None for session in self._sessions)

    # --- requests ---

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the queue, and lets it in at once where it can.

        Raises:
            QueueFullError: As many wait as may.
        """
        self._waiting.append(request)
        self.pump()
        if self._max_waiting is not None and len(self._waiting) > self._max_waiting and request in self._waiting:
            self._waiting.remove(request)
            raise self._full(len(self._waiting))

    def check_room(self, num_preparing: int) -> None:
        """Refuses a request that has not been prepared yet, where too many would wait.

        Those in preparation count as waiting, but for as many as could be let in at once.

        Raises:
            QueueFullError: As many wait as may.
        """
        free = max(0, self._max_sequences - self._num_active() - len(self._loading))
        num_waiting = len(self._waiting) + num_preparing
        if self._max_waiting is not None and num_waiting >= self._max_waiting + (0 if self._waiting else free):
            raise self._full(num_waiting)

    def _full(self, num_waiting: int) -> QueueFullError:
        return QueueFullError(
            f"{num_waiting} requests wait, which is as many as max_waiting={self._max_waiting} lets wait; "
            "try again later"
        )

    def pump(self) -> None:
        """Lets in who can be let in now; called whenever something has changed."""
        if self._is_pumping:
            return  # the end of a request that is refused calls this
        self._is_pumping = True
        try:
            self._pump()
        finally:
            self._is_pumping = False

    def _pump(self) -> None:
        while self._waiting and not self._stopped and self._num_active() + len(self._loading) < self._max_sequences:
            request = self._waiting[0]
            if (error := self._refusal(request)) is not None:
                self._ended(request, error)
                continue
            session = request.session
            if session is not None and (session.moving is not None or session.in_turn):
                return  # being parked, or a turn that was left is still computed; the end of that calls this again
            reservation = self._reserve(request)
            if reservation is None:
                self._park_longest_idle(request.session)
                return
            self._waiting.popleft()
            request.reservation = reservation
            request.num_reused = reservation.num_reused
            request.admitted_at = time.perf_counter()
            if session is not None:
                session.in_turn = True
            if session is not None and session.slots is not None:
                self._loading.add(request)
                session.moving = anyio.Event()
                self._tasks.start_soon(self._load, request, session, session.slots)
            else:
                self._admitted(request)

    def _refusal(self, request: Request) -> MemoryBudgetError | None:
        """Why a request can never be let in: it was made when there was more memory for KV."""
        capacity, most = request.prepared.capacity, self.blocks.most_bytes
        needed = self.blocks.pool.layout.nbytes(capacity)
        if needed <= most:
            return None
        return MemoryBudgetError(
            f"{capacity} tokens need {format_bytes(needed)} of KV memory; the budget has shrunk while the request "
            f"waited, and leaves {format_bytes(most)} for KV caches. Ask for fewer tokens, or give the engine more "
            "memory",
            requested_bytes=needed,
            budget_bytes=most,
        )

    def is_loading(self, request: Request) -> bool:
        """Whether a thread may be writing to its blocks; `ended` is called for it later if it is aborted."""
        return request in self._loading

    def give_back(self, request: Request) -> None:
        """Takes back all that a request holds: its place in the queue, or its KV, which its session keeps."""
        self._loading.discard(request)
        reservation, session = request.reservation, request.session
        if reservation is not None and session is not None:
            session.in_turn = False
        if reservation is None:
            if request in self._waiting:
                self._waiting.remove(request)
        elif session is None or session.closed:
            self.blocks.release(reservation)
        else:
            self.blocks.trim(reservation)
            reservation.lease.holder = f"KV of {session.name}"
            session.reservation = reservation
            session.token_ids = request.token_ids[: reservation.kv.length]
            self._sessions[session] = self._sessions.pop(session)
        request.reservation = None

    def _reserve(self, request: Request) -> Reservation | None:
        holder = f"KV of request {request.request_id}"
        token_ids, capacity = request.token_ids, request.prepared.capacity
        session = request.session
        if session is not None and session.slots is not None:
            return self.blocks.reserve_own(holder, token_ids, capacity)
        if session is not None and session.reservation is not None:
            kept, num_common = session.reservation, num_kept(session.token_ids, token_ids)
            if num_common >= max(len(kept.shared) * BLOCK_TOKENS, self.blocks.num_shared(token_ids)):
                if not self.blocks.extend(kept, num_common, capacity):
                    return None
                session.reservation = None
                kept.lease.holder = holder
                return kept
            # The history was edited within blocks that others may use, or they have more of it: it is found again.
            self.blocks.release(kept)
            session.reservation, session.token_ids = None, []
        return self.blocks.reserve(holder, token_ids, capacity)

    async def _load(self, request: Request, session: SessionKV, slots: list[int]) -> None:
        """Reads a session's KV back. Where that fails it is computed again, like that of a new session."""
        reservation = request.reservation
        assert reservation is not None and session.moving is not None
        num_common = num_kept(session.token_ids, request.token_ids)
        first, end = reservation.kv.length // BLOCK_TOKENS, num_blocks(num_common)
        try:
            if first < end:
                views = [self.blocks.pool.block(idx) for idx in reservation.kv.blocks[first:end]]
                await self._parking.read(slots[first:end], views)
                reservation.num_reused = request.num_reused = reservation.kv.length = num_common
                self.blocks.commit(reservation, request.token_ids)
        except ParkingError as error:
            logger.warning("%s is computed again: %s", session.name, error)
        self._parking.free(slots)
        session.slots, session.token_ids = None, []
        session.moving.set()
        session.moving = None
        self._loading.discard(request)
        if request.aborted:
            self._ended(request, None)
        else:
            self._admitted(request)

    # --- sessions ---

    def open_session(self, parent: SessionKV | None = None) -> SessionKV:
        """A session without KV, or with what it can share with `parent`."""
        session = SessionKV(f"session {next(self._numbers)}")
        if parent is not None and parent.reservation is not None:
            session.reservation = self.blocks.fork(f"KV of {session.name}", parent.reservation)
            session.token_ids = parent.token_ids[: session.reservation.kv.length]
        self._sessions[session] = None
        return session

    def close_session(self, session: SessionKV) -> None:
        """Gives back what the session keeps; its running turn, if any, gives back the rest when it ends."""
        session.closed = True
        self._sessions.pop(session, None)
        if session.moving is None:
            self._drop(session)
            self.pump()

    def stop(self) -> None:
        """Lets nobody in any more."""
        self._stopped = True

    def close(self) -> None:
        """Closes every session. No request and no task of this object is left."""
        for session in list(self._sessions):
            session.closed, session.moving = True, None
            self._drop(session)
        self._sessions.clear()

    def _drop(self, session: SessionKV) -> None:
        if session.reservation is not None:
            self.blocks.release(session.reservation)
        if session.slots is not None:
            self._parking.free(session.slots)
        session.reservation, session.slots, session.token_ids = None, None, []

    def _park_longest_idle(self, but: SessionKV | None) -> None:
        if self._is_parking:
            return
        for session in self._sessions:
            if session.reservation is not None and session.moving is None and session is not but:
                self._is_parking = True
                session.moving = anyio.Event()
                self._tasks.start_soon(self._park, session, session.reservation)
                return

    async def _park(self, session: SessionKV, reservation: Reservation) -> None:
        """Writes a session's KV to disk. Where that fails it is dropped: it can be computed again."""
        assert session.moving is not None
        views = [self.blocks.pool.block(idx) for idx in reservation.kv.blocks[: num_blocks(reservation.kv.length)]]
        slots = None
        try:
            slots = await self._parking.write(views)
            self.num_parkings += 1
        except ParkingError as error:
            logger.warning("%s will be computed again at its next turn: %s", session.name, error)
        finally:
            self.blocks.release(reservation)
            session.reservation, session.slots = None, slots
            if slots is None:
                session.token_ids = []
            session.moving.set()
            session.moving = None
            self._is_parking = False
            if session.closed:
                self._drop(session)
        self.pump()
