"""Several forward passes that share a sweep: each goes through a stage while its weights are there.

A pass is a call of the model as anybody may make it, on inputs of its own, so nothing can be packed. Instead each pass
runs on a thread of its own, and the threads take turns: one runs until it comes to a stage, and the next one then runs
up to there. Only one of them ever computes, and each computes just what it would alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hermes_async.errors import ReadError
from hermes_async.pipeload.stage import Stage


class PassDropped(BaseException):
    """Unwinds a pass that nobody waits for any more; the others go on."""


@dataclass(eq=False)
class ForwardPass:
    """One call of the model.

    Attributes:
        compute: Calls the model, and makes of its output what is wanted; on a thread without an event loop.
        embedding: The rows of the input embedding that it needs [rows, hidden], and each token's row among them
            [batch, tokens] int64; None where the embedding is loaded or not used.
        dropped: Set by whoever does not want it any more; the pass then ends before its next stage.
        completed: `compute` has returned.
        result: What it returned.
        error: What it raised instead.
    """

    compute: Callable[[], Any]
    embedding: tuple[torch.Tensor, torch.Tensor] | None = None
    dropped: bool = False
    completed: bool = False
    result: Any = None
    error: Exception | None = None

    def run(self) -> None:
        """Sets `result` or `error`; what ends the whole sweep is raised."""
        try:
            with torch.inference_mode():
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


class TurnThread:
    """A thread that runs a pass, and rests where it has come to a stage whose weights are not bound.

    It rests again behind it, if the stage is a streamed one. Like a generator: `resume` lets it run, and returns when
    it rests again or has ended.

    Attributes:
        at: The stage that it is about to enter, or has just gone through; None before the first.
        entering: Whether it is about to enter it.
        ended: It will never run again.
    """

    def __init__(self, forward_pass: ForwardPass, run: Callable[[TurnThread], None]) -> None:
        self.forward_pass = forward_pass
        self.at: Stage | None = None
        self.entering = False
        self.ended = False
        self._thrown: BaseException | None = None
        self._failure: BaseException | None = None
        self._go = threading.Semaphore(0)
        self._rests = threading.Semaphore(0)
        self._run = run
        self._thread = threading.Thread(target=self._main, name="hermes forward pass")
        self._thread.start()

    def resume(self, error: BaseException | None = None) -> None:
        """Lets it run up to the next stage, or raises `error` where it rests.

        Raises:
            BaseException: What the pass did not keep to itself.
        """
        self._thrown = error
        self._go.release()
        self._rests.acquire()
        if self.ended:
            self._thread.join()
            if self._failure is not None:
                raise self._failure

    def rest(self, stage: Stage, *, entering: bool) -> None:
        """Called by the thread itself."""
        self.at, self.entering = stage, entering
        self._wait()

    def _wait(self) -> None:
        self._rests.release()
        self._go.acquire()
        if self._thrown is not None:
            raise self._thrown

    def _main(self) -> None:
        self._go.acquire()
        try:
            if self._thrown is None:
                self._run(self)
        except BaseException as failure:
            if failure is not self._thrown:
                self._failure = failure
        finally:
            self.ended = True
            self._rests.release()


def run_in_turns(
    passes: Sequence[ForwardPass],
    run: Callable[[TurnThread], None],
    enter: Callable[[Stage], None],
    leave: Callable[[Stage], None],
) -> None:
    """Runs all passes through one sweep; returns when they have ended, and no thread is left.

    Args:
        run: Runs one pass on the calling thread, which tells of the stages it comes to by `TurnThread.rest`.
        enter: Makes a stage's weights ready and binds them; whatever it raises ends all passes.
        leave: Undoes that, unless it is a stage that stays.

    Raises:
        BaseException: As `enter`.
    """
    threads = [TurnThread(forward_pass, run) for forward_pass in passes]
    try:
        for thread in threads:
            thread.resume()
        while waiting := [(thread, thread.at) for thread in threads if not thread.ended and thread.at is not None]:
            # Where passes are at different stages, the first in the model's order is next.
            stage = min((at for _, at in waiting), key=lambda at: at.idx)
            enter(stage)
            here = [thread for thread, at in waiting if at is stage]
            for thread in here:
                thread.resume()
            leave(stage)
            for thread in here:
                if not thread.ended and not thread.entering:
                    thread.resume()
    except BaseException as error:
        for thread in threads:
            while not thread.ended:
                thread.resume(error)
        raise
