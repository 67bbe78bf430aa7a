"""Several forward passes that share a sweep: each goes through a stage while its weights are there.

A pass is a call of the model as anybody may make it, on inputs of its own, so nothing can be packed. Instead the passes
take turns on one thread, each with a stack of its own (greenlets): one runs until it comes to a stage, and the next one
then runs up to there. Each computes just what it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from hermes_async.errors import EngineError, ReadError
from hermes_async.pipeload.stage import Stage


class PassDropped(BaseException):
    """Unwinds a pass that nobody waits for any more; the others go on."""


class NotLoadedError(EngineError):
    """The model came to weights that no stage has loaded by then."""


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingRows:
    """Rows of an input embedding that is not loaded.

    Attributes:
        rows: [rows, hidden].
        token_ids: Whose rows they are, sorted [rows] int64; None where `index` is there.
        index: Each token's row [batch, tokens] int64, where one call of the embedding is all there is.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor | None = None
    index: torch.Tensor | None = None

    def index_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where each id's row is; of the shape of `input_ids`.

        Raises:
            NotLoadedError: The row of an id is not here.
        """
        if self.token_ids is None:
            assert self.index is not None
            return self.index
        input_ids = input_ids.long()
        index = torch.searchsorted(self.token_ids, input_ids).clamp(max=len(self.token_ids) - 1)
        if not torch.equal(self.token_ids[index], input_ids):
            raise NotLoadedError("token ids were to be embedded whose rows are not loaded")
        return index


@dataclass(eq=False)
class ForwardPass:
    """One call of the model.

    Attributes:
        compute: Calls the model, and makes of its output what is wanted; on a thread without an event loop. What it
            sets for its thread, others feel too that take turns with it.
        embedding: The rows of the input embedding that it needs; None where the embedding is loaded or not used.
        dropped: Set by whoever does not want it any more; the pass then ends before its next stage.
        completed: `compute` has returned.
        result: What it returned.
        error: What it raised instead.
    """

    compute: Callable[[], Any]
    embedding: EmbeddingRows | None = None
    dropped: bool = False
    completed: bool = False
    result: Any = None
    error: Exception | None = None

    def run(self) -> None:
        """Sets `result` or `error`; what ends the whole sweep is raised. Within `torch.inference_mode`."""
        try:
            self.result = self.compute()
            self.completed = True
        except PassDropped:
            pass
        except ReadError:
            raise
        except Exception as error:
            self.error = error

    def check_dropped(self) -> None:
        if self.dropped:
            raise PassDropped


class Turn(greenlet):
    """A pass that rests where it has come to a stage whose weights are not bound, and behind a streamed one.

    Like a generator, but it may rest at any depth of calls: `resume` lets it run, and returns when it rests again or
    has ended.

    Attributes:
        at: The stage that it is about to enter, or has just gone through; None before the first.
        entering: Whether it is about to enter it.
        ended: It will never run again.
    """

    def __init__(self, forward_pass: ForwardPass) -> None:
        super().__init__()
        self.forward_pass = forward_pass
        self.at: Stage | None = None
        self.entering = False
        self.ended = False
        self._thrown: BaseException | None = None

    @staticmethod
    def current() -> Turn | None:
        """The one that is running, if the caller is part of one."""
        running = getcurrent()
        return running if isinstance(running, Turn) else None

    def resume(self, error: BaseException | None = None) -> None:
        """Lets it run up to the next stage, or raises `error` where it rests.

        Raises:
            BaseException: What the pass did not keep to itself.
        """
        self._thrown = error
        self.switch()

    def rest(self, stage: Stage, *, entering: bool) -> None:
        """Called from within."""
        self.at, self.entering = stage, entering
        assert self.parent is not None
        self.parent.switch()
        if self._thrown is not None:
            raise self._thrown

    def run(self) -> None:
        """What the greenlet does; an error that is raised here comes out of `resume`."""
        try:
            if self._thrown is None:
                self.forward_pass.run()
        except BaseException as error:
            if error is not self._thrown:
                raise
        finally:
            self.ended = True


def run_in_turns(
    passes: Sequence[ForwardPass],
    enter: Callable[[Stage], None],
    leave: Callable[[Stage], None],
) -> None:
    """Runs all passes through one sweep; each tells of the stages it comes to by `Turn.rest`. Returns when all ended.

    Args:
        enter: Makes a stage's weights ready and binds them; whatever it raises ends all passes.
        leave: Undoes that, unless it is a stage that stays.

    Raises:
        BaseException: As `enter`.
    """
    turns = [Turn(forward_pass) for forward_pass in passes]
    try:
        for turn in turns:
            turn.resume()
        while waiting := [(turn, turn.at) for turn in turns if not turn.ended and turn.at is not None]:
            # Where passes are at different stages, the first in the model's order is next.
            stage = min((at for _, at in waiting), key=lambda at: at.idx)
            enter(stage)
            here = [turn for turn, at in waiting if at is stage]
            for turn in here:
                turn.resume()
            leave(stage)
            for turn in here:
                if not turn.ended and not turn.entering:
                    turn.resume()
    except BaseException as error:
        for turn in turns:
            while not turn.ended:
                turn.resume(error)
        raise
