"""Model calls that share a sweep: each goes through a stage while the stage's weights are in memory.

A call is one run of the model on inputs of its own: a packed row of sequences, or a plain forward pass. The calls of a
sweep run on one thread, each on a greenlet, so each has a stack of its own. A call runs until it comes to a stage, and
rests there until the stage's weights are bound. Each call computes exactly what it would compute alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from hermes_async.errors import EngineError
from hermes_async.modeling.packed import PackedBatch
from hermes_async.modeling.transformers_api import exchange_function_modes, function_modes
from hermes_async.pipeload.stage import Stage


class CallDropped(BaseException):
    """Unwinds a call that is not to go on."""


class NotLoadedError(EngineError):
    """The model needed weights that no stage had loaded."""


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingRows:
    """Rows of an embedding that is not loaded.

    Attributes:
        rows: [rows, hidden].
        row_ids: The number of each row in the table, sorted; [rows] int64.
    """

    rows: torch.Tensor
    row_ids: torch.Tensor

    @classmethod
    def of(cls, rows: Mapping[int, torch.Tensor]) -> EmbeddingRows:
        """Copies rows `[hidden]`, in ascending order of their numbers."""
        return cls(torch.stack(list(rows.values())), torch.tensor(list(rows)))

    def index_of(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Where each row is in `rows`; of the shape of `row_ids`.

        Raises:
            NotLoadedError: A row is not here.
        """
        row_ids = row_ids.long()
        index = torch.searchsorted(self.row_ids, row_ids).clamp(max=len(self.row_ids) - 1)
        if not torch.equal(self.row_ids[index], row_ids):
            raise NotLoadedError("token ids were to be embedded whose rows are not loaded")
        return index


@dataclass(eq=False)
class ModelCall:
    """One call of the model, with transformers' own attention.

    Attributes:
        compute: Calls the model and makes the result from its output; runs on the inference thread. Function modes of
            torch that it enters hold for this call alone; whatever else it sets for its thread, the other calls of the
            sweep feel too.
        rows: The rows that it looks up in each embedding that is read by row, by the module's name.
        dropped: Set by the event loop when nobody wants the result any more. The call then ends before its next stage.
        completed: `compute` has returned.
        result: What `compute` returned.
        error: What `compute` raised.
    """

    compute: Callable[[], Any]
    rows: Mapping[str, EmbeddingRows] = field(default_factory=dict)
    dropped: bool = False
    completed: bool = False
    result: Any = None
    error: Exception | None = None

    def run(self) -> None:
        """Sets `result` or `error`, unless the call is dropped."""
        try:
            self.result = self.compute()
            self.completed = True
        except CallDropped:
            pass
        except Exception as error:
            self.error = error

    def look(self) -> None:
        """Called by the inference thread before each stage, and while it waits for one, to notice who was aborted."""

    def put_away(self) -> None:
        """Called when the call begins to rest: takes its state off the model."""

    def take_out(self) -> None:
        """Called when the call goes on: puts its state back."""


@dataclass(eq=False)
class PackedCall(ModelCall):
    """A call on a packed row of sequences, with `PackedAttention`; made by `StreamedModel.packed_call`.

    The call is dropped when all segments of its batch are dropped.
    """

    batch: PackedBatch = field(kw_only=True)

    def look(self) -> None:
        """Drops the segments that were abandoned, and tells those who wait for that."""
        for segment in self.batch.segments:
            if segment.abandoned and not segment.dropped:
                segment.dropped = True
                if segment.left is not None:
                    segment.left.set()
        self.dropped = self.dropped or all(segment.dropped for segment in self.batch.segments)


