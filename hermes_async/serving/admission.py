"""Admits requests in order of arrival, when there is KV memory for them. Parks idle sessions on disk."""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import count

import anyio
import anyio.abc
import anyio.lowlevel

from hermes_async.config import format_bytes
from hermes_async.errors import HermesError, MemoryBudgetError, ParkingError, QueueFullError, ReadTimeoutError
from hermes_async.foreign_errors import reason_of
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.trace import WAITS_FOR_KV, Trace
from hermes_async.serving.caches import Reservation, SequenceCaches
from hermes_async.serving.kv_blocks import KVBlocks
from hermes_async.serving.request import Request, RequestState
from hermes_async.serving.scheduler import Scheduler
from hermes_async.serving.session_kv import SessionKV, SessionState
from hermes_async.serving.turn_caches import TurnCaches
from hermes_async.storage.parking import ParkingFile

logger = logging.getLogger(__name__)


class Admission:
    """The queue for KV memory, and the KV of sessions between their turns. Event-loop side only.

    The first request of the queue waits for a place among the active requests, for its session, and at the memory
    governor for its KV. All others wait behind it, even a smaller one that would fit. While KV memory is short, unused
    prefixes are dropped and idle sessions are parked on disk. The longest idle session goes first.

    Args:
        blocks: The KV of sequences that are packed.
        turn_caches: The caches of sequences that run in turns; None if none does.
        kv_memory: What both lease from.
        tasks: Owns the tasks that write sessions to disk.
        max_sequences: The most requests that are active at once; paused ones do not count.
        max_waiting: The most requests that may wait; None for any number.
        trace: Shows which requests wait for memory.
    """

    def __init__(
        self,
        *,
        blocks: KVBlocks,
        turn_caches: TurnCaches | None,
        kv_memory: MemoryGovernor,
        parking: ParkingFile,
        scheduler: Scheduler,
        tasks: anyio.abc.TaskGroup,
        max_sequences: int,
        max_waiting: int | None,
        trace: Trace | None = None,
    ) -> None:
        self.blocks = blocks
        self._turn_caches = turn_caches
        self._kv_memory = kv_memory
        self._parking = parking
        self._scheduler = scheduler
        self._tasks = tasks
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._trace = trace
        # All mutable state. `_waiting` is the queue. `_restoring` are requests whose session's KV is read from disk.
        # `_sessions` are the open sessions, the longest idle one first. `_changed` wakes `next`. `_wait` is the scope
        # in which the first request waits. `_short_of_kv` is that request while it waits for memory. `_is_parking`: a
        # session is being written to disk.
        self._waiting: deque[Request] = deque()
        self._restoring: set[Request] = set()
        self._sessions: dict[SessionKV, None] = {}
        self._changed = anyio.Event()
        self._wait: anyio.CancelScope | None = None
        self._short_of_kv: Request | None = None
        self._is_parking = False
        self._numbers = count(1)
        self.num_parkings = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def short_of_kv(self) -> Request | None:
        """The first request of the queue, while it waits for KV memory."""
        return self._short_of_kv

    @property
    def num_restoring(self) -> int:
        return len(self._restoring)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_parked(self) -> int:
        return sum(session.parked is not None for session in self._sessions)

    # --- requests ---

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the queue.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
        """
        if self._wait is not None and self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise self._queue_full(len(self._waiting))
        self._waiting.append(request)
        self.wake()

    def check_room(self, num_preparing: int) -> None:
        """Refuses a request before its prompt is prepared, if too many would wait.

        Requests in preparation count as waiting, unless a free place is left for them.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
        """
        num_waiting = len(self._waiting) + num_preparing
        num_free = 0 if self._waiting else max(0, self._num_free_places)
        if self._max_waiting is not None and num_waiting >= self._max_waiting + num_free:
            raise self._queue_full(num_waiting)

    async def next(self) -> tuple[Request, HermesError | None]:
        """Waits for the next decision: an admitted request, or a refused one with its error.

        An admitted request has its reservation. It is RUNNING, or it is RESTORING and `restore` must follow.

        Cancellation: no request leaves the queue.
        """
        while True:
            if not self._waiting:
                await self._changed.wait()
                continue
            request = self._waiting[0]
            if (refusal := self._refusal(request)) is not None:
                self._waiting.popleft()
                return request, refusal
            try:
                reservation = self._reserve(request) if self._may_enter(request) else None
            except MemoryError as error:
                self._waiting.popleft()
                return request, self._no_memory(request, error)
            if reservation is not None:
                self._admit(request, reservation)
                return request, None
            if (overdue := self._overdue(request)) is not None:
                self._waiting.popleft()
                return request, overdue
            if self._max_waiting is not None and len(self._waiting) > self._max_waiting:
                return self._waiting.pop(), self._queue_full(len(self._waiting))
            try:
                with anyio.CancelScope() as self._wait:
                    await self._wait_for(request)
            finally:
                self._wait = self._short_of_kv = None

    def wake(self) -> None:
        """Told that a place, a session or the queue has changed: the first request may be waiting for it."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def settle(self) -> None:
        """Waits until all requests are admitted that can be admitted now."""
        await anyio.lowlevel.checkpoint()
        while self._waiting and self._wait is None:
            await anyio.lowlevel.checkpoint()

    def check_again(self) -> None:
        """Restarts the first request's wait, after the first request or the budget has changed."""
        if self._wait is not None:
            self._wait.cancel()

    async def _wait_for(self, request: Request) -> None:
        """Waits for one thing that the request lacks; it may lack others too. Returns early if a disk may hang."""
        if not self._may_enter(request):
            self._look_later(request)
            await self._changed.wait()
            return
        self._short_of_kv = request
        started = time.perf_counter()
        await self._wait_for_room(request)
        if self._trace is not None:
            self._trace.span(WAITS_FOR_KV, _holder(request), started, time.perf_counter())

    def _waits_for_disk(self, request: Request) -> bool:
        """Whether the request cannot be admitted before KV was written to disk, or read back."""
        if self._num_free_places <= 0:
            return False
        session = request.session
        if session is not None and session.busy:
            return session.state is not SessionState.IN_TURN
        return self._is_parking

    def _overdue(self, request: Request) -> ReadTimeoutError | None:
        """The error of a disk that hangs, if the request waits for it."""
        return self._parking.watch.overdue() if self._waits_for_disk(request) else None

    def _look_later(self, request: Request) -> None:
        """Ends the request's wait when the disk that it waits for may be overdue."""
        seconds = self._parking.watch.seconds_left()
        if seconds is not None and self._wait is not None and self._waits_for_disk(request):
            self._wait.deadline = anyio.current_time() + seconds

    async def _wait_for_room(self, request: Request) -> None:
        """Waits at the governor for what `_reserve` found no room for. Unused prefixes are dropped for it."""
        session = request.session
        kept, parked = (None, None) if session is None else (session.reservation, session.parked)
        caches = self._caches_of(request)
        nbytes = caches.missing_bytes(request.token_ids, request.prepared.capacity, kept, parked)
        nbytes += request.prepared.input_bytes
        self.blocks.make_room(nbytes)
        lent = self._kv_memory.lent_bytes
        if not lent or nbytes > self._kv_memory.free_bytes + lent:
            self._park_longest_idle(request)
        self._look_later(request)
        lease = await self._kv_memory.acquire(_holder(request), nbytes)
        lease.release()  # `_reserve` takes it again at once

    def _caches_of(self, request: Request) -> SequenceCaches:
        if not request.prepared.in_turns:
            return self.blocks
        assert self._turn_caches is not None
        return self._turn_caches

    @property
    def _num_free_places(self) -> int:
        return self._max_sequences - self._scheduler.num_active - len(self._restoring)

    def _may_enter(self, request: Request) -> bool:
        """Whether a place is free, and nothing else uses the KV of the request's session."""
        return self._num_free_places > 0 and (request.session is None or not request.session.busy)

    def _admit(self, request: Request, reservation: Reservation) -> None:
        self._waiting.popleft()
        request.reservation = reservation
        request.num_reused = reservation.num_reused
        request.admitted_at = time.perf_counter()
        session = request.session
        if session is not None and session.state is SessionState.PARKED:
            session.enter(SessionState.RESTORING, parked=session.parked, token_ids=session.token_ids)
            request.enter(RequestState.RESTORING)
            self._restoring.add(request)
            return
        if session is not None:
            session.enter(SessionState.IN_TURN)
        request.enter(RequestState.RUNNING)

    def _queue_full(self, num_waiting: int) -> QueueFullError:
        return QueueFullError(
            f"{num_waiting} requests wait, and max_waiting={self._max_waiting} allows no more; try again later"
        )

    def _refusal(self, request: Request) -> MemoryBudgetError | None:
        """The error of a request that was made when there was more KV memory, and never fits now."""
        capacity, most = request.prepared.capacity, self._kv_memory.budget_bytes
        needed = self._caches_of(request).nbytes(capacity) + request.prepared.input_bytes
        if needed <= most:
            return None
        return MemoryBudgetError(
            f"{capacity} tokens need {format_bytes(needed)} of KV memory; the budget has shrunk while the request "
            f"waited, and leaves {format_bytes(most)} for KV caches. Request fewer tokens, or raise the memory budget",
            requested_bytes=needed,
            budget_bytes=most,
        )

    def _no_memory(self, request: Request, error: MemoryError) -> MemoryBudgetError:
        """The error of a request whose KV memory is within the budget, but which the system does not give."""
        needed = self._caches_of(request).nbytes(request.prepared.capacity)
        refused = MemoryBudgetError(
            f"the system does not give the {format_bytes(needed)} of KV memory that the request needs: "
            f"{reason_of(error)}; try again when other programs have given memory back",
            requested_bytes=needed,
            budget_bytes=self._kv_memory.budget_bytes,
        )
        refused.__cause__ = error
        return refused

    def give_back(self, request: Request) -> None:
        """Takes back what a request holds: its place in the queue, or its KV. A session keeps the KV of its turn.

        The KV of a request that is RESTORING is taken back when the read has ended, which may take long.
        """
        if request in self._restoring:
            return
        reservation, session = request.reservation, request.session
        request.reservation = None
        if reservation is None:
            if request in self._waiting:
                self._waiting.remove(request)
                self.check_again()
        elif session is None:
            reservation.release()
        else:
            in_turn = session.state is SessionState.IN_TURN  # or RESTORING, if the engine closes during the read
            if in_turn and not session.closed and reservation.trim(f"KV of {session.name}"):
                token_ids = request.token_ids[: reservation.length]
                session.enter(SessionState.HELD, reservation=reservation, token_ids=token_ids)
                session.inputs_digest = request.prepared.inputs_digest
                self._sessions[session] = self._sessions.pop(session)
            else:
                reservation.release()
                if in_turn:
                    session.enter(SessionState.EMPTY)
        self._park_more()
        self.wake()

    def _reserve(self, request: Request) -> Reservation | None:
        """Reserves the request's KV, the session's KV included; None if there is no room now."""
        token_ids, capacity, session = request.token_ids, request.prepared.capacity, request.session
        if session is not None and session.reservation is not None:
            kept, num_common = session.reservation, session.num_kept(token_ids, request.prepared)
            if num_common and kept.can_extend(num_common, token_ids):
                return kept if kept.extend(_holder(request), num_common, capacity) else None
            kept.release()  # the history was edited, or other sequences share more of it: match it again
            session.enter(SessionState.EMPTY)
        parked = None if session is None else session.parked
        input_bytes = request.prepared.input_bytes
        return self._caches_of(request).reserve(_holder(request), token_ids, capacity, parked, input_bytes=input_bytes)

    async def restore(self, request: Request) -> ReadTimeoutError | None:
        """Reads the KV of a RESTORING request's session from disk. If that fails, the prompt is computed again.

        The request is RUNNING afterwards, unless it has ended meanwhile.

        Returns:
            The error of a read that is overdue. It goes on in a task of its own, and the request must be ended.
        """
        restored = anyio.Event()
        self._tasks.start_soon(self._restore, request, restored)
        try:
            await self._parking.watch.wait(restored)
        except ReadTimeoutError as error:
            return error
        return None

    async def _restore(self, request: Request, restored: anyio.Event) -> None:
        """Cancellation: the session stays RESTORING; only `close` may follow. An ended request gives back its KV."""
        reservation, session = request.reservation, request.session
        assert reservation is not None and session is not None and session.parked is not None
        parked, num_common = session.parked, session.num_kept(request.token_ids, request.prepared)
        try:
            if num_common:
                await reservation.unpark(parked, num_common, request.token_ids, self._parking)
            request.num_reused = reservation.num_reused
        except (ParkingError, MemoryBudgetError) as error:
            logger.warning("the history of %s is computed again: %s", session.name, error)
        except BaseException:
            self._restoring.discard(request)
            if request.ended:
                self.give_back(request)
            raise
        self._restoring.discard(request)
        self._parking.free(parked.slots)
        session.enter(SessionState.IN_TURN)
        if request.ended:
            self.give_back(request)
        else:
            request.enter(RequestState.RUNNING)
        restored.set()

    # --- sessions ---

    def open_session(self, parent: SessionKV | None = None) -> SessionKV:
        """Opens a session without KV, or with the blocks that it can share with `parent`."""
        session = SessionKV(f"session {next(self._numbers)}")
        if parent is not None and parent.reservation is not None:
            reservation = parent.reservation.fork(f"KV of {session.name}")
            if reservation is not None:
                token_ids = parent.token_ids[: reservation.length]
                session.enter(SessionState.HELD, reservation=reservation, token_ids=token_ids)
                session.inputs_digest = parent.inputs_digest
        self._sessions[session] = None
        return session

    def close_session(self, session: SessionKV) -> None:
        """Gives back the session's KV, now or when the thread or turn that uses it has ended."""
        session.closed = True
        self._sessions.pop(session, None)
        if not session.busy:
            self._drop(session)
            self.wake()

    def close(self) -> None:
        """Closes every session. Call it when all requests and tasks have ended."""
        for session in list(self._sessions):
            session.closed = True
            self._drop(session)
        self._sessions.clear()

    def _drop(self, session: SessionKV) -> None:
        if session.reservation is not None:
            session.reservation.release()
        if session.parked is not None:
            self._parking.free(session.parked.slots)
        session.state = SessionState.EMPTY  # from any state: a cancelled task may have left PARKING or RESTORING
        session.reservation, session.parked, session.token_ids = None, None, []

    def _park_more(self) -> None:
        """Parks another session, if the first request still waits for memory."""
        if self._short_of_kv is not None and self._kv_memory.shortfall_bytes > 0:
            self._park_longest_idle(self._short_of_kv)

    def _park_longest_idle(self, request: Request) -> None:
        """Starts to write an idle session to disk, except the request's own, if none is being written."""
        if self._is_parking:
            return
        for session in self._sessions:
            if session.state is SessionState.HELD and session is not request.session:
                self._is_parking = True
                session.enter(SessionState.PARKING, reservation=session.reservation, token_ids=session.token_ids)
                self._tasks.start_soon(self._park, session)
                return

    async def _park(self, session: SessionKV) -> None:
        """Writes a session's KV to disk. If that fails, the KV is dropped, and the next turn computes it again."""
        reservation, token_ids = session.reservation, session.token_ids
        assert reservation is not None
        parked = None
        try:
            parked = await reservation.park(self._parking)
            self.num_parkings += 1
        except (ParkingError, MemoryBudgetError) as error:
            logger.warning("the history of %s will be computed again: %s", session.name, error)
        finally:
            reservation.release()
            if parked is None:
                session.enter(SessionState.EMPTY)
            else:
                session.enter(SessionState.PARKED, parked=parked, token_ids=token_ids)
            self._is_parking = False
            if session.closed:
                self._drop(session)
        self._park_more()
        self.wake()


def _holder(request: Request) -> str:
    return f"KV of request {request.request_id}"
