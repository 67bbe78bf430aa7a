"""New budgets that wait until a sweep has ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import anyio

from hermes_async.errors import EngineClosedError, HermesError
from hermes_async.serving.loaded_model import LoadedModel


@dataclass(eq=False, slots=True)
class Resize:
    """A new budget, and the event that its caller waits for."""

    budget: int
    done: anyio.Event = field(default_factory=anyio.Event)
    error: HermesError | None = None

    def end(self, error: HermesError | None = None) -> None:
        self.error = error
        self.done.set()


class Resizes:
    """The new budgets, in the order in which they are applied. Event-loop side only."""

    def __init__(self) -> None:
        self._waiting: deque[Resize] = deque()

    def add(self, budget: int) -> Resize:
        """Queues a budget; `wait` must follow."""
        self._waiting.append(Resize(budget))
        return self._waiting[-1]

    async def wait(self, resize: Resize) -> None:
        """Waits until the budget is changed.

        Raises:
            MemoryBudgetError: As `LoadedModel.resize`.

        Cancellation: a resize that has begun goes on; one that has not never begins.
        """
        try:
            await resize.done.wait()
        finally:
            if resize in self._waiting:
                self._waiting.remove(resize)
        if resize.error is not None:
            raise resize.error from resize.error.__cause__

    async def apply(self, loaded: LoadedModel) -> bool:
        """Changes the budget, between two sweeps; returns whether any waited to be applied."""
        is_any = bool(self._waiting)
        while self._waiting:
            resize = self._waiting.popleft()
            try:
                await loaded.resize(resize.budget)
            except HermesError as error:
                resize.end(error)
            except BaseException:
                resize.end(EngineClosedError("the engine was left while it was resized"))
                raise
            else:
                resize.end()
        return is_any

    def end_all(self, error: HermesError) -> None:
        while self._waiting:
            self._waiting.popleft().end(error)