class Turn(greenlet):
    """A call on a greenlet. It rests before each stage, and behind each streamed one.

    Experts are stages, too. A call names all experts of a layer that it needs, and rests until one of them is there. It
    computes it, and rests again.

    Attributes:
        at: The stage that the call has entered last, or has just left; None before the first one.
        wants: The stages of which it enters one next; empty if it has just left one.
        ended: It will never run again.
    """

    def __init__(self, call: ModelCall, first: Stage | None) -> None:
        super().__init__()
        self.call = call
        self.at: Stage | None = None
        self.wants: Sequence[Stage] = () if first is None else (first,)
        self.ended = False
        self._unwinding = False

    @staticmethod
    def current() -> Turn:
        """The turn that the caller is part of."""
        turn = getcurrent()
        assert isinstance(turn, Turn)
        return turn

    def resume(self) -> None:
        """Lets the call run up to its next stage or its end.

        Raises:
            BaseException: The call raised something that is no `Exception`.
        """
        self.switch()

    def unwind(self) -> None:
        """Ends the call where it rests."""
        self._unwinding = True
        while not self.ended:  # code of the model may come to further stages while it is unwound
            self.switch()

    @property
    def is_among_experts(self) -> bool:
        """Whether it rests inside of a layer, until experts are there."""
        return not self.ended and bool(self.wants) and self.wants[0].is_expert

    def rest(self, stage: Stage, *, entering: bool) -> None:
        """Called by the call itself, before a stage or behind it: gives the thread to the others.

        Raises:
            CallDropped: The call is not to go on.
        """
        if entering:
            self.rest_for_one((stage,))
        else:
            self.at, self.wants = stage, ()
            self._rest()

    def rest_for_one(self, stages: Sequence[Stage]) -> Stage:
        """Called by the call itself: gives the thread to the others until one of these stages is entered.

        Returns:
            The one that was entered.

        Raises:
            CallDropped: The call is not to go on.
        """
        self.wants = stages
        self._rest()
        assert self.at is not None
        return self.at

    def _rest(self) -> None:
        assert self.parent is not None
        own_modes = exchange_function_modes(self._outer_modes)
        self.call.put_away()
        self.parent.switch()
        self.call.take_out()
        exchange_function_modes(own_modes)
        if self._unwinding or self.call.dropped:
            raise CallDropped

    def run(self) -> None:
        """The greenlet's body; what it raises comes out of `resume`."""
        self._outer_modes = function_modes()
        try:
            if not (self._unwinding or self.call.dropped):
                self.call.run()
        finally:
            self.ended = True


def run_calls(
    calls: Sequence[ModelCall],
    *,
    first: Stage | None,
    enter: Callable[[Sequence[Stage]], Stage | None],
    leave: Callable[[Stage], None],
    switch_to: Callable[[ModelCall], None],
) -> None:
    """Runs all calls through one sweep, and returns when all have ended.

    Args:
        first: The stage that every call needs from its beginning to its end, so it is not left; None if there is none.
        enter: Waits for one of these stages, binds its weights, and returns it. None: somebody was aborted meanwhile,
            and nothing is bound.
        leave: Unbinds the stage's weights, unless it is resident.
        switch_to: Called before a call runs; sets what the model and the process must have for it.

    Raises:
        BaseException: What `enter` raised, or a call that ended by something that is no `Exception`. All calls end.
    """
    turns = [Turn(call, first) for call in calls]
    inside: dict[Stage, list[Turn]] = {}  # the stages that were entered and not left, and who is in them

    def resume(turns: Iterable[Turn]) -> None:
        for turn in turns:
            switch_to(turn.call)
            turn.resume()

    def leave_stages() -> None:
        for stage, within in list(inside.items()):
            if any(turn.is_among_experts for turn in within):
                continue
            del inside[stage]
            if stage is not first:
                leave(stage)
            resume([turn for turn in within if not turn.ended and not turn.wants and turn.at is stage])

    try:
        if first is None:
            resume(turns)
        while waiting := [turn for turn in turns if not turn.ended]:
            for turn in waiting:
                turn.call.look()
            dropped = [turn for turn in waiting if turn.call.dropped]
            if dropped:
                resume(dropped)
                leave_stages()
                continue
            stage = enter(_first_of(waiting))
            if stage is None:
                continue
            here = [turn for turn in waiting if stage in turn.wants]
            for turn in here:
                turn.at = stage
            inside[stage] = here
            resume(here)
            if stage.is_expert:
                del inside[stage]
                leave(stage)
            leave_stages()
    except BaseException:
        for turn in turns:
            if not turn.ended:
                switch_to(turn.call)
                turn.unwind()
        raise


def _first_of(waiting: Sequence[Turn]) -> Sequence[Stage]:
    """What is entered next: the first stage in the model's order, or the experts of the first layer that waits."""
    wanted = {stage: None for turn in waiting for stage in turn.wants}  # a set that keeps the order
    first = min(_place(stage) for stage in wanted)
    return [stage for stage in wanted if _place(stage) == first]


def _place(stage: Stage) -> tuple[int, bool]:
    """Experts have the index of the stage that is entered before them."""
    return stage.idx, stage.is_expert
